"""The fused operators against PyTorch's separate ones, eager and compiled: device time of a forward and of a backward.

- dropout + residual + LayerNorm at BERT's widths and at 4k to 64k tokens: forward reads input and residual and writes
  both results (with the residual returned, as a pre-norm block needs it); backward reads two gradients and the residual
  and writes two gradients. That is the least that must move.
- One size of every other row operator.
- linear_cross_entropy at a decoder's vocabulary: time and the most memory alive, against the logits held whole.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastformer as ff
from bench.gpu.place import device, rehearsing
from bench.gpu.results import Row, check_close
from bench.gpu.timing import Timing, difference, median_time

Norm = Callable[..., tuple[Tensor, Tensor]]
# (rows, features): BERT-base, BERT-large, a 7B decoder.
SHAPES = (
    *((rows, features) for rows in (8192, 65536, 4096, 16384, 32768) for features in (768, 1024)),
    (8192, 4096),
)


def cases() -> list[tuple[str, Callable[[], Row]]]:
    shapes = ((12, 32),) if rehearsing() else SHAPES
    found: list[tuple[str, Callable[[], Row]]] = [
        (f"add_layer_norm {rows}x{features} dropout={p}", functools.partial(add_layer_norm, rows, features, p))
        for rows, features in shapes
        for p in ((0.1, 0.0) if features <= 1024 and rows in (12, 8192, 65536) else (0.1,))
    ]
    found += [(name, functools.partial(row_operator, name)) for name in ROW_OPERATORS]
    return [*found, ("linear_cross_entropy", linear_cross_entropy)]


@dataclass(frozen=True)
class RowOperator:
    """An operator over rows.

    Attributes:
        ours, stock: leaves → result.
        width: features of a row; rows: their number.
        tensors: leaves of (rows, width); vectors: leaves of (width,) after them.
        moved: tensors of (rows, width) that forward and backward must move.
    """

    ours: Callable[..., Tensor]
    stock: Callable[..., Tensor]
    rows: int
    width: int
    tensors: int
    vectors: int
    moved: tuple[int, int]


ROW_OPERATORS = {
    "layer_norm": RowOperator(
        lambda x, w, b: ff.ops.layer_norm(x, w, b),
        lambda x, w, b: F.layer_norm(x, w.shape, w, b),
        16384,
        768,
        1,
        2,
        (2, 3),
    ),
    "rms_norm": RowOperator(
        lambda x, w: ff.ops.rms_norm(x, w, 1e-6), lambda x, w: F.rms_norm(x, w.shape, w, 1e-6), 8192, 4096, 1, 1, (2, 3)
    ),
    "bias_gelu": RowOperator(
        lambda x, b: ff.ops.bias_gelu(x, b), lambda x, b: F.gelu(x + b), 16384, 3072, 1, 1, (2, 3)
    ),
    "geglu": RowOperator(
        lambda gate, up: ff.ops.geglu(gate, up), lambda gate, up: F.gelu(gate) * up, 16384, 3072, 2, 0, (3, 5)
    ),
    "swiglu": RowOperator(
        lambda gate, up: ff.ops.swiglu(gate, up), lambda gate, up: F.silu(gate) * up, 8192, 11008, 2, 0, (3, 5)
    ),
    "cross_entropy": RowOperator(
        lambda x: ff.ops.cross_entropy(x, _targets(x)),
        lambda x: F.cross_entropy(x, _targets(x)),
        8192,
        30522,
        1,
        0,
        (1, 2),
    ),
}


@functools.cache
def _numbers(rows: int, classes: int, where: torch.device) -> Tensor:
    return torch.randint(0, classes, (rows,), generator=torch.Generator().manual_seed(0)).to(where)


def _targets(logits: Tensor) -> Tensor:
    return _numbers(*logits.shape, logits.device)


def row_operator(name: str) -> Row:
    """GB/s of forward and backward, ours, eager's and the compiler's."""
    operator = ROW_OPERATORS[name]
    rows, width = (12, 32) if rehearsing() else (operator.rows, operator.width)
    dtype = torch.float32 if rehearsing() else torch.bfloat16

    def draw() -> list[Tensor]:
        shapes = [(rows, width)] * operator.tensors + [(width,)] * operator.vectors
        return [torch.randn(shape, device=device(), dtype=dtype, requires_grad=True) for shape in shapes]

    size = rows * width * dtype.itemsize
    sets = [draw() for _ in range(_sets(operator.tensors * size))]
    row: Row = {"rows": rows, "features": width, "dtype": str(dtype), "fwd": {}, "bwd": {}}
    row["errors"] = _check_leaves(operator.ours, operator.stock, sets[0])
    _measure(row, operator.ours, operator.stock, sets, [size * count for count in operator.moved])
    return row


def linear_cross_entropy() -> Row:
    """TFLOP/s of forward and backward together (our forward computes the gradients), and peak memory.

    Raises:
        WrongResult: a result or a gradient of the first rows and classes is wrong.
    """
    rows, width, classes = (12, 16, 40) if rehearsing() else (8192, 2048, 131072)
    dtype = torch.float32 if rehearsing() else torch.bfloat16

    def draw() -> list[Tensor]:
        weight = torch.randn(classes, width, device=device(), dtype=dtype) / width**0.5
        return [torch.randn(rows, width, device=device(), dtype=dtype, requires_grad=True), weight.requires_grad_()]

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return ff.ops.linear_cross_entropy(x, weight, _numbers(len(x), len(weight), x.device))

    def stock(x: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight), _numbers(len(x), len(weight), x.device))

    sets = [draw() for _ in range(2)]
    # The whole of the logits in float64 would not fit.
    few = [t.detach()[:count].clone().requires_grad_() for t, count in zip(sets[0], (256, 4096), strict=True)]
    row: Row = {"shape": (rows, width, classes), "dtype": str(dtype), "both": {}}
    row["errors"] = _check_leaves(ours, stock, few)
    lines = []
    for name, function in (("ours", ours), ("eager", stock)):
        timing = median_time([functools.partial(_both, function, leaves) for leaves in sets])
        # Three matrix products.
        row["both"][name] = rate = _rate(timing, 6 * rows * width * classes, "tflops")
        rate["peak_MiB"] = _peak(function, sets[0]) / 2**20
        lines.append(
            f"{name} {rate['us'] / 1e3:.3g} ms, {rate['tflops']:.3g} TFLOP/s, peak {rate['peak_MiB']:,.0f} MiB"
        )
    row["line"] = " | ".join(lines)
    return row


def _both(function: Callable[..., Tensor], leaves: list[Tensor], sent: Tensor | None = None) -> None:
    torch.autograd.grad(function(*leaves), leaves, sent)


def _sets(size: int) -> int:
    return 2 if rehearsing() else max(2, min(16, (256 << 20) // size))


def _check_leaves(ours: Callable[..., Tensor], stock: Callable[..., Tensor], leaves: list[Tensor]) -> dict[str, float]:
    sent: list[Tensor] = []

    def run(function: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        given = [t.detach().to(dtype).requires_grad_() for t in leaves]
        out = function(*given)
        if not sent:
            sent.append(torch.randn_like(out))
        return [out.detach(), *torch.autograd.grad(out, given, sent[0].to(dtype))]

    dtype = leaves[0].dtype
    names = ("out", *(f"gradient {index}" for index in range(len(leaves))))
    results = run(ours, dtype), run(stock, dtype), run(stock, torch.float64)
    return {name: check_close(name, *values) for name, *values in zip(names, *results, strict=True)}


def _measure(
    row: Row,
    ours: Callable[..., Tensor],
    stock: Callable[..., Tensor],
    sets: list[list[Tensor]],
    work: list[int],
) -> None:
    """Fill row["fwd"] and row["bwd"]; work: the bytes that each must move."""
    functions = {"ours": ours, "eager": stock}
    if not rehearsing():
        functions["compiled"] = torch.compile(stock, dynamic=False)
    for name, function in functions.items():
        try:
            sent = torch.randn_like(function(*sets[0]))
            alone = median_time([functools.partial(function, *leaves) for leaves in sets])
            whole = median_time([functools.partial(_both, function, leaves, sent) for leaves in sets])
        except Exception as error:
            # torch.compile raises errors of its own making where it finds no compiler.
            if name == "ours":
                raise
            row["fwd"][name] = row["bwd"][name] = {"unavailable": f"{type(error).__name__}: {str(error)[:200]}"}
            continue
        row["fwd"][name] = _rate(alone, work[0])
        row["bwd"][name] = _rate(difference(whole, alone), work[1])
    row["line"] = f"fwd {_line(row['fwd'])} | bwd {_line(row['bwd'])}"


def _peak(function: Callable[..., Tensor], leaves: list[Tensor]) -> int:
    """Most bytes alive beyond the leaves in forward and backward; 0 in a rehearsal."""
    if rehearsing():
        return 0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _both(function, leaves)
    return torch.cuda.max_memory_allocated() - before


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


def _rate(timing: Timing | None, work: int, unit: str = "gbs") -> dict[str, Any]:
    if timing is None:
        return {"unavailable": "lost in noise"}
    return {
        "us": timing.seconds * 1e6,
        unit: work / timing.seconds / {"gbs": 1e9, "tflops": 1e12}[unit],
        "spread": timing.spread,
        "method": timing.method,
    }


def _line(rates: dict[str, dict[str, Any]]) -> str:
    return ", ".join(f"{name} {rate['gbs']:.3g} GB/s" for name, rate in rates.items() if "gbs" in rate)
