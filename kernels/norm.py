"""LayerNorm and RMSNorm over rows, with the dropout and residual addition in front of them.

    z = residual + row_scale * dropout(input)        y = (z - mean) * rstd * (weight + offset) + bias

- Rows up to `FORWARD_TILE_COLUMNS` and `BACKWARD_TILE_COLUMNS` stay in registers: every input is read once, in
  backward too, where a fixed number of programs walks over the rows and keeps the weight and bias gradients of its
  rows in registers.
- Wider rows are walked in column blocks: statistics by merging (count, mean, M2) of blocks (Chan, Golub, LeVeque
  1979), the second walk finds the row in the L2 cache; weight and bias gradients come from a pass of their own.
- Everything is fp32 between load and store.
"""

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastformer.kernels.launch import Prepared, launcher
from fastformer.kernels.random import keep_columns
from fastformer.kernels.rows import (
    TL_DTYPES,
    as_rows,
    cdiv,
    power_of_two,
    room,
    room_like,
    row_count,
    shape_of_program,
    sum_partials,
    walkers,
)
from fastformer.kernels.targets import Target, target_of

# Widest row kept in registers: 512 threads hold 32 elements of it each in forward, 16 in backward, where dropout's
# generator takes the registers of half of them.
FORWARD_TILE_COLUMNS = 16384
BACKWARD_TILE_COLUMNS = 8192
BACKWARD_DROPOUT_COLUMNS = 4096
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
def _affine(W, B, column, valid, offset):
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
    X, R, S, W, B, SEED, Z, Y, STATS, rows, x_stride, r_stride, threshold, keep_scale, eps, offset,
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
    scale, shift = _affine(W, B, column, valid, offset)
    tl.store(Y + place, centred * rstd[:, None] * scale + shift, mask=inside)


@launcher
@triton.jit(do_not_specialize=["rows", "threshold", "columns"])
def _forward_loop(
    X, R, S, W, B, SEED, Z, Y, STATS, rows, x_stride, r_stride, threshold, keep_scale, eps, offset,
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
        scale, shift = _affine(W, B, column, valid, offset)
        y = (z - mean[:, None]) * rstd[:, None] * scale + shift
        tl.store(Y + row[:, None] * N + column[None, :], y, mask=valid[None, :])


@triton.jit
def _normalised(Z, DY, STATS, rows, row, column, inside, z_stride, dy_stride, RMS: tl.constexpr):
    """(z - mean) * rstd, dy and rstd of a tile, in fp32; 0 outside."""
    z = tl.load(Z + row[:, None] * z_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(DY + row[:, None] * dy_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
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
    DY, DZ_IN, Z, STATS, W, S, SEED, DX, DR, PARTIAL, rows, dy_stride, dz_stride, z_stride, threshold, keep_scale,
    offset, N: tl.constexpr, RMS: tl.constexpr, DROPOUT: tl.constexpr, DWEIGHT: tl.constexpr, DBIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Tiles of BLOCK_M whole rows, one in gridDim apart; dweight and dbias of all of them in one partial row."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, BLOCK_N)
    valid = column < N
    seed = tl.load(SEED) if DROPOUT else 0
    scale, _ = _affine(W, None, column, valid, offset)
    dweight = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    dbias = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for tile in tl.range(program, tl.cdiv(rows, BLOCK_M), programs, num_stages=STAGES):
        row = tl.cast(tile, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = (row < rows)[:, None] & valid[None, :]
        z_hat, dy, rstd = _normalised(Z, DY, STATS, rows, row, column, inside, z_stride, dy_stride, RMS)
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
    DY, DZ_IN, Z, STATS, W, S, SEED, DX, DR, rows, dy_stride, dz_stride, z_stride, threshold, keep_scale, offset,
    N: tl.constexpr, RMS: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_N: tl.constexpr, columns,
):  # fmt: skip
    """One row a program, walked twice: its two means, then its gradients; columns as in `_forward_loop`."""
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    seed = tl.load(SEED) if DROPOUT else 0
    product = tl.zeros([1, BLOCK_N], tl.float32)
    plain = tl.zeros([1, BLOCK_N], tl.float32)
    for first in range(0, columns, BLOCK_N):
        column = first + tl.arange(0, BLOCK_N)
        inside = (column < N)[None, :]
        z_hat, dy, _ = _normalised(Z, DY, STATS, rows, row, column, inside, z_stride, dy_stride, RMS)
        scale, _ = _affine(W, None, column, column < N, offset)
        product += dy * scale * z_hat
        plain += dy * scale
    product_mean = (tl.sum(product, 1) / N)[:, None]
    plain_mean = (tl.sum(plain, 1) / N)[:, None]
    for first in range(0, columns, BLOCK_N):
        column = first + tl.arange(0, BLOCK_N)
        inside = (column < N)[None, :]
        z_hat, dy, rstd = _normalised(Z, DY, STATS, rows, row, column, inside, z_stride, dy_stride, RMS)
        scale, _ = _affine(W, None, column, column < N, offset)
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
    DY, Z, STATS, PARTIAL, rows, dy_stride, z_stride, N: tl.constexpr, RMS: tl.constexpr,
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
        z_hat, dy, _ = _normalised(Z, DY, STATS, rows, row, column, inside, z_stride, dy_stride, RMS)
        if DWEIGHT:
            dweight += dy * z_hat
        if DBIAS:
            dbias += dy
    _store_partials(PARTIAL, dweight, dbias, program, programs, column, N, DWEIGHT, DBIAS)


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
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Launch the forward kernel.

    Args:
        input, residual: (..., N), N > 0; weight, bias: (N,) with unit stride; row_scale: contiguous, one a row.
        seed: (1,) int64, or None for no dropout; threshold, keep_scale: its 32-bit limit and 1 / (1 - p).
        sum_dtype: dtype z is rounded to; keep_sum: whether z is returned.

    Returns:
        y (..., N) in out_dtype, z or None, fp32 statistics: mean and rstd (2, rows), for RMSNorm rstd (1, rows).
    """
    n, rows, device = input.shape[-1], row_count(input), input.device
    x, x_stride = as_rows(input)
    r, r_stride = (None, 0) if residual is None else as_rows(residual)
    y = room_like(input, out_dtype)
    z = room_like(input, sum_dtype) if keep_sum else None
    stats = room(1 if rms else 2, rows, torch.float32, device)
    if rows:
        launch = _forward_launch(
            target_of(device), n, rows, x_stride, r_stride, threshold, keep_scale, eps, offset, rms, seed is not None,
            sum_dtype,
        )  # fmt: skip
        launch(x, r, row_scale, weight, bias, seed, z, y, stats)
    return y, z, stats


# What a launch is made of beside its tensors is derived once a kind of call. Keys are typed: 1 is not 1.0 to Triton.
@functools.lru_cache(maxsize=1024, typed=True)
def _forward_launch(
    aim: Target,
    n: int,
    rows: int,
    x_stride: int,
    r_stride: int,
    threshold: int,
    keep_scale: float,
    eps: float,
    offset: float,
    rms: bool,
    dropped: bool,
    sum_dtype: torch.dtype,
) -> Prepared:
    block_n = max(power_of_two(n), 16)
    numbers = (rows, x_stride, r_stride, threshold, keep_scale, eps, offset, n, rms, dropped, TL_DTYPES[sum_dtype])
    if block_n > FORWARD_TILE_COLUMNS:
        shape = shape_of_program(aim, LOOP_COLUMNS, 8, 128)
        return Prepared(_forward_loop, (rows,), (*numbers, LOOP_COLUMNS, n), shape)
    block_m = max(1, 1024 // block_n)
    each, registers = (8 if block_n <= 1024 else 16), (64 if block_n <= 8192 else 128)
    shape = shape_of_program(aim, block_m * block_n, each, registers)
    return Prepared(_forward_tile, (cdiv(rows, block_m),), (*numbers, block_m, block_n), shape)


def norm_backward_rows(
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
) -> tuple[list[Tensor], Tensor | None]:
    """Launch the backward kernels, and leave the sums over rows to the caller.

    Args:
        dy: gradient of y; dz: gradient of the returned z, or None; z, stats: from forward; others as in forward.
        input_dtype, residual_dtype, weight_dtype, bias_dtype: dtype of that gradient, None where it is not needed.

    Returns:
        the gradients of input and residual that are needed, and fp32 (sums * P, N) partial rows of weight's and then
        bias's, P for each that is needed; None if neither is or z has no row.
    """
    n, rows, device = z.shape[-1], row_count(z), z.device
    sums = (weight_dtype is not None) + (bias_dtype is not None)
    gradients = []
    dx = dr = partial = dz_rows = None
    if input_dtype is not None:
        dx = room_like(z, input_dtype)
        gradients.append(dx)
    if residual_dtype is not None:
        dr = room_like(z, residual_dtype)
        gradients.append(dr)
    if not rows:
        return gradients, None
    dy_rows, dy_stride = as_rows(dy)
    z_rows, z_stride = as_rows(z)
    dz_stride = 0
    if dz is not None:
        dz_rows, dz_stride = as_rows(dz)
    programs, walk, columns = _backward_launches(
        target_of(device), n, rows, dy_stride, dz_stride, z_stride, threshold, keep_scale, offset, rms,
        seed is not None, weight_dtype is not None, bias_dtype is not None,
    )  # fmt: skip
    if sums:
        partial = room(sums * programs, n, torch.float32, device)
    if columns is None:
        walk(dy_rows, dz_rows, z_rows, stats, weight, row_scale, seed, dx, dr, partial)
    else:
        walk(dy_rows, dz_rows, z_rows, stats, weight, row_scale, seed, dx, dr)
        if partial is not None:
            columns(dy_rows, z_rows, stats, partial)
    return gradients, partial


def norm_backward(*arguments: Any) -> list[Tensor]:
    """Launch the backward kernels; arguments as `norm_backward_rows`.

    Returns:
        the gradients that are needed, in the order of the last four arguments.
    """
    gradients, partial = norm_backward_rows(*arguments)
    dtypes = [dtype for dtype in arguments[-2:] if dtype is not None]
    if partial is not None:
        return gradients + sum_partials(partial, dtypes)
    z = arguments[2]
    return gradients + [torch.zeros(z.shape[-1], dtype=dtype, device=z.device) for dtype in dtypes]


@functools.lru_cache(maxsize=1024, typed=True)
def _backward_launches(
    aim: Target,
    n: int,
    rows: int,
    dy_stride: int,
    dz_stride: int,
    z_stride: int,
    threshold: int,
    keep_scale: float,
    offset: float,
    rms: bool,
    dropped: bool,
    dweight: bool,
    dbias: bool,
) -> tuple[int, Prepared, Prepared | None]:
    """Partial rows, the launch over rows, and for wide rows the one over columns."""
    block_n = max(power_of_two(n), 16)
    wide = block_n > (BACKWARD_DROPOUT_COLUMNS if dropped else BACKWARD_TILE_COLUMNS)
    block_m = 16 if wide else max(1, 2048 // block_n)
    programs = walkers(aim, cdiv(rows, block_m))
    numbers = (rows, dy_stride, dz_stride, z_stride, threshold, keep_scale, offset, n, rms, dropped)
    if wide:
        walk = Prepared(
            _backward_loop, (rows,), (*numbers, LOOP_COLUMNS, n), shape_of_program(aim, LOOP_COLUMNS, 8, 128)
        )
        sums = (rows, dy_stride, z_stride, n, rms, dweight, dbias, block_m, 128)
        return (
            programs,
            walk,
            Prepared(_backward_columns, (cdiv(n, 128), programs), sums, shape_of_program(aim, 2048, 16, 128)),
        )
    constants = (dweight, dbias, block_m, block_n, 2 if block_n <= 4096 else 1)
    shape = shape_of_program(aim, block_m * block_n, 8, 128)
    return programs, Prepared(_backward_tile, (programs,), (*numbers, *constants), shape), None
