"""Gradients of what is added to the scores, and the head dimensions that a program cannot hold."""

import warnings

import pytest
import torch
from attention_oracle import Case, check, oracle

from fastformer.ops import scaled_dot_product_attention
from fastformer.ops.attention import kernel


def case(device, dtype, *shape, mask=None, slopes=None, kv_len=None, value_dim=None, **options):
    batch, heads, length, dim = shape
    generator = torch.Generator().manual_seed(dim)

    def draw(*sizes):
        return torch.randn(sizes, generator=generator).to(device, dtype)

    tensors = {
        "query": draw(batch, heads, length, dim),
        "key": draw(batch, 1, kv_len or length, dim),
        "value": draw(batch, 1, kv_len or length, value_dim or dim),
    }
    if mask is not None:
        tensors["attn_mask"] = draw(*mask)
    if slopes is not None:
        tensors["alibi_slopes"] = draw(*slopes).abs()
    return Case(0, tensors, {"enable_gqa": True, **options})


def hold(one):
    """Through the kernels where they run: a warning that PyTorch stands in fails."""
    kernel._warned.clear()

    def ours(**tensors):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="fastformer attention")
            return scaled_dot_product_attention(**tensors, **one.options, return_lse=True)

    check(one, ours, lambda **tensors: oracle(**tensors, options=one.options))


@pytest.mark.parametrize(
    "mask", [(2, 35, 40), (1, 2, 35, 40), (3, 1, 35, 40), (3, 2, 35, 40), (3, 1, 1, 40), (35, 1), (1, 1, 1, 1), (1, 40)]
)
def test_gradient_of_a_bias_of_every_shape(mask, device, poisoned):
    hold(case(device, torch.float32, 3, 2, 35, 16, mask=mask, kv_len=40))


@pytest.mark.parametrize("slopes", [(2,), (3, 2)])
@pytest.mark.parametrize("alignment", ["top-left", "bottom-right"])
def test_gradient_of_slopes(slopes, alignment, device, poisoned):
    hold(
        case(device, torch.float32, 3, 2, 35, 16, slopes=slopes, kv_len=40, is_causal=True, causal_alignment=alignment)
    )


def test_gradient_of_a_bias_behind_softcap_and_window(device, poisoned):
    hold(case(device, torch.float16, 2, 2, 21, 16, mask=(1, 2, 21, 21), slopes=(2,), softcap=2.0, window=(9, 3)))


@pytest.mark.parametrize(
    ("dtype", "dim", "value_dim"),
    [(torch.float32, 72, 72), (torch.float32, 144, 40), (torch.float16, 16, 264)],
)
@pytest.mark.parametrize(
    "rules", [{}, {"is_causal": True, "causal_alignment": "bottom-right"}, {"mask": (1, 2, 18, 23)}]
)
def test_wide_heads(dtype, dim, value_dim, rules, device, poisoned):
    hold(case(device, dtype, 1, 2, 18, dim, value_dim=value_dim, kv_len=23, **rules))


@pytest.mark.parametrize("which", ["key", "value"])
def test_hidden_values_of_wide_heads_never_leak(which, device):
    """As for narrow heads: rows that see a poisoned key are NaN as a whole, whichever columns hold it."""
    one = case(device, torch.float32, 1, 1, 20, 144, is_causal=True)
    leaves = {name: t.requires_grad_() for name, t in one.tensors.items()}
    with torch.no_grad():
        leaves[which][:, :, 17:, 3] = float("nan")
    out, lse = scaled_dot_product_attention(**leaves, **one.options, return_lse=True)
    assert out[:, :, :17].isfinite().all()
    assert lse[:, :, :17].isfinite().all()
    assert out[:, :, 17:].isnan().all()
    (grad,) = torch.autograd.grad(out[:, :, :17].sum(), leaves["query"])
    assert grad[:, :, :17].isfinite().all()


def test_rows_of_wide_heads_that_see_nothing(device):
    one = case(device, torch.float32, 2, 2, 18, 96)
    mask = torch.rand(2, 1, 18, 18) < 0.5
    mask[:, :, 4] = False
    mask[1] = False
    leaves = {name: t.requires_grad_() for name, t in one.tensors.items()}
    out = scaled_dot_product_attention(**leaves, **one.options, attn_mask=mask.to(device))
    assert (out[1] == 0).all()
    assert (out[:, :, 4] == 0).all()
    grads = torch.autograd.grad(out.square().sum(), list(leaves.values()))
    assert all(g.isfinite().all() and (g[1] == 0).all() for g in grads)


def test_a_bias_and_its_gradient_under_compile(device):
    one = case(device, torch.float32, 2, 2, 17, 16, mask=(1, 2, 17, 17), slopes=(2,))

    def call(query, key, value, attn_mask, alibi_slopes):
        return scaled_dot_product_attention(query, key, value, attn_mask, alibi_slopes=alibi_slopes, enable_gqa=True)

    leaves = [t.requires_grad_() for t in one.tensors.values()]
    eager = call(*leaves)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(compiled, eager)
    for a, b in zip(*(torch.autograd.grad(out.sum(), leaves) for out in (compiled, eager)), strict=True):
        torch.testing.assert_close(a, b)
