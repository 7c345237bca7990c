"""Compilation cases of the pooling kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastformer.kernels.pooling import mean_backward, mean_forward


def _case(dtype: torch.dtype, masked: bool) -> Callable[[], None]:
    def run() -> None:
        x, cu = torch.empty(4096, 768, dtype=dtype, device="meta"), torch.empty(33, dtype=torch.int32, device="meta")
        mask = torch.empty(4096, dtype=torch.bool, device="meta") if masked else None
        y, count = mean_forward(x, cu, mask)
        mean_backward(y, cu, mask, count, 4096)

    return run


def cases() -> list[tuple[str, Callable[[], None]]]:
    """(name, launch on meta tensors) of every configuration."""
    return [
        (f"pooling-{str(dtype)[6:]}-{'masked' if masked else 'all'}", _case(dtype, masked))
        for dtype in (torch.bfloat16, torch.float32)
        for masked in (False, True)
    ]
