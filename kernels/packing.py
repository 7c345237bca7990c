"""Removing padding: what a mask says, where packed tokens come from, and moving rows there and back.

Three small kernels in place of about twenty of PyTorch's, for every batch of every step. Rows are moved by a map from
places to rows, so that both directions are reads: no place is written twice, and none needs to be zeroed first.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastformer.kernels.launch import launcher
from fastformer.kernels.rows import as_rows, cdiv, power_of_two

# Sequences whose lengths a program of `places` holds at once.
MOST_SEQUENCES = 4096
_BLOCK = 1024


@launcher
@triton.jit(do_not_specialize=["seqlen"])
def _facts(MASK, FACTS, seqlen, row_stride, column_stride, BLOCK: tl.constexpr):
    """Of one sequence: real tokens, whether the first place is one, and how often a run begins after it."""
    row = tl.program_id(0).to(tl.int64)
    MASK += row * row_stride
    count = tl.zeros([BLOCK], tl.int32)
    rises = tl.zeros([BLOCK], tl.int32)
    for first in range(0, seqlen, BLOCK):
        place = first + tl.arange(0, BLOCK)
        real = tl.load(MASK + place.to(tl.int64) * column_stride, mask=place < seqlen, other=0) != 0
        before = tl.load(MASK + (place.to(tl.int64) - 1) * column_stride, mask=(place > 0) & (place < seqlen), other=0)
        count += real.to(tl.int32)
        rises += (real & (before == 0) & (place > 0)).to(tl.int32)
    start = tl.load(MASK) != 0
    tl.store(FACTS + row * 3, tl.sum(count, 0).to(tl.int64))
    tl.store(FACTS + row * 3 + 1, start.to(tl.int64))
    tl.store(FACTS + row * 3 + 2, tl.sum(rises, 0).to(tl.int64))


@launcher
@triton.jit(do_not_specialize=["batch", "seqlen", "rows"])
def _places(
    MASK, FACTS, INDICES, INVERSE, BOUNDARIES, POSITIONS, batch, seqlen, rows, row_stride, column_stride,
    BLOCK: tl.constexpr, SEQUENCES: tl.constexpr,
):  # fmt: skip
    """Where the tokens of one sequence come from and go to; the last program also zeroes surplus positions."""
    row = tl.program_id(0)
    sequence = tl.arange(0, SEQUENCES)
    lengths = tl.load(FACTS + sequence * 3, mask=sequence < batch, other=0).to(tl.int32)
    start = tl.sum(tl.where(sequence < row, lengths, 0), 0)
    tl.store(BOUNDARIES + row, start)
    MASK += row.to(tl.int64) * row_stride
    far = row.to(tl.int64) * seqlen
    for first in range(0, seqlen, BLOCK):
        place = first + tl.arange(0, BLOCK)
        inside = place < seqlen
        real = tl.load(MASK + place.to(tl.int64) * column_stride, mask=inside, other=0) != 0
        token = start + tl.cumsum(real.to(tl.int32), 0) - 1
        tl.store(INDICES + token, far + place, mask=real)
        tl.store(POSITIONS + token, place.to(tl.int64), mask=real)
        tl.store(INVERSE + far + place, tl.where(real, token, -1).to(tl.int64), mask=inside)
        start += tl.sum(real.to(tl.int32), 0)
    if row == batch - 1:
        tl.store(BOUNDARIES + batch, start)
        for first in range(start, rows, BLOCK):
            place = first + tl.arange(0, BLOCK)
            tl.store(POSITIONS + place, tl.zeros([BLOCK], tl.int64), mask=place < rows)


@launcher
@triton.jit(do_not_specialize=["rows", "known"])
def _move(X, MAP, Y, rows, known, x_stride, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Y[r] = X[MAP[r]], or 0 where the map has no r or says -1."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    source = tl.load(MAP + row, mask=row < known, other=-1)
    there = (source >= 0)[:, None] & (column < N)[None, :]
    value = tl.load(X + source[:, None] * x_stride + column[None, :], mask=there, other=0)
    tl.store(Y + row[:, None] * N + column[None, :], value, mask=(row < rows)[:, None] & (column < N)[None, :])


def mask_facts(mask: Tensor) -> Tensor:
    """Launch the first kernel: int64 (batch, 3) of a (batch, seqlen) mask, any strides, batch and seqlen above 0."""
    mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    facts = torch.empty((mask.shape[0], 3), dtype=torch.int64, device=mask.device)
    block = min(power_of_two(mask.shape[1]), _BLOCK)
    _facts[(mask.shape[0],)](mask, facts, mask.shape[1], *mask.stride(), block, num_warps=4)
    return facts


def mask_places(mask: Tensor, facts: Tensor, tokens: int, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the second kernel.

    Args:
        mask: as for `mask_facts`, at most `MOST_SEQUENCES` sequences; facts: what that gave.
        tokens: real ones among mask's places; rows: of a packed tensor, at least tokens.

    Returns:
        place of every token, int64 (tokens,); token of every place or -1, int64 (batch * seqlen,); int32 (batch + 1,)
        boundaries; place of every row's token in its own sequence, 0 of surplus rows, int64 (1, rows).
    """
    batch, seqlen = mask.shape
    mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    indices, inverse, positions = (
        torch.empty(shape, dtype=torch.int64, device=mask.device) for shape in (tokens, batch * seqlen, (1, rows))
    )
    boundaries = torch.empty(batch + 1, dtype=torch.int32, device=mask.device)
    block = min(power_of_two(seqlen), _BLOCK)
    _places[(batch,)](
        mask, facts, indices, inverse, boundaries, positions, batch, seqlen, rows, *mask.stride(),
        block, max(16, power_of_two(batch)), num_warps=4,
    )  # fmt: skip
    return indices, inverse, boundaries, positions


def move_rows(source: Tensor, places: Tensor, rows: int) -> Tensor:
    """Launch the third kernel.

    Args:
        source: (M, ...), every dimension above 0.
        places: int64, contiguous, at most rows of them, each a row of source or -1.

    Returns:
        (rows, ...): row r is `source[places[r]]`, and 0 where places has no r or says -1.
    """
    flat, stride = as_rows(source.reshape(source.shape[0], -1))
    n = flat.shape[1]
    out = torch.empty((rows, *source.shape[1:]), dtype=source.dtype, device=source.device)
    block_n = min(power_of_two(n), _BLOCK)
    block_m = _BLOCK // block_n
    if rows:
        grid = (cdiv(rows, block_m), cdiv(n, block_n))
        _move[grid](flat, places, out, rows, places.shape[0], stride, n, block_m, block_n, num_warps=4)
    return out
