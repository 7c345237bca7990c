"""Compilation cases of the Hopper attention kernels: every head dimension, with the plainest and the richest rules."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from fastformer.kernels.attention.call import Call
from fastformer.kernels.attention.hopper import (
    bind_backward,
    bind_forward,
)
from fastformer.kernels.targets import target_of

BATCH, HEADS, KV_HEADS, LENGTH = 4, 8, 2, 1024
CAUSAL: dict[str, Any] = {"causal": True}
RICH: dict[str, Any] = {"causal": True, "bottom_right": True, "left": 99, "right": 9, "softcap": 30.0}
WINDOW: dict[str, Any] = {"left": 99, "right": 9}


def _call(dim: int, dtype: torch.dtype, packed: bool, rules: dict[str, Any]) -> Call:
    def tokens(heads: int) -> torch.Tensor:
        if packed:
            return torch.empty(BATCH * LENGTH, heads, dim, dtype=dtype, device="meta")
        return torch.empty(BATCH, LENGTH, heads, dim, dtype=dtype, device="meta").transpose(1, 2)

    bounds = torch.empty(BATCH + 1, dtype=torch.int32, device="meta") if packed else None
    longest = LENGTH if packed else 0
    plain = {"causal": False, "bottom_right": False, "left": -1, "right": -1, "softcap": 0.0}
    return Call(
        tokens(HEADS), tokens(KV_HEADS), tokens(KV_HEADS), bounds, bounds, longest, longest, mask=None, slopes=None,
        sinks=None, seed=None, dropout_p=0.0, threshold=0, scale=0.1, **{**plain, **rules},
    )  # fmt: skip


def _forward(dim: int, dtype: torch.dtype, packed: bool, rules: dict[str, Any]) -> None:
    call = _call(dim, dtype, packed, rules)
    run = bind_forward(call, None)
    if run is None:
        raise AssertionError("the Hopper kernels do not take this call")
    run(*call.tensors)


def _backward(dim: int, dtype: torch.dtype, packed: bool, rules: dict[str, Any]) -> None:
    call = _call(dim, dtype, packed, rules)
    rows = (HEADS, BATCH * LENGTH) if packed else (BATCH, HEADS, LENGTH)
    lse = torch.empty(rows, device="meta")
    out = torch.empty_strided(*call.layout_like(call.query), dtype=dtype, device="meta")
    grad_lse = lse if rules else None
    run = bind_backward(call, None, out.stride(), out.stride(), lse.stride() if rules else None)
    if run is None:
        raise AssertionError("the Hopper kernels do not take this call")
    run(*call.tensors, out, lse, out, grad_lse)


def cases() -> list[tuple[str, Callable[[], None]]]:
    """(name, one kernel on meta tensors); on sm_90 alone."""
    if target_of(torch.device("meta")).name != "sm_90":
        return []
    bf16, fp16 = torch.bfloat16, torch.float16
    forward = {
        "full-64": (64, bf16, False, {}),
        "full-128": (128, bf16, False, {}),
        "causal-128": (128, bf16, False, CAUSAL),
        "window-128": (128, fp16, False, WINDOW),
        "packed-causal-64": (64, fp16, True, CAUSAL),
        "packed-causal-256": (256, bf16, True, CAUSAL),
        "packed-rich-128": (128, bf16, True, RICH),
        "packed-rich-256": (256, fp16, True, RICH),
    }
    backward = {
        "backward-full-64": (64, bf16, False, {}),
        "backward-packed-rich-64": (64, fp16, True, RICH),
        "backward-full-128": (128, fp16, False, {}),
        "backward-packed-rich-128": (128, bf16, True, RICH),
        "backward-packed-causal-256": (256, bf16, True, CAUSAL),
        "backward-packed-rich-256": (256, fp16, True, RICH),
    }
    return [
        *((name, functools.partial(_forward, *case)) for name, case in forward.items()),
        *((name, functools.partial(_backward, *case)) for name, case in backward.items()),
    ]
