"""What the kernels that remove padding and number tokens compute, for the steps that are counted: shapes and rows of
tables hang on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def facts(mask: Tensor, out: Tensor, *_: Any) -> None:
    real = mask != 0
    out[:, 0], out[:, 1] = real.sum(1), real[:, 0]
    out[:, 2] = (real[:, 1:] & ~real[:, :-1]).sum(1)


def places(mask: Tensor, facts: Tensor, indices: Tensor, inverse: Tensor, boundaries: Tensor, *rest: Any) -> None:
    positions, real = rest[0], (mask != 0).flatten()
    boundaries[0] = 0
    boundaries[1:] = facts[:, 0].cumsum(0)
    indices.copy_(real.nonzero().squeeze(1))
    inverse.fill_(-1)
    inverse[indices] = torch.arange(len(indices))
    positions.zero_()
    positions[0, : len(indices)] = indices % mask.shape[1]


def move(source: Tensor, known: Tensor, out: Tensor, *_: Any) -> None:
    flat = out.view(out.shape[0], -1).zero_()
    there = (known >= 0).nonzero().squeeze(1)
    flat[there] = source[known[there]]


def number(ids: Tensor, place: Tensor, _: int, padding: int, *__: Any) -> None:
    real = ids != padding
    place.copy_(real.cumsum(1) * real + padding)


COMPUTED: dict[str, Any] = {"_facts": facts, "_places": places, "_move": move, "_number": number}
