"""Packed batches from PackedCollator through patched models, against stock on padded ones."""

import pytest
import torch

import fastformer as ff
import fastformer.nn as fnn

transformers = pytest.importorskip("transformers", minversion="4.57")
import zoo  # noqa: E402

from fastformer.integrations.transformers import PackedCollator, TokenBudget  # noqa: E402

LENGTHS = [3, 9, 1, 6, 14]


def examples(per_token=False, types=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i, n in enumerate(LENGTHS):
        row = {"input_ids": torch.randint(3, zoo.VOCAB, (n,), generator=generator).tolist()}
        row["labels"] = torch.randint(0, 3, (n,), generator=generator).tolist() if per_token else i % 3
        if types:
            row["token_type_ids"] = torch.randint(0, 2, (n,), generator=generator).tolist()
        rows.append(row)
    return rows


def padded(rows, pad):
    longest = max(LENGTHS)
    out = {"attention_mask": torch.tensor([[1] * n + [0] * (longest - n) for n in LENGTHS])}
    fill = {"input_ids": pad, "labels": -100, "token_type_ids": 0}
    for name, value in rows[0].items():
        if isinstance(value, list):
            out[name] = torch.tensor([r[name] + [fill[name]] * (longest - len(r[name])) for r in rows])
        else:
            out[name] = torch.tensor([r[name] for r in rows])
    return out


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_packed_training_equals_padded(family, per_token):
    head = "ForSequenceClassification"
    if per_token:
        head = "ForTokenClassification" if family in zoo.ENCODERS else "ForCausalLM"
    stock, patched = zoo.build(family, head).train(), zoo.build(family, head).train()
    ff.patch(patched)
    pad = zoo.ALL[family][1].get("pad_token_id", 0)
    rows = examples(per_token, types="bert" in family and family not in ("distilbert", "modernbert", "roberta"))
    if "roberta" in family:
        rows = examples(per_token)
    batch = PackedCollator.for_model(patched)(rows)
    assert batch["input_ids"].shape == (1, sum(LENGTHS))
    fnn.reset_count()
    a, b = stock(**padded(rows, pad)), patched(**batch)
    assert not fnn.count().fallback
    a.loss.backward()
    b.loss.backward()
    assert abs(a.loss.item() - b.loss.item()) < 1e-5 * max(1.0, a.loss.item())
    if not per_token:
        assert zoo.relative(b.logits, a.logits) < 1e-5
    zoo.assert_same_gradients(stock, patched)


def test_mean_pooling_sees_no_padding():
    stock, patched = (zoo.build("modernbert", "ForSequenceClassification", classifier_pooling="mean") for _ in range(2))
    ff.patch(patched)
    rows = examples()
    assert zoo.relative(patched(**PackedCollator()(rows)).logits, stock(**padded(rows, 0)).logits) < 1e-5


def test_labels_and_masks():
    collate = PackedCollator()
    several = [{"input_ids": [5, 6, 7], "labels": [0.0, 1.0, 0.0]}, {"input_ids": [8, 9, 4], "labels": [1.0, 0.0, 0.0]}]
    assert collate(several)["labels"].tolist() == [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]
    tokens = [{"input_ids": [5, 6, 7], "labels": [1, 2, 0]}, {"input_ids": [8], "labels": [2]}]
    assert collate(tokens)["labels"].tolist() == [[1, 2, 0], [2, -100, -100]]
    masked = [{"input_ids": [0, 5, 6], "attention_mask": [0, 1, 1], "labels": [7, 1, 2]}]
    batch = collate(masked)
    assert batch["input_ids"].tolist() == [[5, 6]]
    assert batch["labels"].tolist() == [[1, 2]]
    assert collate([{"input_ids": torch.tensor([5]), "label": 2}])["labels"].tolist() == [2]


def test_bad_input():
    collate = PackedCollator(max_tokens=4)
    with pytest.raises(ValueError, match="at least one"):
        collate([])
    with pytest.raises(ValueError, match="none in number 1"):
        collate([{"input_ids": [1]}, {"input_ids": []}])
    with pytest.raises(ValueError, match="same fields"):
        collate([{"input_ids": [1]}, {"input_ids": [1], "labels": 0}])
    with pytest.raises(ValueError, match="5 tokens, more than max_tokens=4"):
        collate([{"input_ids": [1] * 5}])
    with pytest.raises(ValueError, match="must be patched"):
        PackedCollator.for_model(zoo.build("bert", "Model"))
    with pytest.raises(ValueError, match="longest example of 9"):
        TokenBudget([3, 9], 8)


def test_token_budget_draws_everything_once_and_anew_each_epoch():
    lengths = [1 + (7 * i) % 23 for i in range(200)]
    sampler = TokenBudget(lengths, 64, seed=3)
    epochs = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler)
        assert sorted(i for batch in batches for i in batch) == list(range(200))
        assert max(sum(lengths[i] for i in batch) for batch in batches) <= 64
        epochs.append(batches)
    assert epochs[0] != epochs[1]
    assert [i for batch in TokenBudget(lengths, 64, shuffle=False) for i in batch] == list(range(200))
