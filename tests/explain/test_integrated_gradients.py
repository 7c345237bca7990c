"""Token attributions: they add up, equal a linear model's own parts, and come alike from any kind of batch."""

import copy

import pytest
import torch

import fastformer as ff

transformers = pytest.importorskip("transformers", minversion="5")
import zoo  # noqa: E402

from fastformer.integrations.transformers import PackedCollator  # noqa: E402

LENGTHS = [zoo.WIDTH, 3, 11]
HEAD = "ForSequenceClassification"


def patched(family):
    model = zoo.build(family, HEAD)
    ff.patch(model)
    return model.eval()


def packed(model, batch):
    rows = zip(batch["input_ids"], batch["attention_mask"], strict=True)
    return PackedCollator.for_model(model)([{"input_ids": i, "attention_mask": m} for i, m in rows])


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "modernbert", "llama", "gpt2"])
def test_complete_and_the_same_from_any_batch(family):
    model = patched(family)
    batch = zoo.batch(LENGTHS, pad=model.config.pad_token_id)
    stock = copy.deepcopy(model)
    ff.unpatch(stock)
    with torch.no_grad():
        logits = stock(**batch).logits
    found = ff.explain.integrated_gradients(model, batch, steps=96, baseline=5)
    for i, one in enumerate(found):
        assert one.scores.shape == (LENGTHS[i],)
        assert one.target == int(logits[i].argmax())
        assert one.value == pytest.approx(float(logits[i].max()), abs=1e-5)
        difference = one.value - one.baseline_value
        assert float(one.scores.sum()) == pytest.approx(difference, abs=1e-3 * (1 + abs(difference)))
        assert abs(one.gap) < 1e-3 * (1 + abs(difference))
        assert one.scores.abs().max() > 1e-3
    for other in (
        ff.explain.integrated_gradients(model, packed(model, batch), steps=96, baseline=5),
        ff.explain.integrated_gradients(stock, batch, steps=96, baseline=5),
    ):
        for a, b in zip(found, other, strict=True):
            torch.testing.assert_close(a.scores, b.scores, rtol=1e-3, atol=1e-5)


class Linear(torch.nn.Module):
    """logits[b, c] = sum over tokens of weight[c] . embedding, times the real ones."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = torch.nn.Embedding(10, 4), torch.nn.Linear(4, 3)

    def get_input_embeddings(self):
        return self.table

    def forward(self, input_ids, attention_mask):
        return self.head((self.table(input_ids) * attention_mask[..., None]).sum(1))


def test_of_a_linear_model_it_is_each_tokens_own_part():
    model = Linear()
    ids, mask = torch.tensor([[1, 2, 3], [4, 5, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    batch = {"input_ids": ids, "attention_mask": mask}
    found = ff.explain.integrated_gradients(model, batch, target=2, steps=1)
    for one, row, count in zip(found, ids, (3, 2), strict=True):
        want = model.table.weight[row[:count]] @ model.head.weight[2]
        torch.testing.assert_close(one.scores, want.detach())
        assert one.target == 2
        assert abs(one.gap) < 1e-5
    by_score = ff.explain.integrated_gradients(model, batch, steps=1, score=lambda out: out[:, 2])
    torch.testing.assert_close(by_score[0].scores, found[0].scores)
    assert by_score[0].target is None
    assert all(p.grad is None for p in model.parameters())
    assert not model.table._forward_hooks


def test_language_models_are_explained_by_a_score():
    model = zoo.build("llama", "ForCausalLM").eval()
    ff.patch(model)
    batch = zoo.batch([7, 7], width=7)
    found = ff.explain.integrated_gradients(model, batch, steps=64, score=lambda out: out.logits[:, -1, 5], baseline=3)
    assert [one.scores.shape for one in found] == [(7,), (7,)]
    assert all(abs(one.gap) < 2e-3 for one in found)
    with pytest.raises(ValueError, match="score must say what to explain"):
        ff.explain.integrated_gradients(model, batch)


def test_bad_arguments():
    model, batch = patched("bert"), zoo.batch(LENGTHS)
    for arguments, message in (
        ({"steps": 0}, "steps must be a positive int"),
        ({"baseline": zoo.VOCAB}, "baseline must be an id"),
        ({"target": [0, 1]}, "target must be a class or 3 of them"),
        ({"target": 1.5}, "target must be a class"),
        ({"score": lambda out: out.logits}, "score must return"),
    ):
        with pytest.raises(ValueError, match=message):
            ff.explain.integrated_gradients(model, batch, **arguments)
    with pytest.raises(TypeError, match="batch must be a mapping"):
        ff.explain.integrated_gradients(model, batch["input_ids"])
    with pytest.raises(ValueError, match="get_input_embeddings"):
        ff.explain.integrated_gradients(torch.nn.Linear(2, 2), {"input": torch.ones(1, 2)})
    assert not model.get_input_embeddings()._forward_hooks
