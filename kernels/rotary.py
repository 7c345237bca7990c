"""Rotary position embedding of queries and keys in one launch.

Pair i of a head's first R dimensions turns by the angle of its token's position: with (a, b) the pair,

    (a, b) -> (a cos - b sin, b cos + a sin)

where the pair is (x_i, x_{i + R/2}) ("half", GPT-NeoX, Llama) or (x_{2i}, x_{2i+1}) ("interleaved", GPT-J, RoFormer).
Dimensions from R on are copied. Backward turns by the negative angle. Su et al. 2021, "RoFormer".
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastformer.kernels.launch import Prepared, launcher
from fastformer.kernels.rows import cdiv, power_of_two, shape_of_program
from fastformer.kernels.targets import Target, target_of


@triton.jit
def _turn_heads(
    X, Y, x_b, x_s, x_h, x_d, y_b, y_s, y_h, batch, token, first_head, cos, sin, heads,
    D: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Turn BLOCK_H heads of one token, in place where Y is None; y's last dimension has unit stride otherwise."""
    head = first_head + tl.arange(0, BLOCK_H)
    pair = tl.arange(0, BLOCK_R)
    first = pair * 2 if INTERLEAVED else pair
    second = first + (1 if INTERLEAVED else R // 2)
    x = X + batch * x_b + token * x_s + head.to(tl.int64)[:, None] * x_h
    inside = (head < heads)[:, None] & (pair < R // 2)[None, :]  # [BLOCK_H, BLOCK_R]
    a = tl.load(x + first[None, :] * x_d, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x + second[None, :] * x_d, mask=inside, other=0.0).to(tl.float32)
    if Y is None:
        # Several threads may hold one element: none stores before all have loaded.
        tl.debug_barrier()
        tl.store(x + first[None, :] * x_d, a * cos[None, :] - b * sin[None, :], mask=inside)
        tl.store(x + second[None, :] * x_d, b * cos[None, :] + a * sin[None, :], mask=inside)
    else:
        y = Y + batch * y_b + token * y_s + head.to(tl.int64)[:, None] * y_h
        tl.store(y + first[None, :], a * cos[None, :] - b * sin[None, :], mask=inside)
        tl.store(y + second[None, :], b * cos[None, :] + a * sin[None, :], mask=inside)
        if R < D:
            column = R + tl.arange(0, BLOCK_D)
            rest = (head < heads)[:, None] & (column < D)[None, :]
            tl.store(y + column[None, :], tl.load(x + column[None, :] * x_d, mask=rest), mask=rest)


@launcher
@triton.jit(do_not_specialize=["length", "positions"])
def _rotate(
    Q, K, COS, SIN, POSITION, Q_OUT, K_OUT, length, positions, cos_p, sin_p,
    q_b, q_s, q_h, q_d, k_b, k_s, k_h, k_d, qo_b, qo_s, qo_h, ko_b, ko_s, ko_h,
    HEADS_Q: tl.constexpr, HEADS_K: tl.constexpr, D: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr,
    BY_TOKEN: tl.constexpr, INVERSE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_H heads of one token a program: tokens along grid axis 0, head blocks of Q and then of K along axis 1."""
    index = tl.program_id(0).to(tl.int64)
    batch, token = index // length, index % length
    block = tl.program_id(1)
    position = token
    if POSITION is not None:
        position = tl.load(POSITION + index).to(tl.int64)
    elif BY_TOKEN:
        position = index
    pair = tl.arange(0, BLOCK_R)
    # A position the table does not have gives NaN, not what lies behind the table.
    known = (pair < R // 2) & (position >= 0) & (position < positions)
    cos = tl.load(COS + position * cos_p + pair, mask=known, other=float("nan")).to(tl.float32)
    sin = tl.load(SIN + position * sin_p + pair, mask=known, other=float("nan")).to(tl.float32)
    if INVERSE:
        sin = -sin
    blocks_q: tl.constexpr = (HEADS_Q + BLOCK_H - 1) // BLOCK_H
    if block < blocks_q:
        _turn_heads(
            Q, Q_OUT, q_b, q_s, q_h, q_d, qo_b, qo_s, qo_h, batch, token, block * BLOCK_H, cos, sin, HEADS_Q,
            D, R, INTERLEAVED, BLOCK_H, BLOCK_R, BLOCK_D,
        )  # fmt: skip
    elif K is not None:
        _turn_heads(
            K, K_OUT, k_b, k_s, k_h, k_d, ko_b, ko_s, ko_h, batch, token, (block - blocks_q) * BLOCK_H, cos, sin,
            HEADS_K, D, R, INTERLEAVED, BLOCK_H, BLOCK_R, BLOCK_D,
        )  # fmt: skip


def _empty_beside(x: Tensor) -> Tensor:
    """Room for a result: x's memory order, unless that strides the last dimension (as for overlapping inputs)."""
    out = torch.empty_like(x)
    return out if out.stride(-1) == 1 else torch.empty(x.shape, dtype=x.dtype, device=x.device)


def rotate(
    query: Tensor,
    key: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    position: Tensor | None,
    interleaved: bool,
    by_token: bool,
    inverse: bool,
    in_place: bool = False,
) -> list[Tensor]:
    """Launch the kernel.

    Args:
        query, key: (B, S, H, D), any strides; the number of heads may differ.
        cos, sin: (P, R / 2) with unit stride in the last dimension, R even and at most D.
        position: (B, S) contiguous integers, or None for a token's place in its sequence, or with `by_token` its
            place in the batch.
        inverse: turn by the negative angle.
        in_place: write over query and key, which then must not overlap each other or themselves.

    Returns:
        tensors for query and, if there is one, key: new ones in their memory order where that is dense, or themselves.
    """
    batch, s, heads, d = query.shape
    outs = [x if in_place else _empty_beside(x) for x in (query, key) if x is not None]
    if query.numel() + (0 if key is None else key.numel()) == 0:
        return outs
    launch = _launch(
        target_of(query.device), batch, s, heads, 0 if key is None else key.shape[2], d, tuple(cos.shape),
        cos.stride(0), sin.stride(0), query.stride(), (0, 0, 0, 0) if key is None else key.stride(),
        outs[0].stride(), outs[-1].stride(), interleaved, by_token, inverse,
    )  # fmt: skip
    q_out, k_out = (None, None) if in_place else (outs[0], None if key is None else outs[1])
    launch(query, key, cos, sin, position, q_out, k_out)
    return outs


# What a launch is made of beside its tensors is derived once a kind of call.
@functools.lru_cache(maxsize=1024)
def _launch(
    aim: Target,
    batch: int,
    s: int,
    heads: int,
    heads_k: int,
    d: int,
    table: tuple[int, int],
    cos_stride: int,
    sin_stride: int,
    q_strides: tuple[int, ...],
    k_strides: tuple[int, ...],
    q_out_strides: tuple[int, ...],
    k_out_strides: tuple[int, ...],
    interleaved: bool,
    by_token: bool,
    inverse: bool,
) -> Prepared:
    r = 2 * table[1]
    block_h = min(power_of_two(max(heads, heads_k)), 16)
    block_r = power_of_two(max(r // 2, 1))
    block_d = power_of_two(max(d - r, 1))
    numbers = (
        s, table[0], cos_stride, sin_stride, *q_strides, *k_strides, *q_out_strides[:3], *k_out_strides[:3],
        heads, heads_k, d, r, interleaved, by_token, inverse, block_h, block_r, block_d,
    )  # fmt: skip
    grid = (batch * s, cdiv(heads, block_h) + cdiv(heads_k, block_h))
    return Prepared(_rotate, grid, numbers, shape_of_program(aim, block_h * block_r, 4, 128))
