"""Compilation cases of a layer's parameter gradients (products, sums and partial rows at once; sums alone beside
PyTorch's products) and of the cast in front of a layer."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from fastformer.kernels.casting import cast
from fastformer.kernels.gradients import parameter_gradients

SIZES = [(2304, 768), (768, 768), (3072, 768), (768, 3072)]


def _meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _layer(factor: torch.dtype, gradient: torch.dtype) -> None:
    products = [
        (_meta(4096, n, dtype=factor), _meta(4096, k, dtype=factor), _meta(n, k, dtype=gradient)) for n, k in SIZES
    ]
    sums = [(dy, _meta(dy.shape[1], dtype=gradient)) for dy, _, _ in products]
    norm = _meta(2 * 264, 768, dtype=torch.float32), _meta(768, dtype=gradient), _meta(768, dtype=gradient)
    parameter_gradients(products if factor != torch.float32 else [], sums, [norm, norm])


def _cast() -> None:
    sizes = [4096 * 768, *(n * k for n, k in SIZES), 2304, 768, 768]
    cast([_meta(n, dtype=torch.float32) for n in sizes], torch.bfloat16)


def cases() -> list[tuple[str, Callable[[], None]]]:
    """(name, launch on meta tensors) of every configuration."""
    half, single = torch.bfloat16, torch.float32
    return [
        ("parameter-gradients", functools.partial(_layer, half, half)),
        ("parameter-gradients-autocast", functools.partial(_layer, half, single)),
        ("parameter-gradients-fp32", functools.partial(_layer, single, single)),
        ("cast", _cast),
    ]
