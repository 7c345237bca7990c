"""Residual + dropout + LayerNorm in one pass, against PyTorch's separate operators, eager and compiled.

The least that must move through memory: forward reads input and residual and writes both results (with the residual
returned, as a pre-norm block needs it); backward reads two gradients and the residual and writes two gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastformer as ff
from bench.gpu.place import device, rehearsing
from bench.gpu.results import Row, check_close
from bench.gpu.timing import Timing, difference, median_time

Norm = Callable[..., tuple[Tensor, Tensor]]
# (rows, features): BERT-base, BERT-large, a 7B decoder; the last fits no cache many times over.
SHAPES = ((16384, 768), (16384, 1024), (8192, 4096), (131072, 768))


def cases() -> list[tuple[str, Callable[[], Row]]]:
    shapes = ((12, 32),) if rehearsing() else SHAPES
    return [
        (f"add_layer_norm {rows}x{features} dropout={p}", functools.partial(add_layer_norm, rows, features, p))
        for rows, features in shapes
        for p in (0.0, 0.1)
    ]


def _ours(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, p: float) -> tuple[Tensor, Tensor]:
    return ff.ops.add_layer_norm(x, residual, weight, bias, dropout_p=p, return_residual=True)


def _eager(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, p: float) -> tuple[Tensor, Tensor]:
    total = residual + F.dropout(x, p)
    return F.layer_norm(total, weight.shape, weight, bias), total


def add_layer_norm(rows: int, features: int, p: float) -> Row:
    dtype = torch.float32 if rehearsing() else torch.bfloat16
    where = device()
    weight, bias = (torch.randn(features, device=where, dtype=dtype, requires_grad=True) for _ in range(2))

    def draw() -> list[Tensor]:
        leaves = [torch.randn(rows, features, device=where, dtype=dtype, requires_grad=True) for _ in range(2)]
        return [*leaves, *[torch.randn(rows, features, device=where, dtype=dtype) for _ in range(2)]]

    count = 2 if rehearsing() else max(2, min(16, (256 << 20) // (4 * rows * features * dtype.itemsize)))
    sets = [draw() for _ in range(count)]
    errors = _check(sets[0], weight, bias)
    size = rows * features * dtype.itemsize
    row: Row = {"rows": rows, "features": features, "dropout": p, "dtype": str(dtype), "errors": errors}
    row["fwd"], row["bwd"] = {}, {}
    implementations: dict[str, Norm] = {"ours": _ours, "eager": _eager}
    if not rehearsing():
        implementations["compiled"] = torch.compile(_eager, dynamic=False)
    for name, norm in implementations.items():
        try:
            forward, backward = _time(norm, sets, weight, bias, p)
        except Exception as error:
            # torch.compile raises errors of its own making where it finds no compiler.
            if name == "ours":
                raise
            row["fwd"][name] = row["bwd"][name] = {"unavailable": f"{type(error).__name__}: {str(error)[:200]}"}
            continue
        row["fwd"][name] = _rate(forward, 4 * size)
        row["bwd"][name] = _rate(backward, 5 * size)
    row["line"] = f"fwd {_line(row['fwd'])} | bwd {_line(row['bwd'])}"
    return row


def _check(tensors: list[Tensor], weight: Tensor, bias: Tensor) -> dict[str, float]:
    """Errors against fp64 with dropout off: with it on, the two draw different masks."""
    x, residual, *gradients = tensors

    def run(norm: Norm, dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, residual, weight, bias)]
        outs = norm(*leaves, p=0.0)
        return [*outs, *torch.autograd.grad(outs, leaves, [g.to(dtype) for g in gradients])]

    names = ("out", "residual", "dx", "dresidual", "dweight", "dbias")
    results = run(_ours, x.dtype), run(_eager, x.dtype), run(_eager, torch.float64)
    return {name: check_close(name, *values) for name, *values in zip(names, *results, strict=True)}


def _time(norm: Norm, sets: list[list[Tensor]], weight: Tensor, bias: Tensor, p: float) -> tuple[Timing, Timing | None]:
    def forward(x: Tensor, residual: Tensor, *_: Tensor) -> None:
        norm(x, residual, weight, bias, p)

    def both(x: Tensor, residual: Tensor, *gradients: Tensor) -> None:
        torch.autograd.grad(norm(x, residual, weight, bias, p), [x, residual, weight, bias], list(gradients))

    alone = median_time([functools.partial(forward, *tensors) for tensors in sets])
    together = median_time([functools.partial(both, *tensors) for tensors in sets])
    return alone, difference(together, alone)


def _rate(timing: Timing | None, size: int) -> dict[str, Any]:
    if timing is None:
        return {"unavailable": "lost in noise"}
    return {
        "us": timing.seconds * 1e6,
        "gbs": size / timing.seconds / 1e9,
        "spread": timing.spread,
        "method": timing.method,
    }


def _line(rates: dict[str, dict[str, Any]]) -> str:
    return ", ".join(f"{name} {rate['gbs']:.3g} GB/s" for name, rate in rates.items() if "gbs" in rate)
