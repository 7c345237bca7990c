"""Seeds for dropout, and the reference of the kernels' generator.

- A dropout call draws one 64-bit seed from PyTorch's generator of the tensor's device: `torch.manual_seed` makes a run
  repeat, activation checkpointing restores it, a CUDA graph draws a fresh one every replay, nothing waits for the
  device.
- The mask is a function of (seed, element), see `fastformer.kernels.random`; `philox_keep` is that function in PyTorch.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF


class _Draws(threading.local):
    """Seeds of the running `drawn_together`, in its thread."""

    left: int = 0
    seeds: list[Tensor] | None = None
    state: Any = None


_draws = _Draws()


def draw_seed(device: torch.device) -> Tensor:
    """A fresh dropout seed: int64 tensor of shape (1,) on `device`."""
    if _draws.left and _draws.state == _checkpointing():
        if _draws.seeds is None:
            _draws.seeds = list(_draw(device, _draws.left).split(1))
        if _draws.seeds[0].device == device or device.index is None:
            _draws.left -= 1
            return _draws.seeds[_draws.left]
    return _draw(device, 1)


def _draw(device: torch.device, count: int) -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, (count,), dtype=torch.int64, device=device)


def _checkpointing() -> Any:
    """What differs inside activation checkpointing: a part that runs again later must draw by itself again."""
    return torch.is_grad_enabled(), torch._C._autograd._top_saved_tensors_default_hooks(True)


@contextlib.contextmanager
def drawn_together(count: int) -> Iterator[None]:
    """The next `count` seeds come from one draw, at the first of them; one launch instead of several.

    Inside another one whose seeds suffice, seeds are that one's.
    """
    if _draws.left >= count and _draws.state == _checkpointing():
        yield
        return
    before = _draws.left, _draws.seeds, _draws.state
    _draws.left, _draws.seeds, _draws.state = count, None, _checkpointing()
    try:
        yield
    finally:
        _draws.left, _draws.seeds, _draws.state = before


@functools.cache
def drop_numbers(p: float) -> tuple[int, float]:
    """What a kernel needs to know of p: `dropout_threshold` and `keep_scale`."""
    return dropout_threshold(p), keep_scale(p)


def dropout_threshold(p: float) -> int:
    """The 32-bit draw below which an element is dropped: P(draw < threshold) = p up to 2**-32."""
    return min(round(p * 2**32), 2**32 - 1)


def keep_scale(p: float) -> float:
    """Factor of a surviving element: 1 / (1 - p), and 0 for p = 1."""
    return 1.0 / (1.0 - p) if p < 1.0 else 0.0


def dropout(input: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """Stock dropout of rows (..., N), or with a seed the row kernels' own mask (which reads the seed on the host)."""
    if seed is None or p == 0.0:
        return F.dropout(input, p)
    rows = torch.arange(input[..., :1].numel(), device=input.device).view(*input.shape[:-1], 1)
    columns = torch.arange(input.shape[-1], device=input.device)
    keep = philox_keep(int(seed), columns, rows, torch.zeros_like(columns), p, draws=4)
    return torch.where(keep, input * keep_scale(p), 0.0)


def philox_keep(seed: int | Tensor, column: Tensor, row: Tensor, plane: Tensor, p: float, draws: int = 1) -> Tensor:
    """Philox-4x32-10 keep mask, the reference of `fastformer.kernels.random.keep` and, with draws=4, `keep_columns`.

    Args:
        seed: signed or unsigned 64-bit integer, or an int64 tensor of one element.
        column, row, plane: int64 tensors that broadcast together, values in [0, 2**32).
        p: probability of dropping, in [0, 1].
        draws: 1 or 4, how many neighbouring columns share one Philox call.

    Returns:
        bool tensor of the broadcast shape, True where the element survives.
    """
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    column, c1, c2 = torch.broadcast_tensors(column.long(), row.long(), plane.long())
    c0 = column // draws
    c3 = torch.zeros_like(c0)
    for _ in range(10):
        high0, low0 = _multiply(c0, _M0)
        high1, low1 = _multiply(c2, _M1)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    draw = torch.stack((c0, c1, c2, c3)[:draws], -1).gather(-1, (column % draws).unsqueeze(-1)).squeeze(-1)
    return draw >= dropout_threshold(p)


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    # 32 x 32 -> 64 bits in halves of 16, since int64 holds no unsigned 64-bit product.
    low, high = a & 0xFFFF, a >> 16
    first, second = low * b, high * b
    carry = (first >> 16) + (second & _LOW)
    return ((second >> 32 << 16) + (carry >> 16)) & _LOW, (first & 0xFFFF) | ((carry & 0xFFFF) << 16)
