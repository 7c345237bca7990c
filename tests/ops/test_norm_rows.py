"""What a layer under autocast asks of the norm kernels, and no operator: a copy in another dtype, a second gradient."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _needs_kernels(device, interpreting):
    if device.type != "cuda" and not interpreting:
        pytest.skip("arguments that no operator has")


@pytest.mark.parametrize("walked", [False, True])
def test_a_copy_and_a_second_gradient(device, walked, monkeypatch):
    from fastformer.kernels import norm, norm_backward

    if walked:
        # Rows wider than a program holds.
        monkeypatch.setattr(norm, "FORWARD_TILE_COLUMNS", 16)
        monkeypatch.setattr(norm_backward, "TILE_COLUMNS", 16)
        for module, name in ((norm, "_forward_of"), (norm_backward, "_backward_of")):
            monkeypatch.setattr(module, "LOOP_COLUMNS", 64)
            monkeypatch.setattr(module, name, getattr(module, name).__wrapped__)
    norm_forward, norm_backward_rows = norm.norm_forward, norm_backward.norm_backward_rows
    torch.manual_seed(0)
    width = 70
    x, more = (torch.randn(3, width, device=device).half() for _ in range(2))
    residual, dy = (torch.randn(3, width, device=device) for _ in range(2))
    weight, bias = torch.randn(2, width, device=device)
    copy = torch.full_like(x, torch.nan)
    single = torch.float32
    call = (x, residual, weight, bias, None, None, 0, 1.0, 1e-5, 0.0, False, single, single, True)
    y, z, stats = norm_forward(*call, copy)
    plain, *_ = norm_forward(*call)
    assert torch.equal(y, plain)
    assert torch.equal(copy, y.half())
    kinds = (torch.float16, single, single, single)
    call = (None, z, stats, weight, None, None, 0, 1.0, 0.0, False, *kinds)
    (dx, dr), partial = norm_backward_rows(dy, *call, dy_more=more)
    (want_dx, want_dr), want = norm_backward_rows(dy + more.float(), *call)
    assert torch.equal(dx, want_dx)
    assert torch.equal(dr, want_dr)
    assert torch.equal(partial, want)
