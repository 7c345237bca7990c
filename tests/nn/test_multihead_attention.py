"""fastformer.nn.MultiheadAttention against torch.nn's: results, gradients, errors, and that the fused path ran."""

import inspect

import pytest
import torch
from nn_pairs import assert_same, pair

import fastformer.nn as fnn

B, S, E, H = 3, 7, 24, 4

CAUSAL = torch.ones(S, S, dtype=torch.bool).triu(1)
PADDED = torch.tensor([[False] * S, [False] * 4 + [True] * 3, [False] + [True] * 6])
MASKS = {
    "none": {},
    "padding": {"key_padding_mask": PADDED},
    "causal": {"attn_mask": CAUSAL},
    "causal hint": {"attn_mask": CAUSAL, "is_causal": True},
    "made causal": {"attn_mask": fnn.generate_square_subsequent_mask(S)},
    "causal and padding": {"attn_mask": CAUSAL, "key_padding_mask": PADDED, "is_causal": True},
    "float": {"attn_mask": torch.linspace(-1, 1, S * S).view(S, S)},
    "per head": {"attn_mask": torch.linspace(-1, 1, B * H * S * S).view(B * H, S, S)},
    "float padding": {"key_padding_mask": torch.linspace(-2, 0, B * S).view(B, S)},
    "float both": {
        "attn_mask": torch.linspace(-1, 1, S * S).view(S, S),
        "key_padding_mask": torch.zeros(B, S).masked_fill(PADDED, float("-inf")),
    },
}


def fused_once():
    assert fnn.count().fused["MultiheadAttention"] == 1
    assert not fnn.count().fallback


@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True}, {"add_zero_attn": True, "kdim": 10, "vdim": 12}])
def test_attention_equals_stock(masks, batch_first, options):
    stock, ours = pair(torch.nn.MultiheadAttention, fnn.MultiheadAttention, E, H, batch_first=batch_first, **options)
    shape = (B, S) if batch_first else (S, B)
    q, k, v = torch.randn(*shape, E), torch.randn(*shape, ours.kdim), torch.randn(*shape, ours.vdim)
    fnn.reset_count()
    assert_same(stock, ours, [q, k, v], lambda m, q, k, v: m(q, k, v, need_weights=False, **masks)[0])
    fused_once()
    if not options:
        assert_same(stock, ours, [q], lambda m, x: m(x, x, x, need_weights=False, **masks)[0])
        assert_same(stock.eval(), ours.eval(), [q], lambda m, x: m(x, x, x, need_weights=False, **masks)[0])


def test_cross_attention_and_unbatched():
    stock, ours = pair(torch.nn.MultiheadAttention, fnn.MultiheadAttention, E, H, bias=False)
    q, kv = torch.randn(5, B, E), torch.randn(S, B, E)
    assert_same(stock, ours, [q, kv], lambda m, q, kv: m(q, kv, kv, need_weights=False, key_padding_mask=PADDED)[0])
    q, kv = torch.randn(5, E), torch.randn(S, E)
    fnn.reset_count()
    mask = PADDED[1]
    assert_same(stock, ours, [q, kv], lambda m, q, kv: m(q, kv, kv, need_weights=False, key_padding_mask=mask)[0])
    fused_once()


def test_float_mask_gets_its_gradient():
    stock, ours = pair(torch.nn.MultiheadAttention, fnn.MultiheadAttention, E, H)
    x, mask = torch.randn(S, B, E), torch.randn(B * H, S, S)
    fnn.reset_count()
    assert_same(stock, ours, [x, mask], lambda m, x, mask: m(x, x, x, need_weights=False, attn_mask=mask)[0])
    fused_once()


@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("options", [{"batch_first": True}, {"add_bias_kv": True, "add_zero_attn": True}])
@torch.no_grad()
def test_weights_equal_stock(masks, average, options):
    stock, ours = pair(torch.nn.MultiheadAttention, fnn.MultiheadAttention, E, H, **options)
    q, k = (torch.randn(B, S, E) if "batch_first" in options else torch.randn(S, B, E) for _ in range(2))
    fnn.reset_count()
    got = ours(q, k, k, average_attn_weights=average, **masks)
    fused_once()
    want = stock(q, k, k, average_attn_weights=average, **masks)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_weights_of_a_row_that_sees_nothing_are_zero():
    _, ours = pair(torch.nn.MultiheadAttention, fnn.MultiheadAttention, E, H, batch_first=True)
    out, weights = ours(*[torch.randn(B, S, E)] * 3, key_padding_mask=torch.ones(B, S, dtype=torch.bool))
    assert torch.all(weights == 0)
    torch.testing.assert_close(out, ours.out_proj.bias.expand(B, S, E))


@pytest.mark.parametrize(("dropout", "reason"), [(0.0, "weights with a gradient"), (0.3, "weights after dropout")])
def test_weights_that_training_needs_are_stocks_on_the_cpu(dropout, reason, monkeypatch):
    monkeypatch.setenv("FASTFORMER_BACKEND", "torch")
    stock, ours = pair(torch.nn.MultiheadAttention, fnn.MultiheadAttention, E, H, dropout=dropout)
    x = torch.randn(S, B, E)
    results = []
    for m in (stock, ours):
        fnn.reset_count()
        torch.manual_seed(2)
        out, weights = m(x, x, x)
        (grad,) = torch.autograd.grad(weights.square().sum(), m.in_proj_weight)
        results.append((out, weights, grad))
    assert fnn.count().fallback == {("MultiheadAttention", reason): 1}
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_in_and_out_with_gradients(layout):
    stock, ours = pair(torch.nn.MultiheadAttention, fnn.MultiheadAttention, E, H, batch_first=True)
    parts = [torch.randn(n, E, requires_grad=True) for n in (3, 7, 1)]
    nested = torch.nested.as_nested_tensor(parts, layout=layout)
    fnn.reset_count()
    out = ours(nested, nested, nested, need_weights=False)[0]
    fused_once()
    assert out.is_nested
    assert out.layout == layout
    (out * out).sum().backward() if layout == torch.jagged else (out.to_padded_tensor(0.0) ** 2).sum().backward()
    for part, got in zip(parts, out.unbind(), strict=True):
        lone = part.detach().clone().requires_grad_()
        want = stock(lone, lone, lone, need_weights=False)[0]
        torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-6)
        (want**2).sum().backward()
        torch.testing.assert_close(part.grad, lone.grad, rtol=1e-4, atol=5e-6)


def test_nested_tensors_with_a_mask_are_refused_as_by_stock():
    _, ours = pair(torch.nn.MultiheadAttention, fnn.MultiheadAttention, E, H, batch_first=True)
    nested = torch.nested.nested_tensor([torch.randn(3, E), torch.randn(7, E)])
    with pytest.raises(AssertionError, match="NestedTensor"):
        ours(nested, nested, nested, key_padding_mask=PADDED[:2], need_weights=False)


def test_a_fully_padded_sequence_gives_the_bias_and_finite_gradients():
    _, ours = pair(torch.nn.MultiheadAttention, fnn.MultiheadAttention, E, H, batch_first=True)
    x = torch.randn(B, S, E, requires_grad=True)
    padding = PADDED.clone()
    padding[2] = True
    out = ours(x, x, x, key_padding_mask=padding, need_weights=False)[0]
    torch.testing.assert_close(out[2], ours.out_proj.bias.expand(S, E))
    out.sum().backward()
    assert torch.isfinite(x.grad).all()
    assert torch.all(x.grad[2] == 0)


def test_an_edited_causal_mask_is_no_causal_mask():
    _, ours = pair(torch.nn.MultiheadAttention, fnn.MultiheadAttention, E, H, batch_first=True)
    x = torch.randn(B, S, E)
    mask = fnn.generate_square_subsequent_mask(S)
    before = ours(x, x, x, need_weights=False, attn_mask=mask)[0]
    mask[:, 0] = float("-inf")
    mask[:, 1] = 0.0
    after = ours(x, x, x, need_weights=False, attn_mask=mask)[0]
    stock = torch.nn.MultiheadAttention(E, H, batch_first=True)
    stock.load_state_dict(ours.state_dict())
    torch.testing.assert_close(after, stock(x, x, x, need_weights=False, attn_mask=mask)[0], rtol=1e-5, atol=2e-6)
    assert not torch.allclose(before, after)


def test_signatures_are_stocks():
    for name in fnn.__all__:
        stock = getattr(torch.nn, name, None)
        if stock is None:
            continue
        ours = getattr(fnn, name)
        assert issubclass(ours, stock)
        assert inspect.signature(ours) == inspect.signature(stock)
        mine, theirs = inspect.signature(ours.forward).parameters, inspect.signature(stock.forward).parameters
        assert list(mine)[: len(theirs)] == list(theirs)
        assert all(mine[n].default == theirs[n].default for n in theirs)
        assert all(mine[n].kind is inspect.Parameter.KEYWORD_ONLY for n in list(mine)[len(theirs) :])
