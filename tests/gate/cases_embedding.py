"""Compilation cases of the embedding kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastformer.kernels.embedding import embed_forward, number_tokens


def _case(n: int, dtype: torch.dtype, given: bool, dropout: bool) -> Callable[[], None]:
    def run() -> None:
        ids = torch.empty(8, 512, dtype=torch.int64, device="meta")
        table, vector = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((1024, n), (n,)))
        seed = torch.empty(1, dtype=torch.int64, device="meta") if dropout else None
        others = (ids, ids) if given else (None, None)
        drop = (seed, 429496730, 1.1)
        embed_forward(ids, *others, table, table, table, vector, vector, *drop, 1e-12, dtype, dropout)

    return run


def cases() -> list[tuple[str, Callable[[], Any]]]:
    """(name, launch on meta tensors) of every configuration."""
    found = []
    for n in (100, 768, 4096, 16384):
        found.append((f"embedding-{n}-bfloat16", _case(n, torch.bfloat16, False, True)))
        found.append((f"embedding-{n}-float32", _case(n, torch.float32, True, False)))
    ids = torch.empty(8, 512, dtype=torch.int64, device="meta")
    return [*found, ("numbered-tokens", lambda: number_tokens(ids, 1))]
