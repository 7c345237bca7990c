"""Compilation cases of the norm kernels: every width class, dtype and branch worth compiling."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastformer.kernels.norm import norm_forward
from fastformer.kernels.norm_backward import norm_backward, norm_backward_rows

# One width of each class: padded and full single tiles, the widest tiles of either direction, walked rows.
WIDTHS = (100, 768, 2048, 4096, 8192, 16384, 65536)


def _case(n: int, dtype: torch.dtype, rms: bool, dropout: bool, add: bool, mixed: bool = False) -> Callable[[], None]:
    def meta(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def run() -> None:
        rows, wide = 4096, torch.float32 if mixed else dtype
        weight, bias = meta(n, dtype=wide), None if rms else meta(n, dtype=wide)
        residual = meta(rows, n, dtype=wide) if add else None
        scale = meta(rows) if dropout and rms else None
        seed = meta(1, dtype=torch.int64) if dropout else None
        x = meta(rows, n)
        drop = (seed, 429496730, 1.1)
        numbers = (1e-5, 0.0, rms, wide, wide, add)
        _, z, stats = norm_forward(x, residual, weight, bias, scale, *drop, *numbers, meta(rows, n) if mixed else None)
        dz = meta(rows, n, dtype=wide) if add and rms else None
        kinds = (dtype if dropout or not add else None, wide if add else None, wide, None if rms else wide)
        arguments = (
            meta(rows, n, dtype=wide),
            dz,
            x if z is None else z,
            stats,
            weight,
            scale,
            *drop,
            0.0,
            rms,
            *kinds,
        )
        if mixed:
            # As a layer under autocast launches them: a copy for the next product, and a second gradient from it.
            norm_backward_rows(*arguments, dy_more=meta(rows, n))
        else:
            norm_backward(*arguments)

    return run


def cases() -> list[tuple[str, Callable[[], None]]]:
    """(name, launch on meta tensors) of every configuration: LayerNorm and RMSNorm with complementary options."""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    kinds = {
        "bf16-layer-dropadd": (bf16, False, True, True),
        "fp32-layer-add": (fp32, False, False, True),
        "mixed-layer-dropadd": (bf16, False, True, True, True),
        "fp16-rms": (fp16, True, False, False),
        "fp32-rms-dropadd": (fp32, True, True, True),
    }
    return [(f"norm-{n}-{name}", _case(n, *kind)) for n in WIDTHS for name, kind in kinds.items()]
