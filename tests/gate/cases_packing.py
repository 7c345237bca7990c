"""Compilation case of the kernels that remove padding."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastformer.kernels.packing import mask_facts, mask_places, move_rows


def _batch() -> None:
    mask = torch.empty(32, 512, dtype=torch.int64, device="meta")
    places, _, _, _ = mask_places(mask, mask_facts(mask), 8000, 8000)
    move_rows(torch.empty(32 * 512, 768, dtype=torch.bfloat16, device="meta"), places, 8000)
    move_rows(mask.view(-1), places, 8000)


def cases() -> list[tuple[str, Callable[[], None]]]:
    """(name, launch on meta tensors) of every configuration."""
    return [("packing", _batch)]
