"""What goes with attention: merging, maps, caches, second derivatives."""

import math

import pytest
import torch
from torch.autograd import forward_ad

from fastformer.ops.attention import (
    attention_kv_cache,
    attention_varlen,
    attention_weights,
    merge_attention,
    scaled_dot_product_attention,
)


def qkv(device, heads=2, kv_heads=2, q_len=9, k_len=21, dim=16):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, heads, q_len, dim), (2, kv_heads, k_len, dim), (2, kv_heads, k_len, dim))
    return [torch.randn(s, generator=generator).to(device).requires_grad_() for s in shapes]


def test_merged_parts_are_the_whole(device):
    query, key, value = qkv(device)
    whole, lse = scaled_dot_product_attention(query, key, value, return_lse=True)
    first = scaled_dot_product_attention(query, key[:, :, :7], value[:, :, :7], return_lse=True)
    second = scaled_dot_product_attention(query, key[:, :, 7:], value[:, :, 7:], return_lse=True)
    merged, merged_lse = merge_attention(*first, *second)
    torch.testing.assert_close(merged, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(merged_lse, lse, rtol=1e-5, atol=1e-6)
    grads = [torch.autograd.grad(x.square().sum(), (query, key, value)) for x in (merged, whole)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_merging_with_nothing(device):
    out = torch.randn(3, 4, device=device)
    lse = torch.tensor([0.5, -math.inf, -math.inf], device=device)
    junk = torch.full((3, 4), math.nan, device=device)
    nothing = torch.full((3,), -math.inf, device=device)
    for merged, total in (merge_attention(out, lse, junk, nothing), merge_attention(junk, nothing, out, lse)):
        assert torch.equal(total, lse)
        torch.testing.assert_close(merged[0], out[0])
        assert (merged[1:] == 0).all()


@pytest.mark.parametrize("average_heads", [True, False])
@pytest.mark.parametrize("rows", [None, [8, 0, 3]])
def test_weights_are_the_probabilities(average_heads, rows, device):
    query, key, _ = qkv(device, heads=4)
    options = {"is_causal": True, "causal_alignment": "bottom-right", "softcap": 3.0, "enable_gqa": True}
    mask = torch.rand(2, 4, 9, 21, device=device) < 0.7
    slopes = torch.rand(4, device=device)
    eye = torch.eye(21, device=device).expand(2, 2, 21, 21)
    # With the identity as values, the output is the map.
    expected, lse = scaled_dot_product_attention(query, key, eye, mask, alibi_slopes=slopes, return_lse=True, **options)
    index = None if rows is None else torch.tensor(rows, device=device)
    weights = attention_weights(
        query, key, lse, mask, alibi_slopes=slopes, average_heads=average_heads, rows=index, **options
    )
    expected = expected if rows is None else expected[:, :, rows]
    torch.testing.assert_close(weights, expected.mean(1) if average_heads else expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("fresh", [0, 1, 3])
def test_cache_is_attention_over_what_it_holds(paged, groups, fresh, device):
    generator = torch.Generator().manual_seed(1)
    lengths, dim, kv_heads, page, blocks = [5, 0, 19], 16, 2, 8, 3
    q_len = fresh or 1
    history = torch.randn(2, 3, 24, kv_heads, dim, generator=generator).to(device)
    new = torch.randn(2, 3, fresh, kv_heads, dim, generator=generator).to(device)
    query = torch.randn(3, q_len, kv_heads * groups, dim, generator=generator).to(device)
    table = None
    caches = torch.full((2, 3, 24, kv_heads, dim), math.nan, device=device)
    for i, n in enumerate(lengths):
        caches[:, i, :n] = history[:, i, :n]
    if paged:
        order = torch.randperm(9, generator=generator).to(device)
        table = order.view(3, blocks).int()
        pages = torch.full((2, 9, page, kv_heads, dim), math.nan, device=device)
        pages[:, order] = caches.view(2, 9, page, kv_heads, dim)
        caches = pages
    seqlens = torch.tensor(lengths, dtype=torch.int32, device=device)
    appended = (new[0], new[1]) if fresh else (None, None)
    out, lse = attention_kv_cache(query, caches[0], caches[1], seqlens, table, *appended, return_lse=True)
    held = caches if table is None else caches[:, table.long()].flatten(2, 3)
    for i, n in enumerate(lengths):
        total = n + fresh
        for which in range(2):
            torch.testing.assert_close(held[which, i, n:total], new[which, i])
            assert torch.equal(held[which, i, :n], history[which, i, :n])
            assert held[which, i, total:].isnan().all()
        one = [x[None].transpose(1, 2) for x in (query[i], held[0, i, :total], held[1, i, :total])]
        expected, norm = scaled_dot_product_attention(
            *one, is_causal=True, causal_alignment="bottom-right", enable_gqa=True, return_lse=True
        )
        torch.testing.assert_close(out[i], expected[0].transpose(0, 1), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(lse[i], norm[0], rtol=1e-5, atol=1e-6)


def test_cache_names_what_is_wrong():
    query, cache = torch.zeros(2, 1, 2, 8), torch.zeros(2, 16, 2, 8)
    lengths = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match="k and v must both be given"):
        attention_kv_cache(query, cache, cache, lengths, k=torch.zeros(2, 1, 2, 8))
    with pytest.raises(TypeError, match="cache_seqlens must be one of int32"):
        attention_kv_cache(query, cache, cache, lengths.long())
    with pytest.raises(ValueError, match="k_cache must have query's batch size 2"):
        attention_kv_cache(query, cache[:1], cache[:1], lengths)


@pytest.mark.filterwarnings("ignore:fastformer attention")
def test_second_derivative(device, monkeypatch):
    query, key, value = qkv(device)

    def second():
        out = scaled_dot_product_attention(query, key, value, softcap=4.0, is_causal=True)
        grads = torch.autograd.grad(out.square().sum(), (query, key, value), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), (query, key, value))

    ours = second()
    monkeypatch.setenv("FASTFORMER_BACKEND", "torch")
    for a, b in zip(ours, second(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def packed_leaves(device):
    generator = torch.Generator().manual_seed(2)
    bounds = torch.tensor([0, 5, 5, 12], dtype=torch.int32, device=device)
    leaves = [torch.randn(14, 2, 8, generator=generator).to(device).requires_grad_() for _ in range(3)]
    return leaves, (bounds, bounds, 7, 7)


@pytest.mark.filterwarnings("ignore:fastformer")
@pytest.mark.parametrize("is_causal", [False, True])
def test_second_derivative_of_packed_attention(is_causal, device):
    leaves, bounds = packed_leaves(device)

    def second(**options):
        result = attention_varlen(*leaves, *bounds, is_causal=is_causal, **options)
        out = result[0] if options else result
        grads = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)

    # With the LSE asked for, the CPU computes by the reference from the start.
    for a, b in zip(second(), second(return_lse=True), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:fastformer")
def test_second_derivative_of_dropout(device):
    """Along a direction, against a difference of first derivatives under the same draws."""
    leaves, bounds = packed_leaves(device)
    steps = [torch.randn_like(leaf) for leaf in leaves]

    def slope(moved, create_graph):
        torch.manual_seed(3)
        out = attention_varlen(*moved, *bounds, dropout_p=0.5)
        grads = torch.autograd.grad(out.square().sum(), moved, create_graph=create_graph)
        return sum((g * s).sum() for g, s in zip(grads, steps, strict=True))

    second = torch.autograd.grad(slope(leaves, True), leaves)
    ahead, behind = ([(x + t * s).detach().requires_grad_() for x, s in zip(leaves, steps, strict=True)]
                     for t in (5e-3, -5e-3))  # fmt: skip
    difference = (slope(ahead, False) - slope(behind, False)) / 1e-2
    along = sum((g * s).sum() for g, s in zip(second, steps, strict=True))
    torch.testing.assert_close(along, difference, rtol=5e-3, atol=5e-3)


@pytest.mark.filterwarnings("ignore:fastformer")
@pytest.mark.parametrize("packed", [False, True])
def test_forward_mode_derivative(packed, device):
    """The Jacobian's product with a direction, against a difference in float64 steps."""
    leaves, bounds = packed_leaves(device)
    if not packed:
        leaves = [x.detach()[:12].reshape(2, 6, 2, 8).transpose(1, 2) for x in leaves]
    leaves = [x.detach() for x in leaves]
    steps = [torch.randn(x.shape, generator=torch.Generator().manual_seed(i)).to(device) for i, x in enumerate(leaves)]

    def call(*x):
        return attention_varlen(*x, *bounds, is_causal=True) if packed else scaled_dot_product_attention(*x)

    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, s) for x, s in zip(leaves, steps, strict=True)]
        tangent = forward_ad.unpack_dual(call(*duals)).tangent
    _, by_functorch = torch.func.jvp(call, tuple(leaves), tuple(steps))
    with torch.no_grad():
        ahead, behind = (call(*(x + h * s for x, s in zip(leaves, steps, strict=True))) for h in (1e-2, -1e-2))
    torch.testing.assert_close(tangent, (ahead - behind) / 2e-2, rtol=2e-2, atol=2e-3)
    torch.testing.assert_close(by_functorch, tangent)
