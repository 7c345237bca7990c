"""Activations between two matrix products, with the bias, gate, dropout and residual around them.

    y = residual + dropout(activation(gate + bias) * up)          every part but gate is optional

- One element-wise kernel each way. Backward recomputes everything from gate, up and bias; no mask and no intermediate
  is stored.
- The bias gradient sums the gate's: each backward program walks over rows of one block of columns and keeps one
  partial row.
- GELU: Hendrycks, Gimpel 2016; gated forms: Shazeer 2020, "GLU variants improve Transformer"; squared ReLU: So et al.
  2021, "Primer".
"""

import functools
import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastformer.kernels.launch import Bound, launcher
from fastformer.kernels.random import keep_columns
from fastformer.kernels.rows import (
    as_rows,
    cdiv,
    in_rows,
    power_of_two,
    room,
    room_beside,
    row_stride,
    shape_of_program,
    sum_partials,
)
from fastformer.kernels.targets import Target, target_of

SQRT_HALF = tl.constexpr(0.7071067811865476)
INVERSE_SQRT_2PI = tl.constexpr(0.3989422804014327)
# GELU's tanh form is x * sigmoid(2 * sqrt(2 / pi) * (x + 0.044715 * x^3)).
TANH_LINEAR = tl.constexpr(1.5957691216057308)
TANH_CUBIC = tl.constexpr(0.044715)


@triton.jit
def _sigmoid(x):
    """sigmoid(x) and its derivative, fp32: 1 - sigmoid(x) would lose every digit where x is large."""
    decay = tl.exp(-tl.abs(x))
    above = 1.0 / (1.0 + decay)
    below = decay * above
    return tl.where(x < 0.0, below, above), below * above


@triton.jit
def _activation(x, KIND: tl.constexpr):
    """activation(x) and its derivative, fp32."""
    if KIND == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(x * SQRT_HALF))
        return x * cdf, cdf + x * INVERSE_SQRT_2PI * tl.exp(-0.5 * x * x)
    elif KIND == "gelu_tanh":
        gate, slope = _sigmoid((x + x * x * x * TANH_CUBIC) * TANH_LINEAR)
        return x * gate, gate + x * slope * (1.0 + x * x * (TANH_CUBIC * 3.0)) * TANH_LINEAR
    elif KIND == "silu":
        gate, slope = _sigmoid(x)
        return x * gate, gate + x * slope
    elif KIND == "relu_squared":
        positive = tl.where(x < 0.0, 0.0, x)  # a NaN stays one
        return positive * positive, 2.0 * positive
    else:
        tl.static_assert(KIND == "identity")
        return x, tl.full(x.shape, 1.0, tl.float32)


@triton.jit
def _load_rows(X, row, column, inside, stride):
    return tl.load(X + row[:, None] * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)


@launcher
@triton.jit(do_not_specialize=["rows", "threshold"])
def _forward(
    GATE, UP, BIAS, RESIDUAL, SEED, Y, rows, gate_stride, up_stride, residual_stride, threshold, keep_scale,
    N: tl.constexpr, KIND: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile a program: rows along grid axis 0, columns along axis 1."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(1) * BLOCK_N
    column = first + tl.arange(0, BLOCK_N)
    inside = (row < rows)[:, None] & (column < N)[None, :]
    x = _load_rows(GATE, row, column, inside, gate_stride)  # [BLOCK_M, BLOCK_N]
    if BIAS is not None:
        x += tl.load(BIAS + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    y, _ = _activation(x, KIND)
    if UP is not None:
        y *= _load_rows(UP, row, column, inside, up_stride)
    if DROPOUT:
        y = tl.where(keep_columns(tl.load(SEED), first, row, 0, threshold, BLOCK_N), y * keep_scale, 0.0)
    if RESIDUAL is not None:
        y += _load_rows(RESIDUAL, row, column, inside, residual_stride)
    tl.store(Y + row[:, None] * N + column[None, :], y, mask=inside)


@launcher
@triton.jit(do_not_specialize=["rows", "threshold"])
def _backward(
    DY, GATE, UP, BIAS, SEED, DGATE, DUP, PARTIAL, rows, dy_stride, gate_stride, up_stride, threshold, keep_scale,
    N: tl.constexpr, KIND: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Row tiles one in gridDim[0] apart of one block of columns; the bias gradient of all of them in a partial row."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    first = tl.program_id(1) * BLOCK_N
    column = first + tl.arange(0, BLOCK_N)
    bias = tl.zeros([BLOCK_N], tl.float32)
    if BIAS is not None:
        bias = tl.load(BIAS + column, mask=column < N, other=0.0).to(tl.float32)
    dbias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for tile in range(program, tl.cdiv(rows, BLOCK_M), programs):
        row = tl.cast(tile, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = (row < rows)[:, None] & (column < N)[None, :]
        place = row[:, None] * N + column[None, :]
        dy = _load_rows(DY, row, column, inside, dy_stride)
        if DROPOUT:
            dy = tl.where(keep_columns(tl.load(SEED), first, row, 0, threshold, BLOCK_N), dy * keep_scale, 0.0)
        if KIND == "identity" and UP is None:
            dgate = dy
        else:
            y, slope = _activation(_load_rows(GATE, row, column, inside, gate_stride) + bias[None, :], KIND)
            dgate = dy * slope
            if UP is not None:
                dgate *= _load_rows(UP, row, column, inside, up_stride)
                if DUP is not None:
                    tl.store(DUP + place, dy * y, mask=inside)
        if DGATE is not None:
            tl.store(DGATE + place, dgate, mask=inside)
        if PARTIAL is not None:
            dbias += dgate
    if PARTIAL is not None:
        tl.store(PARTIAL + program.to(tl.int64) * N + column, tl.sum(dbias, 0), mask=column < N)


def _tile(n: int) -> tuple[int, int]:
    block_n = min(max(power_of_two(n), 16), 1024)
    return 2048 // block_n, block_n


def activation_forward(
    gate: Tensor,
    up: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    threshold: int,
    keep_scale: float,
    kind: str,
    out_dtype: torch.dtype,
) -> Tensor:
    """Launch the forward kernel.

    Args:
        gate, up, residual: (..., N), N > 0; bias: (N,) with unit stride.
        seed: (1,) int64, or None for no dropout; threshold, keep_scale: its 32-bit limit and 1 / (1 - p).
        kind: "identity", "gelu", "gelu_tanh", "silu" or "relu_squared".

    Returns:
        (..., N) in out_dtype.
    """
    tensors = (as_rows(gate)[0], in_rows(up), bias, in_rows(residual), seed)
    run = bind_forward(*tensors, threshold, keep_scale, kind, out_dtype)
    assert run is not None
    return run(*tensors)


def bind_forward(
    gate: Tensor,
    up: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    threshold: int,
    keep_scale: float,
    kind: str,
    out_dtype: torch.dtype,
) -> Callable[..., Tensor] | None:
    """`activation_forward` of tensors laid out like these, as a function of the tensors alone; None where it copies."""
    strides = tuple(0 if t is None else row_stride(t) for t in (gate, up, residual))
    if None in strides:
        return None
    dtypes = tuple(None if t is None else t.dtype for t in (gate, up, bias, residual))
    return _forward_of(
        target_of(gate.device), gate.device, gate.shape, strides, dtypes, threshold, keep_scale, kind,
        seed is not None, out_dtype,
    )  # fmt: skip


# What a call is made of beside its tensors is derived once for each kind.
@functools.lru_cache(maxsize=1024, typed=True)
def _forward_of(
    aim: Target,
    device: torch.device,
    shape: torch.Size,
    strides: tuple[int, ...],
    dtypes: tuple[torch.dtype | None, ...],
    threshold: int,
    keep_scale: float,
    kind: str,
    dropped: bool,
    out_dtype: torch.dtype,
) -> Callable[..., Tensor]:
    n, rows = shape[-1], math.prod(shape[:-1])
    block_m, block_n = _tile(n)
    numbers = (rows, *strides, threshold, keep_scale, n, kind, dropped, block_m, block_n)
    grid = cdiv(rows, block_m), cdiv(n, block_n)
    bound = Bound(_forward, grid, numbers, shape_of_program(aim, 2048, 8, 64))

    new_y = room_beside(shape, out_dtype, device, strides[0], dtypes[0])

    def run(
        gate: Tensor, up: Tensor | None, bias: Tensor | None, residual: Tensor | None, seed: Tensor | None
    ) -> Tensor:
        y = new_y(gate)
        if rows:
            bound.launch(gate, up, bias, residual, seed, y)
        return y

    return run


def activation_backward(
    dy: Tensor,
    gate: Tensor | None,
    up: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    threshold: int,
    keep_scale: float,
    kind: str,
    gate_dtype: torch.dtype | None,
    up_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
) -> list[Tensor]:
    """Launch the backward kernels.

    Args:
        dy: gradient of the result; others as in forward. gate may be None for kind "identity" without up.
        gate_dtype, up_dtype, bias_dtype: dtype of that gradient, None where it is not needed.

    Returns:
        the gradients that are needed, in the order of those three arguments.
    """
    tensors = (as_rows(dy)[0], in_rows(gate), in_rows(up), bias, seed)
    run = bind_backward(*tensors, threshold, keep_scale, kind, gate_dtype, up_dtype, bias_dtype)
    assert run is not None
    return [gradient for gradient in run(*tensors) if gradient is not None]


def bind_backward(
    dy: Tensor,
    gate: Tensor | None,
    up: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    threshold: int,
    keep_scale: float,
    kind: str,
    gate_dtype: torch.dtype | None,
    up_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
) -> Callable[..., tuple[Tensor | None, ...]] | None:
    """`activation_backward` of tensors laid out like these, as a function of the tensors alone that has a place for
    each gradient; None where it copies."""
    strides = tuple(0 if t is None else row_stride(t) for t in (dy, gate, up))
    if None in strides:
        return None
    dtypes = tuple(None if t is None else t.dtype for t in (dy, gate, up, bias))
    return _backward_of(
        target_of(dy.device), dy.device, dy.shape, strides, dtypes, threshold, keep_scale, kind, seed is not None,
        (gate_dtype, up_dtype, bias_dtype),
    )  # fmt: skip


@functools.lru_cache(maxsize=1024, typed=True)
def _backward_of(
    aim: Target,
    device: torch.device,
    shape: torch.Size,
    strides: tuple[int, ...],
    dtypes: tuple[torch.dtype | None, ...],
    threshold: int,
    keep_scale: float,
    kind: str,
    dropped: bool,
    wanted: tuple[torch.dtype | None, ...],
) -> Callable[..., tuple[Tensor | None, ...]]:
    n, rows = shape[-1], math.prod(shape[:-1])
    gate_dtype, up_dtype, bias_dtype = wanted
    block_m, block_n = _tile(n)
    programs, blocks = cdiv(rows, block_m), cdiv(n, block_n)
    if bias_dtype is not None:
        # Four programs a multiprocessor, and never more partial rows than twice the multiprocessors.
        programs = min(programs, 2 * aim.multiprocessors, cdiv(4 * aim.multiprocessors, blocks))
    numbers = (rows, *strides, threshold, keep_scale, n, kind, dropped, block_m, block_n)
    bound = Bound(_backward, (programs, blocks), numbers, shape_of_program(aim, 2048, 8, 128))
    total = None if bias_dtype is None else sum_partials(aim, device, programs, n, (bias_dtype,))
    new_dgate, new_dup = (
        None if dtype is None else room_beside(shape, dtype, device, strides[0], dtypes[0])
        for dtype in (gate_dtype, up_dtype)
    )
    new_partial = room((programs, n), torch.float32, device)

    def run(
        dy: Tensor, gate: Tensor | None, up: Tensor | None, bias: Tensor | None, seed: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        dgate = None if new_dgate is None else new_dgate(dy)
        dup = None if new_dup is None else new_dup(dy)
        if not rows:
            return dgate, dup, None if bias_dtype is None else torch.zeros(n, dtype=bias_dtype, device=device)
        if total is None:
            bound.launch(dy, gate, up, bias, seed, dgate, dup, None)
            return dgate, dup, None
        partial = new_partial()
        bound.launch(dy, gate, up, bias, seed, dgate, dup, partial)
        return dgate, dup, total(partial)[0]

    return run
