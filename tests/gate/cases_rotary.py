"""Compilation cases of the rotary kernel."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastformer.kernels.rotary import rotate


def _case(dtype: torch.dtype, width: int, half: int, interleaved: bool, ids: bool, key: bool) -> Callable[[], None]:
    def run() -> None:
        query = torch.empty(2, 512, 12, width, dtype=dtype, device="meta")
        keys = torch.empty(2, 512, 3, width, dtype=dtype, device="meta") if key else None
        table = torch.empty(1024, half, device="meta")
        position = torch.empty(2, 512, dtype=torch.int64, device="meta") if ids else None
        for inverse in (False, True):
            rotate(query, keys, table, table, position, interleaved, not ids, inverse)
        rotate(query, keys, table, table, position, interleaved, not ids, False, in_place=True)

    return run


def cases() -> list[tuple[str, Callable[[], None]]]:
    """(name, launch on meta tensors) of every configuration."""
    kinds = {
        "half-64": (torch.bfloat16, 64, 32, False, True, True),
        "half-256-query": (torch.float32, 256, 128, False, False, False),
        "half-128-partial": (torch.bfloat16, 128, 16, False, True, True),
        "interleaved-64": (torch.bfloat16, 64, 32, True, False, True),
        "interleaved-80-partial": (torch.float16, 80, 16, True, True, True),
    }
    return [(f"rotary-{name}", _case(*kind)) for name, kind in kinds.items()]
