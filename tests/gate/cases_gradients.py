"""Compilation case of the parameter gradients' kernel: products, sums and partial rows at once, as layers launch it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastformer.kernels.gradients import parameter_gradients


def _layer() -> None:
    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    sizes = [(2304, 768), (768, 768), (3072, 768), (768, 3072)]
    products = [(meta(4096, n), meta(4096, k), meta(n, k)) for n, k in sizes]
    sums = [(dy, meta(dy.shape[1])) for dy, _, _ in products]
    partials = [(meta(2 * 264, 768, dtype=torch.float32), meta(768), meta(768))] * 2
    parameter_gradients(products, sums, partials)


def cases() -> list[tuple[str, Callable[[], None]]]:
    """(name, launch on meta tensors) of every configuration."""
    return [("parameter-gradients", _layer)]
