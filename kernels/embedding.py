"""Sum of table rows, LayerNorm and dropout: what a BERT-class model does before its first layer.

    z = word[ids] + position[place] + token_type[types]        y = dropout((z - mean) * rstd * weight + bias)

One read of each table row and one write of y (and of z where a backward follows). The backward is that of dropout and
of the norm; the gradient of z then goes to PyTorch's own embedding backward, which sorts and so is deterministic.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastformer.kernels.launch import launcher
from fastformer.kernels.norm import FORWARD_TILE_COLUMNS as MAXIMUM_WIDTH
from fastformer.kernels.random import keep_columns
from fastformer.kernels.rows import TL_DTYPES, cdiv, power_of_two, shape_of_program, target

__all__ = ["MAXIMUM_WIDTH", "embed_forward", "number_tokens"]


@triton.jit
def _gather(TABLE, index, size, column, inside, N: tl.constexpr):
    """Rows of a (size, N) table in fp32; NaN for an index the table does not have."""
    known = (index >= 0) & (index < size)
    rows = tl.load(
        TABLE + index.to(tl.int64)[:, None] * N + column[None, :], mask=inside & known[:, None], other=float("nan")
    )
    return rows.to(tl.float32)


@launcher
@triton.jit(do_not_specialize=["rows", "S", "words", "positions", "types", "threshold"])
def _embed(
    IDS, PLACE, TYPES, WORD, POSITION, TYPE, W, B, SEED, Z, Y, STATS,
    rows, S, words, positions, types, threshold, keep_scale, eps,
    N: tl.constexpr, DROPOUT: tl.constexpr, Z_DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_M tokens a program."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    inside = (row < rows)[:, None] & (column < N)[None, :]
    z = _gather(WORD, tl.load(IDS + row, mask=row < rows, other=0), words, column, inside, N)  # [BLOCK_M, BLOCK_N]
    if POSITION is not None:
        place = row % S
        if PLACE is not None:
            place = tl.load(PLACE + row, mask=row < rows, other=0)
        z += _gather(POSITION, place, positions, column, inside, N)
    if TYPE is not None:
        kind = row * 0
        if TYPES is not None:
            kind = tl.load(TYPES + row, mask=row < rows, other=0)
        z += _gather(TYPE, kind, types, column, inside, N)
    z = tl.where(inside, z, 0.0).to(Z_DTYPE).to(tl.float32)
    spot = row[:, None] * N + column[None, :]
    if Z is not None:
        tl.store(Z + spot, z, mask=inside)
    mean = tl.sum(z, 1) / N
    centred = tl.where(inside, z - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / N + eps)
    tl.store(STATS + row, mean, mask=row < rows)
    tl.store(STATS + rows + row, rstd, mask=row < rows)
    y = centred * rstd[:, None]
    if W is not None:
        y *= tl.load(W + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    if B is not None:
        y += tl.load(B + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    if DROPOUT:
        y = tl.where(keep_columns(tl.load(SEED), 0, row, 0, threshold, BLOCK_N), y * keep_scale, 0.0)
    tl.store(Y + spot, y, mask=inside)


def embed_forward(
    ids: Tensor,
    place: Tensor | None,
    types: Tensor | None,
    word: Tensor,
    position: Tensor | None,
    token_type: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    threshold: int,
    keep_scale: float,
    eps: float,
    out_dtype: torch.dtype,
    keep_sum: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Launch the kernel.

    Args:
        ids, place, types: (..., S) contiguous integers; place None: 0 … S - 1; types None: 0.
        word, position, token_type: (rows, N) contiguous tables of one dtype, N at most `MAXIMUM_WIDTH`.
        weight, bias: (N,) contiguous; the rest as in `fastformer.kernels.norm.norm_forward`.

    Returns:
        y (..., S, N) in out_dtype, z in word's dtype or None, mean and rstd (2, tokens) fp32.
    """
    n, rows, device = word.shape[1], ids.numel(), ids.device
    y = torch.empty((*ids.shape, n), dtype=out_dtype, device=device)
    z = torch.empty((*ids.shape, n), dtype=word.dtype, device=device) if keep_sum else None
    stats = torch.empty((2, rows), dtype=torch.float32, device=device)
    if rows:
        block_n = max(power_of_two(n), 16)
        block_m = max(1, 1024 // block_n)
        each, registers = (8 if block_n <= 1024 else 16), (64 if block_n <= 8192 else 128)
        sizes = (0 if table is None else table.shape[0] for table in (word, position, token_type))
        _embed[(cdiv(rows, block_m),)](
            ids, place, types, word, position, token_type, weight, bias, seed, z, y, stats,
            rows, ids.shape[-1], *sizes, threshold, keep_scale, eps,
            n, seed is not None, TL_DTYPES[word.dtype], block_m, block_n,
            **shape_of_program(target(ids), block_m * block_n, each, registers),
        )  # fmt: skip
    return y, z, stats


@launcher
@triton.jit(do_not_specialize=["S", "padding"])
def _number(IDS, PLACE, S, padding, BLOCK: tl.constexpr):
    """One sequence a program, walked once."""
    row = tl.program_id(0).to(tl.int64) * S
    count = 0
    for start in range(0, S, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < S
        real = (inside & (tl.load(IDS + row + column, mask=inside, other=0) != padding)).to(tl.int32)
        place = (count + tl.cumsum(real, 0)) * real + padding
        tl.store(PLACE + row + column, place, mask=inside)
        count += tl.sum(real, 0)


def number_tokens(ids: Tensor, padding: int) -> Tensor:
    """RoBERTa's positions: padding + 1, padding + 2, … at a sequence's tokens that are not `padding`, else `padding`.

    Args:
        ids: (B, S) contiguous integers.

    Returns:
        (B, S) int64.
    """
    place = torch.empty_like(ids, dtype=torch.int64)
    if ids.numel():
        block = min(max(power_of_two(ids.shape[1]), 16), 1024)
        options = shape_of_program(target(ids), block, 4, 64)
        _number[(ids.shape[0],)](ids, place, ids.shape[1], padding, block, **options)
    return place
