"""Repeated calls: what the first of a kind has found is used by the next, and by no call of another kind."""

import contextlib
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F

from fastformer.ops import activation, norm, operator
from fastformer.ops.activation import bias_gelu, swiglu
from fastformer.ops.attention import attention_kv_cache, attention_varlen, cache, kernel, scaled_dot_product_attention
from fastformer.ops.loss import cross_entropy
from fastformer.ops.norm import add_layer_norm, layer_norm


@pytest.fixture(autouse=True)
def kernels_run(device, interpreting, monkeypatch):
    if device.type == "cpu" and not interpreting:
        pytest.skip("no call on the CPU backend has a kind")
    for module in (norm, activation, kernel, cache):
        monkeypatch.setattr(module, "_kinds", operator.Kinds())


def test_calls_of_one_kind_are_found_and_others_are_not(device, monkeypatch):
    leaves = [torch.randn(shape, device=device, requires_grad=True) for shape in ((6, 24), (24,), (24,))]
    first = layer_norm(*leaves)
    assert len(norm._kinds.found) == 1
    with monkeypatch.context() as patch:
        patch.setattr(norm, "_norm_anew", lambda *_: pytest.fail("checked and chosen again"))
        assert torch.equal(layer_norm(*(leaf.detach().clone().requires_grad_() for leaf in leaves)), first)
    x, weight, bias = leaves
    wide = torch.randn(6, 48, device=device)
    others = {
        "dtype": lambda: layer_norm(x.half(), weight, bias),
        "shape": lambda: layer_norm(x[:5], weight, bias),
        "strides": lambda: layer_norm(wide[:, ::2], weight, bias),
        "distance of rows": lambda: layer_norm(wide[:, :24], weight, bias),
        "no bias": lambda: layer_norm(x, weight),
        "dtype of weights": lambda: layer_norm(x, weight.half(), bias),
        "no gradient": lambda: layer_norm(x.detach(), weight, bias),
        "eps": lambda: layer_norm(x, weight, bias, 0.5),
        "dtype of the result": lambda: layer_norm(x, weight, bias, out_dtype=torch.float16),
    }
    for name, call in others.items():
        found, again = call(), call()
        assert torch.equal(found, again), name
        assert (found.grad_fn is None) == (not any(leaf.requires_grad for leaf in (x, weight, bias))), name
    assert layer_norm(wide[:, ::2], weight, bias).shape == x.shape
    torch.testing.assert_close(others["strides"](), F.layer_norm(wide[:, ::2], (24,), weight, bias))
    torch.testing.assert_close(others["distance of rows"](), F.layer_norm(wide[:, :24], (24,), weight, bias))
    with torch.no_grad():
        assert layer_norm(*leaves).grad_fn is None
    with torch.autocast(device.type, torch.bfloat16):
        assert layer_norm(x.half(), weight, bias).dtype == torch.float32
    assert layer_norm(x.half(), weight, bias).dtype == torch.float16
    with monkeypatch.context() as patch:
        patch.setenv("FASTFORMER_BACKEND", "torch")
        assert type(layer_norm(*leaves).grad_fn).__name__ == "NativeLayerNormBackward0"


def test_wrong_arguments_are_refused_after_right_ones(device):
    x, weight = torch.randn(4, 8, device=device), torch.randn(8, device=device)
    for _ in range(2):
        layer_norm(x, weight)
    with pytest.raises(ValueError, match=r"weight must have shape \(8\)"):
        layer_norm(x, weight[:7])
    with pytest.raises(TypeError, match="input must be a tensor, got list"):
        layer_norm([1.0], weight)
    with pytest.raises(TypeError, match="weight must be a tensor, got float"):
        layer_norm(x, 1.0)
    target = torch.tensor([1, 2, 3, 0], device=device)
    for _ in range(2):
        cross_entropy(x, target)
    with pytest.raises(TypeError, match="target must be one of int64"):
        cross_entropy(x, target.int())


def test_saved_tensors_may_come_back_laid_out_anew(device):
    """As from hooks that hold them elsewhere in the meantime."""
    projection = torch.randn(5, 32, device=device)
    sent = torch.randn(5, 16, device=device)

    def gradient():
        leaf = projection.clone().requires_grad_()
        return torch.autograd.grad(swiglu(*leaf.chunk(2, -1)), leaf, sent)[0]

    expected = gradient()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t.contiguous()):
        assert torch.equal(gradient(), expected)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t.mT.contiguous().mT):
        assert torch.equal(gradient(), expected)
    assert torch.equal(gradient(), expected)


def test_gradients_may_come_in_any_layout(device):
    x, bias = torch.randn(6, 8, device=device, requires_grad=True), torch.randn(8, device=device, requires_grad=True)
    for sent in (
        torch.ones((), device=device).expand(6, 8),
        torch.randn(8, 6, device=device).mT,
        x.detach(),
        x.detach(),
    ):
        found = torch.autograd.grad(bias_gelu(x, bias), (x, bias), sent)
        torch.testing.assert_close(found, torch.autograd.grad(F.gelu(x + bias), (x, bias), sent))


@pytest.mark.parametrize("taking", [(0,), (1,), (3,), (0, 2), (1, 2, 3), (0, 1, 2, 3)])
def test_any_of_the_tensors_may_take_a_gradient(taking, device):
    """autograd is handed those alone; each gets its own."""
    shapes = ((6, 24), (6, 24), (24,), (24,))
    leaves = [torch.randn(shape, device=device).requires_grad_(place in taking) for place, shape in enumerate(shapes)]
    wanted = [leaves[place] for place in taking]
    for _ in range(2):
        ours = torch.autograd.grad(add_layer_norm(*leaves).sin().sum(), wanted)
        x, residual, weight, bias = leaves
        stock = torch.autograd.grad(F.layer_norm(x + residual, (24,), weight, bias).sin().sum(), wanted)
        torch.testing.assert_close(ours, stock)


def test_one_of_two_results_may_get_no_gradient(device):
    x, residual = (torch.randn(6, 8, device=device, requires_grad=True) for _ in range(2))

    def ours():
        return add_layer_norm(x, residual, return_residual=True)

    def stock():
        total = x + residual
        return F.layer_norm(total, (8,)), total

    for _ in range(2):
        for pick in (lambda y, z: y.sin(), lambda y, z: z.sin(), lambda y, z: y.sin() + z.cos()):
            mine, theirs = (torch.autograd.grad(pick(*call()).sum(), (x, residual)) for call in (ours, stock))
            torch.testing.assert_close(mine, theirs)


def test_what_is_watched_takes_no_kind(device):
    x, weight = torch.randn(3, 4, 8, device=device), torch.randn(8, device=device, requires_grad=True)
    layer_norm(x[0], weight)
    before = len(norm._kinds.found)
    batched = torch.func.vmap(layer_norm, (0, None))(x, weight.detach())
    torch.testing.assert_close(batched, F.layer_norm(x, (8,), weight.detach()))
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        assert type(layer_norm(x[0], weight.detach())) is not torch.Tensor
    assert len(norm._kinds.found) == before


def drawn(device, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(device)


def test_attention_of_one_kind_is_checked_and_prepared_once(device, monkeypatch):
    query, key, value = (drawn(device, 2, 2, n, 16).requires_grad_() for n in (9, 9, 9))
    mask = torch.ones(9, 9, device=device, dtype=torch.bool).tril()
    options = {"softcap": 3.0, "return_lse": True}
    calls = {
        "plain": lambda: (scaled_dot_product_attention(query, key, value, mask), None),
        "with LSE": lambda: scaled_dot_product_attention(query, key, value, **options),
        "learned bias": lambda: (scaled_dot_product_attention(query, key, value, bias), None),
        "causal": lambda: (scaled_dot_product_attention(query, key, value, is_causal=True), None),
    }
    bias = drawn(device, 9, 9).requires_grad_()

    def results(call):
        out, lse = call()
        loss = out.sin().sum() if lse is None else out.sin().sum() + lse.sum()
        gradients = torch.autograd.grad(loss, (query, key, value, bias), allow_unused=True)
        return [x for x in (out, lse, *gradients) if x is not None]

    first = {name: results(call) for name, call in calls.items()}
    assert len(kernel._kinds.found) == len(calls)
    monkeypatch.setattr(kernel, "attend", lambda *_: pytest.fail("checked and chosen again"))
    for name, call in calls.items():
        again = results(call)
        assert len(again) == len(first[name])
        assert all(torch.equal(a, b) for a, b in zip(again, first[name], strict=True)), name


def test_dropout_of_attention_is_drawn_for_every_call(device):
    query = drawn(device, 1, 1, 8, 16)
    torch.manual_seed(0)
    first, second = (scaled_dot_product_attention(query, query, query, None, 0.5) for _ in range(2))
    torch.manual_seed(0)
    assert torch.equal(scaled_dot_product_attention(query, query, query, None, 0.5), first)
    assert not torch.equal(first, second)


def test_attention_under_autocast_follows_its_dtype(device):
    query = drawn(device, 1, 1, 8, 16).half()
    for _ in range(2):
        for dtype in (torch.float16, torch.float32):
            with torch.autocast(device.type, dtype) if dtype == torch.float16 else contextlib.nullcontext():
                assert scaled_dot_product_attention(query, query, query).dtype == torch.float16
    with torch.autocast(device.type, torch.float16):
        for _ in range(2):
            assert scaled_dot_product_attention(*[query.float()] * 3).dtype == torch.float16


def test_boundaries_that_are_one_tensor_are_told_from_two_that_are_alike(device):
    """Bottom-right rows without keys exist only where the lengths differ."""
    query = drawn(device, 10, 2, 16)
    longer, shorter = (torch.tensor(ends, dtype=torch.int32, device=device) for ends in ([0, 6, 10], [0, 2, 10]))
    options = {"is_causal": True, "causal_alignment": "bottom-right", "return_lse": True}
    for _ in range(2):
        for bounds_k in (longer, longer.view(-1), longer.clone(), shorter):
            out, lse = attention_varlen(query, query, query, longer, bounds_k, 8, 8, **options)
            hidden = torch.zeros(10, 2, dtype=torch.bool, device=device)
            hidden[:4] = bounds_k is shorter
            assert torch.equal(lse == -torch.inf, hidden)
            assert torch.equal((out == 0).all(-1), hidden)


def test_boundaries_may_lie_apart_in_memory(device):
    query = drawn(device, 10, 2, 16)
    bounds = torch.tensor([0, 6, 10], dtype=torch.int32, device=device)
    apart = torch.stack((bounds, torch.zeros_like(bounds)), 1)[:, 0]
    expected = attention_varlen(query, query, query, bounds, bounds, 6, 6)
    assert torch.equal(attention_varlen(query, query, query, apart, apart, 6, 6), expected)


def test_a_cache_of_one_kind_is_checked_and_prepared_once(device, monkeypatch):
    query, held, lengths = drawn(device, 2, 1, 4, 16), drawn(device, 2, 40, 2, 16), torch.tensor([3, 39], device=device)
    lengths, new = lengths.int(), drawn(device, 2, 1, 2, 16)
    calls = (
        lambda: attention_kv_cache(query, held, held, lengths),
        lambda: attention_kv_cache(query, held.clone(), held.clone(), lengths, None, new, new, return_lse=True)[1],
    )
    first = [call() for call in calls]
    assert len(cache._kinds.found) == 2
    monkeypatch.setattr(cache, "_run", lambda *_: pytest.fail("checked and chosen again"))
    assert all(torch.equal(call(), before) for call, before in zip(calls, first, strict=True))
    with pytest.raises(TypeError, match="cache_seqlens must be one of int32"):
        attention_kv_cache(query, held, held, lengths.long())


def test_wrong_arguments_of_attention_are_refused_after_right_ones(device):
    query = drawn(device, 1, 1, 8, 16)
    for _ in range(2):
        scaled_dot_product_attention(query, query, query)
    with pytest.raises(ValueError, match="key must have query's head dimension 16, got 8"):
        scaled_dot_product_attention(query, query[..., :8], query)
    with pytest.raises(TypeError, match="query must be a tensor, got list"):
        scaled_dot_product_attention([query], query, query)
    with pytest.raises(ValueError, match="dropout_p must be between 0 and 1"):
        scaled_dot_product_attention(query, query, query, None, 1.5)
    with pytest.raises(TypeError, match="window must be a pair"):
        scaled_dot_product_attention(query, query, query, window=3)


def test_a_kind_of_attention_keeps_no_tensor(device):
    query = drawn(device, 1, 2, 8, 16).requires_grad_()
    held = weakref.ref(query)
    out = scaled_dot_product_attention(query, query, query, is_causal=True)
    torch.autograd.grad(out.sum(), query)
    cached = drawn(device, 1, 8, 2, 16)
    also_held = weakref.ref(cached)
    attention_kv_cache(cached[:, :1], cached, cached, torch.tensor([3], dtype=torch.int32, device=device))
    assert kernel._kinds.found
    assert cache._kinds.found
    del query, out, cached
    gc.collect()
    assert held() is None
    assert also_held() is None
