"""Patched models under torch.compile(fullgraph=True): one graph, whatever the number of tokens and sequences."""

import copy

import pytest
import torch

import fastformer as ff

transformers = pytest.importorskip("transformers", minversion="5")
import zoo  # noqa: E402

from fastformer.integrations.transformers import PackedCollator, PackedSeq2SeqCollator  # noqa: E402

HEADS = {
    "roberta": "ForMaskedLM",
    "distilbert": "ForSequenceClassification",
    "modernbert": "ForMaskedLM",
    "gpt2": "ForCausalLM",
    "llama": "ForCausalLM",
    "t5": "ForConditionalGeneration",
    "bart": "ForConditionalGeneration",
    "vit": "ForImageClassification",
}
# One layer each, but where layers differ from each other.
LAYERS = {
    "distilbert": {"n_layers": 1},
    "modernbert": {"num_hidden_layers": 2},
    "gpt2": {"n_layer": 1},
    "t5": {},
    "bart": {"encoder_layers": 1, "decoder_layers": 1},
}
# As many sequences as no other dimension has, which a graph would take for the same.
LENGTHS = ([5, 7, 9, 4, 6], [3, 8, 4, 6, 2, 11, 3], [12, 10])


def batch_of(family, lengths, number):
    """A batch as its graph takes it: packed by a collator; images."""
    generator = torch.Generator().manual_seed(number)
    if family == "vit":
        labels = torch.arange(len(lengths)) % 3
        return {"pixel_values": torch.randn(len(lengths), 3, 16, 16, generator=generator), "labels": labels}
    rows = [torch.randint(3, zoo.VOCAB, (n,), generator=generator).tolist() for n in lengths]
    if family in zoo.SEQ2SEQ:
        targets = [torch.randint(3, zoo.VOCAB, (n + 1 + n % 3,), generator=generator) for n in lengths]
        examples = [{"input_ids": row, "labels": target} for row, target in zip(rows, targets, strict=True)]
        return PackedSeq2SeqCollator(decoder_start_token_id=0, pad_token_id=0)(examples)
    collate = PackedCollator(first_position=2 if family == "roberta" else 0)
    per_token = HEADS[family] != "ForSequenceClassification"
    return collate([{"input_ids": row, "labels": row if per_token else len(row) % 3} for row in rows])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", HEADS)
def test_one_graph_serves_all_batches(family):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    changes = dict(LAYERS.get(family, {"num_hidden_layers": 1}))
    if family not in zoo.SEQ2SEQ:
        changes["problem_type"] = "single_label_classification"
    one = zoo.build(family, HEADS[family], **changes).train()
    ff.patch(one)
    other = copy.deepcopy(one)
    compiled = torch.compile(one, fullgraph=True, dynamic=True, backend="eager")
    for number, lengths in enumerate(LENGTHS):
        batch = batch_of(family, lengths, number)
        for module in (compiled, other):
            module.zero_grad()
            module(**batch).loss.backward()
        zoo.assert_same_gradients(other, one)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
