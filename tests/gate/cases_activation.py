"""Compilation cases of the activation kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastformer.kernels.activation import activation_backward, activation_forward

KINDS = ("identity", "gelu", "gelu_tanh", "silu", "relu_squared")


def _case(n: int, dtype: torch.dtype, kind: str, gated: bool, dropout: bool) -> Callable[[], None]:
    def meta(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def run() -> None:
        x, up, bias = meta(4096, n), meta(4096, n) if gated else None, None if gated else meta(n)
        residual, seed = (meta(4096, n), meta(1, dtype=torch.int64)) if dropout else (None, None)
        activation_forward(x, up, bias, residual, seed, 429496730, 1.1, kind, dtype)
        kinds = (dtype, dtype if gated else None, None if gated else dtype)
        activation_backward(x, x, up, bias, seed, 429496730, 1.1, kind, *kinds)

    return run


def cases() -> list[tuple[str, Callable[[], None]]]:
    """(name, launch on meta tensors) of every configuration."""
    found = [("activation-65536-bfloat16-gelu_tanh", _case(65536, torch.bfloat16, "gelu_tanh", False, True))]
    for n in (100, 3072):
        for dtype in (torch.bfloat16, torch.float32):
            for kind in KINDS:
                dropout, gated = kind == "identity", kind in ("gelu", "silu")
                name = f"activation-{n}-{str(dtype)[6:]}-{kind}"
                found.append((name, _case(n, dtype, kind, False, dropout)))
                if gated:
                    found.append((f"{name}-gated", _case(n, dtype, kind, True, False)))
    return found
