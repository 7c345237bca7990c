"""The parameter gradients of a few linear layers and norms in one launch.

    dW_i = dY_i^T X_i        db_i = 1^T dY_i        and sums of fp32 partial rows, which norms leave behind

- A small model's weight gradients are few tiles each: at width 768, tiles of 128 x 128 fill 36 to 144 of an H100's 132
  multiprocessors, so four products one after another take six waves where their tiles together take four. Beside the
  launches this saves, that is why they run together.
- A program forms one tile of one product, over all rows, or the sum of a block of columns, over all rows, always in
  the same order: no atomics, the same bits on every run. Sums come first, beside the first wave of products.
- Factors are fp16 or bf16, accumulation is fp32, results any dtype. fp32 products are PyTorch's business; the sums
  beside them are not.
"""

import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastformer.kernels.launch import Prepared, launcher
from fastformer.kernels.rows import cdiv
from fastformer.kernels.targets import Target, target_of

MOST = 4  # products, and sums of gradients, in a launch
MOST_PARTIAL = 2  # pairs of partial sums
_BLOCK = 128
# Rows and columns that a sum takes at a time: beside products whole lines of memory; alone narrow columns, so that
# there are programs for all multiprocessors.
_SUM_BESIDE, _SUM_ALONE = (64, 128), (256, 32)


@triton.jit
def chosen(index, first, second, third, fourth):
    """One of four numbers or pointers of one type, which keeps what all of them are divisible by."""
    return tl.where(index == 0, first, tl.where(index == 1, second, tl.where(index == 2, third, fourth)))


@triton.jit
def _run_of(program, end_0, end_1, end_2):
    """(index, first): which of four runs of programs a program belongs to, and where that run begins."""
    index = (program >= end_0).to(tl.int32) + (program >= end_1).to(tl.int32) + (program >= end_2).to(tl.int32)
    return index, chosen(index, 0, end_0, end_1, end_2)


@triton.jit
def _sum_columns(X, Y, rows, stride, columns, block, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Y[c] = sum_r X[r, c] of one block of columns."""
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        total += tl.load(X + row.to(tl.int64)[:, None] * stride + column[None, :], mask=inside, other=0.0).to(
            tl.float32
        )
    tl.store(Y + column, tl.sum(total, 0).to(Y.dtype.element_ty), mask=column < columns)


@triton.jit
def _product(
    DY, X, DW, rows, dy_stride, x_stride, n_end, k_end, tile,
    BLOCK: tl.constexpr, BLOCK_T: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of dW = dY^T X, tiles of one block of rows side by side."""
    blocks = tl.cdiv(k_end, BLOCK)
    n = tile // blocks * BLOCK + tl.arange(0, BLOCK)
    k = tile % blocks * BLOCK + tl.arange(0, BLOCK)
    t = tl.arange(0, BLOCK_T)
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in tl.range(0, rows, BLOCK_T, num_stages=STAGES):
        far = tl.cast(start, tl.int64)
        inside = (start + t < rows)[:, None]
        dy = tl.load(
            DY + far * dy_stride + (t[:, None] * dy_stride + n[None, :]), mask=inside & (n < n_end)[None, :], other=0.0
        )  # [BLOCK_T, BLOCK]
        x = tl.load(
            X + far * x_stride + (t[:, None] * x_stride + k[None, :]), mask=inside & (k < k_end)[None, :], other=0.0
        )  # [BLOCK_T, BLOCK]
        total = tl.dot(tl.trans(dy), x, total)
    place = n.to(tl.int64)[:, None] * k_end + k[None, :]
    tl.store(DW + place, total.to(DW.dtype.element_ty), mask=(n < n_end)[:, None] & (k < k_end)[None, :])


# Boundaries of runs of programs and numbers of rows: whatever they are divisible by, nothing is aligned by them.
_COUNTS = ["rows", "partial_rows_0", "partial_rows_1", "partial_end"]
_COUNTS += [f"{run}_end_{i}" for run, ends in (("sum", 4), ("tile", 3)) for i in range(ends)]


@launcher
@triton.jit(do_not_specialize=_COUNTS)
def _gradients(
    DY_0, DY_1, DY_2, DY_3, X_0, X_1, X_2, X_3, DW_0, DW_1, DW_2, DW_3, S_0, S_1, S_2, S_3, DB_0, DB_1, DB_2, DB_3,
    P_0, P_1, A_0, B_0, A_1, B_1,
    rows, dy_stride_0, dy_stride_1, dy_stride_2, dy_stride_3, x_stride_0, x_stride_1, x_stride_2, x_stride_3,
    n_0, n_1, n_2, n_3, k_0, k_1, k_2, k_3, s_stride_0, s_stride_1, s_stride_2, s_stride_3, c_0, c_1, c_2, c_3,
    partial_rows_0, partial_rows_1, partial_columns, sum_end_0, sum_end_1, sum_end_2, sum_end_3, partial_end,
    tile_end_0, tile_end_1, tile_end_2,
    BLOCK: tl.constexpr, BLOCK_T: tl.constexpr, SUM_ROWS: tl.constexpr, SUM_COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Programs: blocks of columns of up to four sums, then of four partial sums, then tiles of up to four products."""
    program = tl.program_id(0)
    if program < sum_end_3:
        if S_0 is not None:
            index, first = _run_of(program, sum_end_0, sum_end_1, sum_end_2)
            _sum_columns(
                chosen(index, S_0, S_1, S_2, S_3), chosen(index, DB_0, DB_1, DB_2, DB_3), rows,
                chosen(index, s_stride_0, s_stride_1, s_stride_2, s_stride_3), chosen(index, c_0, c_1, c_2, c_3),
                program - first, SUM_ROWS, SUM_COLUMNS,
            )  # fmt: skip
    elif program < partial_end:
        if P_0 is not None:
            blocks = tl.cdiv(partial_columns, SUM_COLUMNS)
            index = (program - sum_end_3) // blocks
            count = tl.where(index < 2, partial_rows_0, partial_rows_1)
            # The rows of a pair's second sum lie behind those of its first.
            skip = tl.cast(index % 2, tl.int64) * count * partial_columns
            _sum_columns(
                tl.where(index < 2, P_0, P_1) + skip, chosen(index, A_0, B_0, A_1, B_1), count, partial_columns,
                partial_columns, (program - sum_end_3) % blocks, SUM_ROWS, SUM_COLUMNS,
            )  # fmt: skip
    else:
        if X_0 is not None:
            program -= partial_end
            index, first = _run_of(program, tile_end_0, tile_end_1, tile_end_2)
            _product(
                chosen(index, DY_0, DY_1, DY_2, DY_3), chosen(index, X_0, X_1, X_2, X_3),
                chosen(index, DW_0, DW_1, DW_2, DW_3), rows,
                chosen(index, dy_stride_0, dy_stride_1, dy_stride_2, dy_stride_3),
                chosen(index, x_stride_0, x_stride_1, x_stride_2, x_stride_3),
                chosen(index, n_0, n_1, n_2, n_3), chosen(index, k_0, k_1, k_2, k_3), program - first,
                BLOCK, BLOCK_T, STAGES,
            )  # fmt: skip


def parameter_gradients(
    products: Sequence[tuple[Tensor, Tensor, Tensor]],
    sums: Sequence[tuple[Tensor, Tensor]],
    partials: Sequence[tuple[Tensor, Tensor, Tensor]],
) -> None:
    """Launch once for all; nothing to do is no launch.

    Args:
        products: (dY, X, dW), up to `MOST`: (T, N), (T, K), contiguous (N, K) that is written.
        sums: (dY, db), up to `MOST`: (T, N) and contiguous (N,) that is written.
        partials: (P, first, second), up to `MOST_PARTIAL`: contiguous fp32 (2 * R, C), contiguous (C,) twice, written
            with the sum of the first R rows and of the others.

    dY and X: one dtype, fp16 or bf16 if there are products, unit stride in the last dimension, T the same and not 0.
    dW: one dtype, db likewise. first and second: one dtype; C the same in all partials.
    """
    if not (products or sums or partials):
        return
    source = (products or sums or partials)[0][0]
    launch = _launch(
        target_of(source.device),
        source.shape[0] if products or sums else 0,
        tuple((dy.stride(0), x.stride(0), dy.shape[1], x.shape[1]) for dy, x, _ in products),
        tuple((dy.stride(0), dy.shape[1]) for dy, _ in sums),
        tuple((partial.shape[0] // 2, partial.shape[1]) for partial, _, _ in partials),
    )
    launch(
        *_four(dy for dy, _, _ in products), *_four(x for _, x, _ in products), *_four(dw for _, _, dw in products),
        *_four(dy for dy, _ in sums), *_four(db for _, db in sums),
        *_four(partial for partial, _, _ in partials)[:MOST_PARTIAL],
        *_four(out for _, *both in partials for out in both),
    )  # fmt: skip


def waves(device: torch.device, sizes: Sequence[tuple[int, int]]) -> float:
    """How often the tiles of products of these sizes (N, K) would fill the device."""
    return sum(_tiles(n, k) for n, k in sizes) / target_of(device).multiprocessors


def _tiles(n: int, k: int) -> int:
    return cdiv(n, _BLOCK) * cdiv(k, _BLOCK)


def _four(given: Iterable[Any], nothing: Any = None) -> list[Any]:
    """What is given, the last of it repeated up to four; `nothing` four times if nothing is given."""
    found = list(given)
    return found + [found[-1] if found else nothing] * (MOST - len(found))


# What a launch is made of beside its tensors is derived once a kind of call.
@functools.lru_cache(maxsize=1024)
def _launch(
    aim: Target,
    rows: int,
    products: tuple[tuple[int, int, int, int], ...],
    sums: tuple[tuple[int, int], ...],
    partials: tuple[tuple[int, int], ...],
) -> Prepared:
    dy_strides, x_strides, n, k = zip(*_four(products, (0, 0, 0, 0)), strict=True)
    s_strides, columns = zip(*_four(sums, (0, 0)), strict=True)
    counts = [count for count, _ in _four(partials, (0, 0))[:MOST_PARTIAL]]
    partial_columns = partials[0][1] if partials else 0
    sum_rows, sum_columns = _SUM_BESIDE if products else _SUM_ALONE
    sum_ends = _four(itertools.accumulate(cdiv(c, sum_columns) for _, c in sums), 0)
    partial_end = sum_ends[-1] + 2 * len(partials) * cdiv(partial_columns, sum_columns)
    tile_ends = _four(itertools.accumulate(_tiles(*sizes) for _, _, *sizes in products), 0)
    # A stage holds BLOCK_T rows of both factors, 256 bytes each.
    block_t, stages = (32, 2) if aim.shared_memory <= 65536 else (64, 3)
    options = {"num_warps": 8}
    if aim.backend == "cuda":
        # Two programs a multiprocessor where factors need not pass through registers.
        options["maxnreg"] = 128 if aim.name in ("sm_90", "sm_100") else 255
    numbers = (
        rows, *dy_strides, *x_strides, *n, *k, *s_strides, *columns, *counts, partial_columns, *sum_ends, partial_end,
        *tile_ends[:-1], _BLOCK, block_t, sum_rows, sum_columns, stages,
    )  # fmt: skip
    return Prepared(_gradients, (partial_end + tile_ends[-1],), numbers, options)
