"""Gradients of LayerNorm and RMSNorm over rows, and of the dropout and residual addition in front of them.

    dz = rstd * (wdy - mean(wdy) - z_hat * mean(wdy * z_hat)) + gradient of z itself        wdy = dy * (weight + offset)

z_hat = (z - mean) * rstd, and for RMSNorm mean(wdy) is left out.

- Rows up to `TILE_COLUMNS` stay in registers: every input is read once, by a fixed number of programs that walk over
  the rows and keep the weight and bias gradients of theirs in registers.
- Wider rows are walked twice in column blocks; weight and bias gradients come from a pass of their own.
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
from fastformer.kernels.norm import LOOP_COLUMNS, affine
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
    walkers,
)
from fastformer.kernels.targets import Target, target_of

# Widest row kept in registers: 512 threads hold 16 elements of it each; dropout's generator takes the registers of
# half of them.
TILE_COLUMNS = 8192
DROPOUT_TILE_COLUMNS = 4096


@triton.jit
def _normalised(
    Z, DY, DY_MORE, STATS, rows, row, column, inside, z_stride, dy_stride, N: tl.constexpr, RMS: tl.constexpr
):
    """(z - mean) * rstd, dy and rstd of a tile, in fp32; 0 outside."""
    z = tl.load(Z + row[:, None] * z_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(DY + row[:, None] * dy_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if DY_MORE is not None:
        dy += tl.load(DY_MORE + row[:, None] * N + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if RMS:
        rstd = tl.load(STATS + row, mask=row < rows, other=0.0)
        z_hat = z * rstd[:, None]
    else:
        mean = tl.load(STATS + row, mask=row < rows, other=0.0)
        rstd = tl.load(STATS + rows + row, mask=row < rows, other=0.0)
        z_hat = (z - mean[:, None]) * rstd[:, None]
    return z_hat, dy, rstd


@triton.jit
def _store_gradients(
    dz, DZ_IN, DX, DR, S, seed, rows, row, first, column, inside, dz_stride, threshold, keep_scale,
    N: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add the gradient that reached z itself; store the gradients of residual and input."""
    place = row[:, None] * N + column[None, :]
    if DZ_IN is not None:
        dz += tl.load(DZ_IN + row[:, None] * dz_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if DR is not None:
        tl.store(DR + place, dz, mask=inside)
    if DX is not None:
        if S is not None:
            dz *= tl.load(S + row, mask=row < rows, other=0.0).to(tl.float32)[:, None]
        if DROPOUT:
            dz = tl.where(keep_columns(seed, first, row, 0, threshold, BLOCK_N), dz * keep_scale, 0.0)
        tl.store(DX + place, dz, mask=inside)


@triton.jit
def _store_partials(
    PARTIAL, dweight, dbias, program, programs, column, N: tl.constexpr, DWEIGHT: tl.constexpr, DBIAS: tl.constexpr
):
    """This program's row of each needed sum: PARTIAL is (sums, programs, N)."""
    place = program.to(tl.int64) * N + column
    if DWEIGHT:
        tl.store(PARTIAL + place, tl.sum(dweight, 0), mask=column < N)
        place += programs.to(tl.int64) * N
    if DBIAS:
        tl.store(PARTIAL + place, tl.sum(dbias, 0), mask=column < N)


@launcher
@triton.jit(do_not_specialize=["rows", "threshold"])
def _backward_tile(
    DY, DY_MORE, DZ_IN, Z, STATS, W, S, SEED, DX, DR, PARTIAL, rows, dy_stride, dz_stride, z_stride, threshold,
    keep_scale, offset, N: tl.constexpr, RMS: tl.constexpr, DROPOUT: tl.constexpr, DWEIGHT: tl.constexpr,
    DBIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Tiles of BLOCK_M whole rows, one in gridDim apart; dweight and dbias of all of them in one partial row."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, BLOCK_N)
    valid = column < N
    seed = tl.load(SEED) if DROPOUT else 0
    scale, _ = affine(W, None, column, valid, offset)
    dweight = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    dbias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for tile in tl.range(program, tl.cdiv(rows, BLOCK_M), programs, num_stages=STAGES):
        row = tl.cast(tile, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = (row < rows)[:, None] & valid[None, :]
        z_hat, dy, rstd = _normalised(Z, DY, DY_MORE, STATS, rows, row, column, inside, z_stride, dy_stride, N, RMS)
        if DWEIGHT:
            dweight += dy * z_hat
        if DBIAS:
            dbias += dy
        wdy = dy * scale
        dz = wdy - z_hat * (tl.sum(wdy * z_hat, 1) / N)[:, None]
        if not RMS:
            dz -= (tl.sum(wdy, 1) / N)[:, None]
        dz *= rstd[:, None]
        _store_gradients(
            dz, DZ_IN, DX, DR, S, seed, rows, row, 0, column, inside, dz_stride, threshold, keep_scale,
            N, DROPOUT, BLOCK_N,
        )  # fmt: skip
    _store_partials(PARTIAL, dweight, dbias, program, programs, column, N, DWEIGHT, DBIAS)


@launcher
@triton.jit(do_not_specialize=["rows", "threshold", "columns"])
def _backward_loop(
    DY, DY_MORE, DZ_IN, Z, STATS, W, S, SEED, DX, DR, rows, dy_stride, dz_stride, z_stride, threshold, keep_scale,
    offset, N: tl.constexpr, RMS: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_N: tl.constexpr, columns,
):  # fmt: skip
    """One row a program, walked twice: its two means, then its gradients; columns N once more, not known when
    compiling, as in `fastformer.kernels.norm`."""
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    seed = tl.load(SEED) if DROPOUT else 0
    product = tl.zeros([1, BLOCK_N], tl.float32)
    plain = tl.zeros([1, BLOCK_N], tl.float32)
    for first in range(0, columns, BLOCK_N):
        column = first + tl.arange(0, BLOCK_N)
        inside = (column < N)[None, :]
        z_hat, dy, _ = _normalised(Z, DY, DY_MORE, STATS, rows, row, column, inside, z_stride, dy_stride, N, RMS)
        scale, _ = affine(W, None, column, column < N, offset)
        product += dy * scale * z_hat
        plain += dy * scale
    product_mean = (tl.sum(product, 1) / N)[:, None]
    plain_mean = (tl.sum(plain, 1) / N)[:, None]
    for first in range(0, columns, BLOCK_N):
        column = first + tl.arange(0, BLOCK_N)
        inside = (column < N)[None, :]
        z_hat, dy, rstd = _normalised(Z, DY, DY_MORE, STATS, rows, row, column, inside, z_stride, dy_stride, N, RMS)
        scale, _ = affine(W, None, column, column < N, offset)
        dz = dy * scale - z_hat * product_mean
        if not RMS:
            dz -= plain_mean
        dz *= rstd[:, None]
        _store_gradients(
            dz, DZ_IN, DX, DR, S, seed, rows, row, first, column, inside, dz_stride, threshold, keep_scale,
            N, DROPOUT, BLOCK_N,
        )  # fmt: skip


@launcher
@triton.jit(do_not_specialize=["rows"])
def _backward_columns(
    DY, DY_MORE, Z, STATS, PARTIAL, rows, dy_stride, z_stride, N: tl.constexpr, RMS: tl.constexpr,
    DWEIGHT: tl.constexpr, DBIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dweight and dbias of wide rows: BLOCK_N columns a program of axis 0, every gridDim-th row tile of axis 1."""
    program, programs = tl.program_id(1), tl.num_programs(1)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    dweight = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    dbias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for tile in range(program, tl.cdiv(rows, BLOCK_M), programs):
        row = tl.cast(tile, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = (row < rows)[:, None] & (column < N)[None, :]
        z_hat, dy, _ = _normalised(Z, DY, DY_MORE, STATS, rows, row, column, inside, z_stride, dy_stride, N, RMS)
        if DWEIGHT:
            dweight += dy * z_hat
        if DBIAS:
            dbias += dy
    _store_partials(PARTIAL, dweight, dbias, program, programs, column, N, DWEIGHT, DBIAS)


def norm_backward(
    dy: Tensor,
    dz: Tensor | None,
    z: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    row_scale: Tensor | None,
    seed: Tensor | None,
    threshold: int,
    keep_scale: float,
    offset: float,
    rms: bool,
    input_dtype: torch.dtype | None,
    residual_dtype: torch.dtype | None,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
) -> list[Tensor]:
    """Launch the backward kernels.

    Args:
        dy: gradient of y; dz: gradient of the returned z, or None; z, stats: from forward; others as in forward.
        input_dtype, residual_dtype, weight_dtype, bias_dtype: dtype of that gradient, None where it is not needed.

    Returns:
        the gradients that are needed, in the order of those four arguments.
    """
    tensors = (as_rows(dy)[0], in_rows(dz), as_rows(z)[0], stats, weight, row_scale, seed)
    wanted = (input_dtype, residual_dtype, weight_dtype, bias_dtype)
    run = bind_backward(*tensors, threshold, keep_scale, offset, rms, *wanted)
    assert run is not None
    return [gradient for gradient in run(*tensors) if gradient is not None]


def norm_backward_rows(
    dy: Tensor, dz: Tensor | None, z: Tensor, *others: Any, dy_more: Tensor | None = None
) -> tuple[list[Tensor], Tensor | None]:
    """`norm_backward`, of the same arguments, that leaves the sums over rows to the caller.

    Args:
        dy_more: contiguous like y, of any dtype: what is to be added to dy first, or None.

    Returns:
        the gradients of input and residual that are needed, and fp32 (sums * P, N) partial rows of weight's and then
        bias's, P for each that is needed; None if neither is or z has no row.
    """
    tensors = (as_rows(dy)[0], in_rows(dz), as_rows(z)[0], *others[:4])
    run = bind_backward(*tensors, *others[4:], summed=False, more=None if dy_more is None else dy_more.dtype)
    assert run is not None
    dx, dr, partial = run(*tensors, dy_more)
    return [gradient for gradient in (dx, dr) if gradient is not None], partial


def bind_backward(
    dy: Tensor,
    dz: Tensor | None,
    z: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    row_scale: Tensor | None,
    seed: Tensor | None,
    threshold: int,
    keep_scale: float,
    offset: float,
    rms: bool,
    *wanted: torch.dtype | None,
    summed: bool = True,
    more: torch.dtype | None = None,
) -> Callable[..., tuple[Tensor | None, ...]] | None:
    """`norm_backward` of tensors laid out like these, as a function of the tensors alone that has a place for each
    gradient; None where it copies. Without `summed` the partial rows stand for weight's and bias's. `more` is the dtype
    of what the function is to add to dy, given behind the other tensors."""
    strides = tuple(0 if t is None else row_stride(t) for t in (dy, dz, z))
    if None in strides:
        return None
    dtypes = tuple(None if t is None else t.dtype for t in (dy, dz, z, weight, row_scale))
    return _backward_of(
        target_of(z.device), z.device, z.shape, strides, dtypes, threshold, keep_scale, offset, rms, seed is not None,
        wanted, summed, more,
    )  # fmt: skip


# `more` does nothing but tell kinds apart.
@functools.lru_cache(maxsize=1024, typed=True)
def _backward_of(
    aim: Target,
    device: torch.device,
    shape: torch.Size,
    strides: tuple[int, ...],
    dtypes: tuple[torch.dtype | None, ...],
    threshold: int,
    keep_scale: float,
    offset: float,
    rms: bool,
    dropped: bool,
    wanted: tuple[torch.dtype | None, ...],
    summed: bool,
    more: torch.dtype | None,
) -> Callable[..., tuple[Tensor | None, ...]]:
    n, rows = shape[-1], math.prod(shape[:-1])
    input_dtype, residual_dtype, weight_dtype, bias_dtype = wanted
    dweight, dbias = weight_dtype is not None, bias_dtype is not None
    sums = tuple(dtype for dtype in (weight_dtype, bias_dtype) if dtype is not None)
    block_n = max(power_of_two(n), 16)
    wide = block_n > (DROPOUT_TILE_COLUMNS if dropped else TILE_COLUMNS)
    block_m = 16 if wide else max(1, 2048 // block_n)
    programs = walkers(aim, cdiv(rows, block_m))
    numbers = (rows, *strides, threshold, keep_scale, offset, n, rms, dropped)
    columns = None
    if wide:
        options = shape_of_program(aim, LOOP_COLUMNS, 8, 128)
        walk = Bound(_backward_loop, (rows,), (*numbers, LOOP_COLUMNS, n), options)
        sides = (rows, strides[0], strides[2], n, rms, dweight, dbias, block_m, 128)
        columns = Bound(_backward_columns, (cdiv(n, 128), programs), sides, shape_of_program(aim, 2048, 16, 128))
    else:
        constants = (*numbers, dweight, dbias, block_m, block_n, 2 if block_n <= 4096 else 1)
        walk = Bound(_backward_tile, (programs,), constants, shape_of_program(aim, block_m * block_n, 8, 128))
    total = sum_partials(aim, device, len(sums) * programs, n, sums) if sums and summed else None
    new_dx, new_dr = (
        None if dtype is None else room_beside(shape, dtype, device, strides[2], dtypes[2])
        for dtype in (input_dtype, residual_dtype)
    )
    new_partial = room((len(sums) * programs, n), torch.float32, device)

    def run(
        dy: Tensor,
        dz: Tensor | None,
        z: Tensor,
        stats: Tensor,
        weight: Tensor | None,
        row_scale: Tensor | None,
        seed: Tensor | None,
        dy_more: Tensor | None = None,
    ) -> tuple[Tensor | None, ...]:
        dx = None if new_dx is None else new_dx(z)
        dr = None if new_dr is None else new_dr(z)
        if not rows and not summed:
            return dx, dr, None
        if not rows:
            empty = (None if dtype is None else torch.zeros(n, dtype=dtype, device=device) for dtype in wanted[2:])
            return dx, dr, *empty
        partial = new_partial() if sums else None
        if columns is None:
            walk.launch(dy, dy_more, dz, z, stats, weight, row_scale, seed, dx, dr, partial)
        else:
            walk.launch(dy, dy_more, dz, z, stats, weight, row_scale, seed, dx, dr)
            if partial is not None:
                columns.launch(dy, dy_more, z, stats, partial)
        if not summed:
            return dx, dr, partial
        if total is None or partial is None:
            return dx, dr, None, None
        found = total(partial)
        return dx, dr, found[0] if dweight else None, found[-1] if dbias else None

    return run
