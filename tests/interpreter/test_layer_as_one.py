"""A patched BERT whose layers run as one operation, over the kernels in Triton's interpreter.

TRITON_INTERPRET=1 FASTFORMER_BACKEND=triton python -m pytest tests/interpreter
"""

import copy

import pytest
import torch

import fastformer as ff
import fastformer.nn as fnn

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


@pytest.mark.parametrize("checkpoints", [False, True])
def test_a_model_of_them_computes_what_stock_computes(interpreting, checkpoints):
    if not interpreting:
        pytest.skip("runs in Triton's interpreter only")
    torch.manual_seed(0)
    stock = transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES)).train()
    with torch.no_grad():
        for p in stock.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    ours = copy.deepcopy(stock)
    before = copy.deepcopy(ours.state_dict())
    ff.patch(ours)
    for name in ("bert.encoder.layer.0.output.dense.weight", "bert.encoder.layer.0.attention.self.key.bias"):
        stock.get_parameter(name).requires_grad_(False)
        ours.get_parameter(name).requires_grad_(False)
    if checkpoints:
        ours.gradient_checkpointing_enable()
    mask = torch.arange(6) < torch.tensor([6, 2, 4])[:, None]
    call = {"input_ids": torch.randint(1, 50, mask.shape), "attention_mask": mask.long(), "labels": torch.arange(3) % 2}
    fnn.reset_count()
    for model in (stock, ours):
        model(**call).loss.backward()
    # Recomputed in backward where activations are not kept.
    assert fnn.count().fused["BertLayer"] == 1 + checkpoints
    # For checkpoints transformers hooks the embeddings, which are then called.
    assert fnn.count().fused["Embeddings"] == (not checkpoints)
    for (name, a), b in zip(stock.named_parameters(), ours.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-3, atol=1e-5, msg=name)
    ff.unpatch(ours)
    assert list(ours.state_dict()) == list(before)
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), before.values(), strict=True))
