"""LayerNorm and RMSNorm over rows, with the dropout and residual addition in front of them; backward stands in
`fastformer.kernels.norm_backward`.

    z = residual + row_scale * dropout(input)        y = (z - mean) * rstd * (weight + offset) + bias

- Rows up to `FORWARD_TILE_COLUMNS` stay in registers: every input is read once.
- Wider rows are walked in column blocks: statistics by merging (count, mean, M2) of blocks (Chan, Golub, LeVeque
  1979), the second walk finds the row in the L2 cache.
- Everything is fp32 between load and store.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastformer.kernels.launch import Bound, launcher
from fastformer.kernels.random import keep_columns
from fastformer.kernels.rows import (
    TL_DTYPES,
    as_rows,
    cdiv,
    in_rows,
    power_of_two,
    room,
    room_beside,
    row_stride,
    shape_of_program,
)
from fastformer.kernels.targets import Target, target_of

# Widest row kept in registers: 512 threads hold 32 elements of it each.
FORWARD_TILE_COLUMNS = 16384
LOOP_COLUMNS = 2048


@triton.jit
def _load_sum(
    X, R, S, seed, row, first, column, inside, x_stride, r_stride, threshold, keep_scale,
    DROPOUT: tl.constexpr, Z_DTYPE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """z of a tile in fp32, rounded to the dtype it is kept in; 0 outside."""
    z = tl.load(X + row[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if DROPOUT:
        z = tl.where(keep_columns(seed, first, row, 0, threshold, BLOCK_N), z * keep_scale, 0.0)
    if S is not None:
        # The mask of a row is that of its elements: any column inside means the row is.
        scale = tl.load(S + row, mask=tl.max(inside.to(tl.int32), 1) > 0, other=0.0).to(tl.float32)
        z *= scale[:, None]
    if R is not None:
        z += tl.load(R + row[:, None] * r_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    return z.to(Z_DTYPE).to(tl.float32)  # [BLOCK_M, BLOCK_N]


@triton.jit
def affine(W, B, column, valid, offset):
    """Scale and shift of some columns, fp32 [1, BLOCK_N]; 1 and 0 where there is no weight or bias."""
    scale = tl.full(column.shape, 1.0, tl.float32)
    shift = tl.zeros(column.shape, tl.float32)
    if W is not None:
        scale = tl.load(W + column, mask=valid, other=0.0).to(tl.float32) + offset
    if B is not None:
        shift = tl.load(B + column, mask=valid, other=0.0).to(tl.float32)
    return scale[None, :], shift[None, :]


@launcher
@triton.jit(do_not_specialize=["rows", "threshold"])
def _forward_tile(
    X, R, S, W, B, SEED, Z, Y, COPY, STATS, rows, x_stride, r_stride, threshold, keep_scale, eps, offset,
    N: tl.constexpr, RMS: tl.constexpr, DROPOUT: tl.constexpr, Z_DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_M whole rows a program."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    valid = column < N
    inside = (row < rows)[:, None] & valid[None, :]
    seed = tl.load(SEED) if DROPOUT else 0
    z = _load_sum(
        X, R, S, seed, row, 0, column, inside, x_stride, r_stride, threshold, keep_scale, DROPOUT, Z_DTYPE, BLOCK_N
    )
    place = row[:, None] * N + column[None, :]
    if Z is not None:
        tl.store(Z + place, z, mask=inside)
    if RMS:
        centred = z
    else:
        mean = tl.sum(z, 1) / N  # [BLOCK_M]
        tl.store(STATS + row, mean, mask=row < rows)
        centred = tl.where(inside, z - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / N + eps)
    if RMS:
        tl.store(STATS + row, rstd, mask=row < rows)
    else:
        tl.store(STATS + rows + row, rstd, mask=row < rows)
    scale, shift = affine(W, B, column, valid, offset)
    y = centred * rstd[:, None] * scale + shift
    tl.store(Y + place, y, mask=inside)
    if COPY is not None:
        tl.store(COPY + place, y, mask=inside)


@launcher
@triton.jit(do_not_specialize=["rows", "threshold", "columns"])
def _forward_loop(
    X, R, S, W, B, SEED, Z, Y, COPY, STATS, rows, x_stride, r_stride, threshold, keep_scale, eps, offset,
    N: tl.constexpr, RMS: tl.constexpr, DROPOUT: tl.constexpr, Z_DTYPE: tl.constexpr, BLOCK_N: tl.constexpr, columns,
):  # fmt: skip
    """One row a program, walked twice in blocks of BLOCK_N columns.

    columns is N once more, not known when compiling: a loop of known length is unrolled until registers spill.
    """
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    seed = tl.load(SEED) if DROPOUT else 0
    mean = tl.zeros([1], tl.float32)
    m2 = tl.zeros([1], tl.float32)
    for first in range(0, columns, BLOCK_N):
        column = first + tl.arange(0, BLOCK_N)
        inside = (column < N)[None, :]
        z = _load_sum(
            X, R, S, seed, row, first, column, inside, x_stride, r_stride, threshold, keep_scale,
            DROPOUT, Z_DTYPE, BLOCK_N,
        )  # fmt: skip
        if Z is not None:
            tl.store(Z + row[:, None] * N + column[None, :], z, mask=inside)
        if RMS:
            m2 += tl.sum(z * z, 1)
        else:
            width = tl.minimum(N - first, BLOCK_N).to(tl.float32)
            block_mean = tl.sum(z, 1) / width
            centred = tl.where(inside, z - block_mean[:, None], 0.0)
            delta = block_mean - mean
            # The columns before this block number `first`.
            m2 += tl.sum(centred * centred, 1) + delta * delta * (first * (width / (first + width)))
            mean += delta * (width / (first + width))
    rstd = tl.rsqrt(m2 / N + eps)
    if RMS:
        tl.store(STATS + row, rstd)
    else:
        tl.store(STATS + row, mean)
        tl.store(STATS + rows + row, rstd)
    for first in range(0, columns, BLOCK_N):
        column = first + tl.arange(0, BLOCK_N)
        valid = column < N
        z = _load_sum(
            X, R, S, seed, row, first, column, valid[None, :], x_stride, r_stride, threshold, keep_scale,
            DROPOUT, Z_DTYPE, BLOCK_N,
        )  # fmt: skip
        scale, shift = affine(W, B, column, valid, offset)
        y = (z - mean[:, None]) * rstd[:, None] * scale + shift
        tl.store(Y + row[:, None] * N + column[None, :], y, mask=valid[None, :])
        if COPY is not None:
            tl.store(COPY + row[:, None] * N + column[None, :], y, mask=valid[None, :])


def norm_forward(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    row_scale: Tensor | None,
    seed: Tensor | None,
    threshold: int,
    keep_scale: float,
    eps: float,
    offset: float,
    rms: bool,
    sum_dtype: torch.dtype,
    out_dtype: torch.dtype,
    keep_sum: bool,
    copy: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Launch the forward kernel.

    Args:
        input, residual: (..., N), N > 0; weight, bias: (N,) with unit stride; row_scale: contiguous, one a row.
        seed: (1,) int64, or None for no dropout; threshold, keep_scale: its 32-bit limit and 1 / (1 - p).
        sum_dtype: dtype z is rounded to; keep_sum: whether z is returned.
        copy: contiguous tensor of another dtype that y is written to as well, or None.

    Returns:
        y (..., N) in out_dtype, z or None, fp32 statistics: mean and rstd (2, rows), for RMSNorm rstd (1, rows).
    """
    tensors = (as_rows(input)[0], in_rows(residual), weight, bias, row_scale, seed)
    numbers = (threshold, keep_scale, eps, offset, rms, sum_dtype, out_dtype, keep_sum)
    run = bind_forward(*tensors, *numbers, None if copy is None else copy.dtype)
    assert run is not None
    return run(*tensors, copy)


def bind_forward(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    row_scale: Tensor | None,
    seed: Tensor | None,
    *numbers: Any,
) -> Callable[..., tuple[Tensor, Tensor | None, Tensor]] | None:
    """`norm_forward` of tensors laid out like these, as a function of the tensors alone; None where it copies."""
    strides = tuple(0 if t is None else row_stride(t) for t in (input, residual))
    if None in strides:
        return None
    dtypes = tuple(None if t is None else t.dtype for t in (input, residual, weight, bias, row_scale))
    return _forward_of(
        target_of(input.device), input.device, input.shape, strides, dtypes, seed is not None, *numbers
    )  # fmt: skip


# What a call is made of beside its tensors is derived once for each kind. Keys are typed: 1 is not 1.0 to Triton.
# `copy_dtype` does nothing but tell kinds apart.
@functools.lru_cache(maxsize=1024, typed=True)
def _forward_of(
    aim: Target,
    device: torch.device,
    shape: torch.Size,
    strides: tuple[int, ...],
    dtypes: tuple[torch.dtype | None, ...],
    dropped: bool,
    threshold: int,
    keep_scale: float,
    eps: float,
    offset: float,
    rms: bool,
    sum_dtype: torch.dtype,
    out_dtype: torch.dtype,
    keep_sum: bool,
    copy_dtype: torch.dtype | None = None,
) -> Callable[..., tuple[Tensor, Tensor | None, Tensor]]:
    n, rows = shape[-1], math.prod(shape[:-1])
    numbers = (rows, *strides, threshold, keep_scale, eps, offset, n, rms, dropped, TL_DTYPES[sum_dtype])
    block_n = max(power_of_two(n), 16)
    if block_n > FORWARD_TILE_COLUMNS:
        options = shape_of_program(aim, LOOP_COLUMNS, 8, 128)
        bound = Bound(_forward_loop, (rows,), (*numbers, LOOP_COLUMNS, n), options)
    else:
        block_m = max(1, 1024 // block_n)
        each, registers = (8 if block_n <= 1024 else 16), (64 if block_n <= 8192 else 128)
        options = shape_of_program(aim, block_m * block_n, each, registers)
        bound = Bound(_forward_tile, (cdiv(rows, block_m),), (*numbers, block_m, block_n), options)

    new_y, new_z = (room_beside(shape, dtype, device, strides[0], dtypes[0]) for dtype in (out_dtype, sum_dtype))
    new_stats = room((1 if rms else 2, rows), torch.float32, device)

    def run(
        input: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        row_scale: Tensor | None,
        seed: Tensor | None,
        copy: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        y, z, stats = new_y(input), new_z(input) if keep_sum else None, new_stats()
        if rows:
            bound.launch(input, residual, row_scale, weight, bias, seed, z, y, copy, stats)
        return y, z, stats

    return run
