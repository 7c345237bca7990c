"""Compilation cases of attention over a cache: every row of the table, paged and not, split and not."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastformer.kernels.attention.decode import Rules, attention_decode


def _case(dim: int, dtype: torch.dtype, queries: int, batch: int, rich: bool) -> Callable[[], None]:
    def meta(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def run() -> None:
        kv_heads, group, length, page = 2, 4, 4096, 16
        query = meta(batch, queries, kv_heads * group, dim)
        seqlens = meta(batch, dtype=torch.int32)
        if not rich:
            cache = meta(batch, length, kv_heads, dim)
            rules = Rules(True, 0.1, -1, -1, 0.0, False)
            attention_decode(query, cache, cache, seqlens, None, None, None, None, None, None, None, rules)
            return
        cache, new, angles = meta(512, page, kv_heads, dim), meta(batch, queries, kv_heads, dim), meta(length, dim // 2)
        table = meta(batch, length // page, dtype=torch.int32)
        heads = meta(kv_heads * group, dtype=torch.float32)
        rules = Rules(True, 0.1, 99, 9, 30.0, True)
        attention_decode(query, cache, cache, seqlens, table, new, new, angles, angles, heads, heads, rules)

    return run


def cases() -> list[tuple[str, Callable[[], None]]]:
    """(name, launches on meta tensors)."""
    found = []
    for dim in (64, 128, 256, 512):
        for dtype in (torch.bfloat16, torch.float32):
            for rich, queries in ((False, 1), (True, 1), (False, 32), (True, 32)):
                # Where each of several tokens has tiles of its own, as a single one has, one case stands for all.
                apart = queries > 1 and dim > (128 if dtype == torch.float32 else 256)
                if apart and (not rich or dtype == torch.float32):
                    continue
                # A large batch needs no splits.
                batch = 2 if queries == 1 else 512
                name = f"{dim}-{str(dtype)[6:]}-{queries}-{'rich' if rich else 'plain'}"
                found.append((name, _case(dim, dtype, queries, batch, rich)))
    return found
