"""Stock and patched BERT side by side on the GPU."""

import contextlib

import pytest
import torch

import fastformer as ff
import fastformer.nn as fnn

transformers = pytest.importorskip("transformers")


@pytest.fixture
def build(tiny, device):
    def make(dropout: float = 0.0) -> torch.nn.Module:
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=2000,
            num_labels=3,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            **(sizes if tiny else {"num_hidden_layers": 4}),
        )
        return transformers.BertForSequenceClassification(config).to(device).train()

    return make


@pytest.fixture
def batch(tiny, device):
    width = 24 if tiny else 256
    lengths = torch.tensor([width, 3, 11, 1] if tiny else [width, 3, 100, 1, 57, 128, 200, 31])
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(width) < lengths[:, None]).long()
    ids = torch.randint(1, 2000, mask.shape, generator=generator) * mask
    labels = torch.randint(0, 3, (len(lengths),), generator=generator)
    return {k: v.to(device) for k, v in {"input_ids": ids, "attention_mask": mask, "labels": labels}.items()}


def losses(model, batch, steps, autocast=False):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    found = []
    for _ in range(steps):
        mixed = torch.autocast("cuda", torch.bfloat16) if autocast else contextlib.nullcontext()
        with mixed:
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return torch.tensor(found)


def test_losses_equal_stock_in_fp32(build, batch, tiny):
    stock, patched = build(), build()
    assert ff.patch(patched)
    fnn.reset_count()
    steps = 1 if tiny else 50
    difference = (losses(stock, batch, steps) - losses(patched, batch, steps)).abs().max()
    assert difference <= 1e-5
    assert not fnn.count().fallback, "the fast path was not what ran"


def test_unpatched_is_stock_again(build, batch):
    model = build().eval()
    with torch.no_grad():
        before = model(**batch).logits
        ff.patch(model)
        ff.unpatch(model)
        assert torch.equal(model(**batch).logits, before)


@pytest.mark.gpu
def test_autocast_stays_near_fp32(build, batch):
    """Under bf16 autocast patched is no further from fp32 than stock is, by more than rounding explains."""
    exact = losses(build(), batch, 10)
    stock = losses(build(), batch, 10, autocast=True)
    patched_model = build()
    ff.patch(patched_model)
    patched = losses(patched_model, batch, 10, autocast=True)
    allowed = 2 * (stock - exact).abs().max() + torch.finfo(torch.bfloat16).eps * exact.abs().max()
    assert (patched - exact).abs().max() <= allowed


@pytest.mark.gpu
def test_dropout_trains_alike(build, batch):
    """With dropout the runs differ draw by draw; their mean loss over many draws must not."""
    means = []
    for patched in (False, True):
        model = build(dropout=0.1)
        if patched:
            ff.patch(model)
        with torch.no_grad():
            drawn = torch.stack([model(**batch).loss for _ in range(200)])
        means.append((drawn.mean(), drawn.std() / len(drawn) ** 0.5))
    (a, a_error), (b, b_error) = means
    assert (a - b).abs() <= 4 * (a_error**2 + b_error**2).sqrt()
