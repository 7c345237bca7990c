"""Compilation cases of the loss kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastformer.kernels.loss import cross_entropy_backward, cross_entropy_forward, reduce_losses


def _case(v: int, dtype: torch.dtype, weighted: bool, smoothing: float, softcap: float) -> Callable[[], None]:
    def meta(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def run() -> None:
        logits, goal = meta(4096, v), meta(4096, dtype=torch.int64)
        weight = meta(v, dtype=torch.float32) if weighted else None
        options = (-100, smoothing, 1e-4, softcap)
        losses, row_weight, lse = cross_entropy_forward(logits, goal, weight, *options)
        # A mean's gradient is divided by its sum of weights.
        total = reduce_losses(losses, row_weight, True, dtype)[1] if smoothing else None
        dloss = meta(4096, dtype=torch.float32)
        cross_entropy_backward(dloss, logits, goal, weight, row_weight, lse, *options, True, total)

    return run


def cases() -> list[tuple[str, Callable[[], None]]]:
    """(name, launch on meta tensors) of every configuration."""
    return [
        (f"loss-{v}-{str(dtype)[6:]}-{name}", _case(v, dtype, *options))
        for v in (2, 30522, 131072)
        for dtype in (torch.bfloat16, torch.float32)
        for name, options in {"plain": (False, 0.0, 0.0), "smooth": (False, 0.1, 0.0), "all": (True, 0.1, 30.0)}.items()
    ]
