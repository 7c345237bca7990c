"""Corners of attention where a kernel goes wrong quietly."""

import sys

import pytest
import torch

from fastformer.ops import scaled_dot_product_attention


def inputs(device, q_len=20, k_len=20, heads=2, size=16):
    torch.manual_seed(0)
    return [torch.randn(1, heads, n, size, device=device, requires_grad=True) for n in (q_len, k_len, k_len)]


def run(tensors, **options):
    out = scaled_dot_product_attention(*tensors, **options)
    return [out.detach(), *torch.autograd.grad(out, tensors, torch.ones_like(out))]


@pytest.mark.parametrize("huge", [20, 2**31 - 1, 2**31, 2**40, sys.maxsize])
@pytest.mark.parametrize("alignment", ["top-left", "bottom-right"])
def test_a_window_side_as_long_as_the_sequence_bounds_nothing(huge, alignment, device):
    tensors = inputs(device, 13, 20)
    for sides, open_sides in (((huge, 3), (None, 3)), ((3, huge), (3, None)), ((huge, huge), None)):
        ours = run(tensors, window=sides, causal_alignment=alignment)
        for a, b in zip(ours, run(tensors, window=open_sides, causal_alignment=alignment), strict=True):
            torch.testing.assert_close(a, b)


def test_nan_in_a_query_that_sees_nothing_stays_there(device):
    q, k, v = inputs(device, 20, 10)
    with torch.no_grad():
        q[:, :, :5] = float("nan")
    out, dq, dk, dv = run([q, k, v], is_causal=True, causal_alignment="bottom-right")
    assert torch.all(out[:, :, :10] == 0)
    assert torch.all(dq[:, :, :10] == 0)
    assert torch.isfinite(dk).all()
    assert torch.isfinite(dv).all()


@pytest.mark.parametrize("shape", [(1, 1, 20, 20), (1, 1, 1, 20)])
def test_a_row_whose_keys_all_have_the_lowest_finite_bias_averages_its_values(shape, device):
    tensors = inputs(device)
    mask = torch.zeros(shape, device=device)
    mask[:, :, 0] = torch.finfo(torch.float32).min
    out = run(tensors, attn_mask=mask)[0]
    torch.testing.assert_close(out[:, :, 0], tensors[2].detach().mean(2), rtol=1e-4, atol=1e-5)


def test_a_nan_sink_is_not_ignored(device):
    out = run(inputs(device), sinks=torch.tensor([float("nan"), 0.0], device=device))[0]
    assert torch.isnan(out[:, 0]).all()
    assert torch.isfinite(out[:, 1]).all()


def test_no_query_heads_for_shared_key_heads_is_refused(device):
    q, k, v = inputs(device)
    with pytest.raises(ValueError, match="0 heads"):
        scaled_dot_product_attention(q[:, :0], k, v, enable_gqa=True)
