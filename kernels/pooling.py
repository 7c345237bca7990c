"""Mean over the tokens of each packed sequence.

One program sums BLOCK_N columns of one sequence; backward hands each token its sequence's gradient over the count.
Nothing is gathered or padded, and tokens that belong to no sequence get gradient 0.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastformer.kernels.launch import launcher
from fastformer.kernels.rows import as_rows, cdiv, shape_of_program, target

BLOCK_M, BLOCK_N = 32, 64


@triton.jit
def _tokens(MASK, start, stop, BLOCK_M: tl.constexpr):
    """BLOCK_M tokens from `start`, and which of them count."""
    token = tl.cast(start, tl.int64) + tl.arange(0, BLOCK_M)
    counts = token < stop
    if MASK is not None:
        counts &= tl.load(MASK + token, mask=counts, other=0) != 0
    return token, counts


@launcher
@triton.jit
def _mean(X, CU, MASK, Y, COUNT, x_stride, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    sequence = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    start, stop = tl.load(CU + sequence), tl.load(CU + sequence + 1)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    count = tl.zeros([BLOCK_M], tl.int32)
    for first in range(start, stop, BLOCK_M):
        token, counts = _tokens(MASK, first, stop, BLOCK_M)
        inside = counts[:, None] & (column < N)[None, :]
        total += tl.load(X + token[:, None] * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        count += counts.to(tl.int32)
    # A sequence without tokens has mean 0.
    size = tl.maximum(tl.sum(count, 0), 1).to(tl.float32)
    tl.store(Y + sequence * N + column, tl.sum(total, 0) / size, mask=column < N)
    if tl.program_id(1) == 0:
        tl.store(COUNT + sequence, size)


@launcher
@triton.jit
def _mean_backward(
    DY, CU, MASK, COUNT, DX, dy_stride, N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    start, stop = tl.load(CU + sequence), tl.load(CU + sequence + 1)
    dy = tl.load(DY + sequence * dy_stride + column, mask=column < N, other=0.0).to(tl.float32)
    share = (dy / tl.load(COUNT + sequence))[None, :]
    for first in range(start, stop, BLOCK_M):
        token, counts = _tokens(MASK, first, stop, BLOCK_M)
        spot = DX + token[:, None] * N + column[None, :]
        tl.store(spot, tl.where(counts[:, None], share, 0.0), mask=(token < stop)[:, None] & (column < N)[None, :])


def mean_forward(input: Tensor, cu_seqlens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel.

    Args:
        input: (T, N), any row stride; cu_seqlens: (B + 1,) contiguous integers; mask: (T,) contiguous bool or None.

    Returns:
        (B, N) means in input's dtype, (B,) fp32 counts, at least 1.
    """
    sequences, n = cu_seqlens.shape[0] - 1, input.shape[1]
    y = torch.empty((sequences, n), dtype=input.dtype, device=input.device)
    count = torch.empty(sequences, dtype=torch.float32, device=input.device)
    if y.numel():
        x, stride = as_rows(input)
        _mean[(sequences, cdiv(n, BLOCK_N))](
            x, cu_seqlens, _bytes(mask), y, count, stride, n, BLOCK_M, BLOCK_N,
            **shape_of_program(target(input), BLOCK_M * BLOCK_N, 16, 128),
        )  # fmt: skip
    return y, count


def mean_backward(dy: Tensor, cu_seqlens: Tensor, mask: Tensor | None, count: Tensor, tokens: int) -> Tensor:
    """Launch the backward kernel: (B, N) gradients of the means to (T, N) gradients of the tokens."""
    sequences, n = dy.shape
    dx = torch.zeros((tokens, n), dtype=dy.dtype, device=dy.device)
    if dx.numel() and sequences:
        dy, stride = as_rows(dy)
        _mean_backward[(sequences, cdiv(n, BLOCK_N))](
            dy, cu_seqlens, _bytes(mask), count, dx, stride, n, BLOCK_M, BLOCK_N,
            **shape_of_program(target(dy), BLOCK_M * BLOCK_N, 16, 128),
        )  # fmt: skip
    return dx


def _bytes(mask: Tensor | None) -> Tensor | None:
    """A bool tensor as bytes, which every Triton loads alike."""
    return None if mask is None else mask.view(torch.uint8)
