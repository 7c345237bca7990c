"""Compilation cases of the attention kernels: every row of the tables, with the plainest and the richest rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastformer.kernels.attention.backward import attention_backward
from fastformer.kernels.attention.bias import attention_bias_gradient
from fastformer.kernels.attention.call import Call
from fastformer.kernels.attention.config import takes_short_backward
from fastformer.kernels.attention.forward import attention_forward
from fastformer.kernels.attention.weights import attention_weights
from fastformer.kernels.targets import target_of

_PLAIN: dict[str, Any] = {
    "mask": None,
    "slopes": None,
    "sinks": None,
    "seed": None,
    "dropout_p": 0.0,
    "threshold": 1,
    "causal": False,
    "scale": 0.1,
    "bottom_right": False,
    "left": -1,
    "right": -1,
    "softcap": 0.0,
}


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _call(dim: int, dtype: torch.dtype, kind: str, length: int = 1024) -> Call:
    batch, heads = 4, 8
    rules = dict(_PLAIN)
    if kind == "packed":
        q, k, v = (_meta(batch * length, n, dim, dtype=dtype) for n in (heads, 2, 2))
        bounds = _meta(batch + 1, dtype=torch.int32)
        return Call(q, k, v, bounds, bounds, length, length, **rules)
    q, k, v = (_meta(batch, length, n, dim, dtype=dtype).transpose(1, 2) for n in (heads, 2, 2))
    if kind == "shifted":
        rules |= {"causal": True, "bottom_right": True}
        k, v = k[:, :, : length // 2], v[:, :, : length // 2]
    elif kind == "causal":
        rules |= {"causal": True}
    elif kind == "padded":
        rules |= {"mask": _meta(batch, 1, 1, length, dtype=torch.bool).expand(batch, heads, length, length)}
        rules |= {"seed": _meta(1, dtype=torch.int64), "dropout_p": 0.1}
    elif kind == "dropped":
        rules |= {"causal": True, "seed": _meta(1, dtype=torch.int64), "dropout_p": 0.1}
    elif kind in ("masked", "short"):  # all that the single kernel of the short backward takes
        rules |= {"causal": True, "bottom_right": True, "sinks": _meta(heads), "dropout_p": 0.1}
        rules |= {"mask": _meta(batch, 1, 1, length, dtype=dtype).expand(batch, heads, length, length)}
        rules |= {"seed": _meta(1, dtype=torch.int64)}
        k, v = (q, q) if kind == "short" else (k, v)
    elif kind == "biased":
        rules |= {"mask": _meta(1, heads, length, length, dtype=dtype).expand(batch, heads, length, length)}
    elif kind == "rich":
        rules |= {"causal": True, "bottom_right": True, "left": 99, "right": 9, "softcap": 30.0, "dropout_p": 0.1}
        rules |= {"mask": _meta(1, heads, length, length, dtype=dtype).expand(batch, heads, length, length)}
        rules |= {"slopes": _meta(heads), "sinks": _meta(heads), "seed": _meta(1, dtype=torch.int64)}
    return Call(q, k, v, None, None, 0, 0, **rules)


def _case(dim: int, dtype: torch.dtype, kind: str) -> Callable[[], None]:
    def run() -> None:
        call = _call(dim, dtype, kind)
        out, lse = attention_forward(call)
        grad = torch.empty_like(out)
        *_, delta = attention_backward(call, out, lse, grad, torch.empty_like(lse) if kind == "rich" else None)
        if kind in ("biased", "rich"):
            attention_bias_gradient(call, lse, delta, grad, (1, *call.mask.shape[1:]), False)
        if kind == "rich":
            attention_bias_gradient(call, lse, delta, grad, (1, call.heads, 1, 1), True)
            attention_weights(call, lse, _meta(9, dtype=torch.int64), False)
        if kind in ("packed", "padded"):
            attention_weights(call, lse, None, True)

    return run


def _short_case(dim: int, length: int, kind: str) -> Callable[[], None]:
    def run() -> None:
        call = _call(dim, torch.bfloat16, kind, length)
        out, lse = attention_forward(call)
        if takes_short_backward(target_of(call.query.device), call):
            attention_backward(call, out, lse, torch.empty_like(out), lse)

    return run


def cases() -> list[tuple[str, Callable[[], None]]]:
    """(name, forward and backward on meta tensors)."""
    half, single = torch.bfloat16, torch.float32
    chosen = [
        (64, half, "packed"),
        (64, half, "causal"),
        (64, half, "masked"),
        (64, half, "dropped"),
        (64, half, "rich"),
        (64, half, "biased"),
        (128, half, "packed"),
        (128, half, "causal"),
        (128, half, "masked"),
        (128, half, "dropped"),
        (128, half, "rich"),
        (128, half, "shifted"),
        (256, half, "causal"),
        (256, half, "rich"),
        (512, half, "causal"),
        (512, half, "rich"),
        (512, half, "padded"),
        (128, single, "packed"),
        (128, single, "rich"),
        (64, single, "rich"),
        (64, single, "causal"),
    ]
    found = [(f"{kind}-{dim}-{str(dtype)[6:]}", _case(dim, dtype, kind)) for dim, dtype, kind in chosen]
    # Every row of the tables of short sequences.
    for dim, length, kind in (
        *((d, n, "short") for d in (64, 128) for n in (32, 64, 128)),
        *((d, 128, "rich") for d in (64, 128)),
    ):
        found.append((f"single-{kind}-{dim}-{length}", _short_case(dim, length, kind)))
    return found
