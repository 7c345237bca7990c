"""Rotary position embedding of queries and keys in one launch.

Pair i of a head's first R dimensions turns by the angle of its token's position: with (a, b) the pair,

    (a, b) -> (a cos - b sin, b cos + a sin)

where the pair is (x_i, x_{i + R/2}) ("half", GPT-NeoX, Llama) or (x_{2i}, x_{2i+1}) ("interleaved", GPT-J, RoFormer).
Dimensions from R on are copied. Backward turns by the negative angle. Su et al. 2021, "RoFormer".
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
from fastformer.kernels.rows import cdiv, dense_strides, power_of_two, room, shape_of_program
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
        query, key: (B, S, H, D) or (S, H, D), any strides; the number of heads may differ.
        cos, sin: (P, R / 2) with unit stride in the last dimension, R even and at most D.
        position: (B, S) contiguous integers, or None for a token's place in its sequence, or with `by_token` its
            place in the batch.
        inverse: turn by the negative angle.
        in_place: write over query and key, which then must not overlap each other or themselves.

    Returns:
        tensors for query and, if there is one, key: new ones in their memory order where that is dense, or themselves.
    """
    return bind(query, key, cos, sin, position, interleaved, by_token, inverse, in_place)(
        query, key, cos, sin, position
    )


def bind(
    query: Tensor,
    key: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    position: Tensor | None,
    interleaved: bool,
    by_token: bool,
    inverse: bool,
    in_place: bool = False,
) -> Callable[..., list[Tensor]]:
    """`rotate` of tensors laid out like these, as a function of the tensors alone."""
    sides = tuple(None if x is None else (x.shape, x.stride(), x.dtype) for x in (query, key))
    tables = tuple((tuple(t.shape), t.stride(0), t.dtype) for t in (cos, sin))
    return _rotation(
        target_of(query.device), query.device, sides, tables, None if position is None else position.dtype,
        interleaved, by_token, inverse, in_place,
    )  # fmt: skip


# What a call is made of beside its tensors is derived once for each kind.
@functools.lru_cache(maxsize=1024)
def _rotation(
    aim: Target,
    device: torch.device,
    sides: tuple[Any, ...],
    tables: tuple[Any, ...],
    position: torch.dtype | None,
    interleaved: bool,
    by_token: bool,
    inverse: bool,
    in_place: bool,
) -> Callable[..., list[Tensor]]:
    (*lead, s, heads, d), strides, _ = sides[0]
    results = [_beside(shape, stride) for shape, stride, _ in filter(None, sides)]
    new_q = _room_of(device, *sides[0])
    new_k = None if sides[1] is None else _room_of(device, *sides[1])
    heads_k = 0 if sides[1] is None else sides[1][0][-2]
    k_strides = (0, 0, 0, 0) if sides[1] is None else _of_four(sides[1][1])
    q_out, k_out = (_of_four(stride)[:3] for stride in (results[0], results[-1]))
    (positions, half), cos_stride, _ = tables[0]
    r = 2 * half
    block_h = min(power_of_two(max(heads, heads_k)), 16)
    block_r = power_of_two(max(half, 1))
    block_d = power_of_two(max(d - r, 1))
    numbers = (
        s, positions, cos_stride, tables[1][1], *_of_four(strides), *k_strides, *q_out, *k_out,
        heads, heads_k, d, r, interleaved, by_token, inverse, block_h, block_r, block_d,
    )  # fmt: skip
    tokens = math.prod(lead) * s
    grid = (tokens, cdiv(heads, block_h) + cdiv(heads_k, block_h))
    bound = Bound(_rotate, grid, numbers, shape_of_program(aim, block_h * block_r, 4, 128))
    empty = tokens * (heads + heads_k) * d == 0

    def run(query: Tensor, key: Tensor | None, cos: Tensor, sin: Tensor, position: Tensor | None) -> list[Tensor]:
        if in_place:
            if not empty:
                bound.launch(query, key, cos, sin, position, None, None)
            return [query] if key is None else [query, key]
        q_out, k_out = new_q(query), None if new_k is None or key is None else new_k(key)
        if not empty:
            bound.launch(query, key, cos, sin, position, q_out, k_out)
        return [q_out] if k_out is None else [q_out, k_out]

    return run


def _of_four(strides: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of (B, S, H, D), also for a tensor of one sequence without B."""
    return strides if len(strides) == 4 else (0, *strides)


def _room_of(
    device: torch.device, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype
) -> Callable[[Tensor], Tensor]:
    """What allocates the result of a tensor with these strides, laid out as `_beside` says."""
    if strides[-1] == 1:
        return torch.empty_like
    new = room(shape, dtype, device)
    return lambda _: new()


def _beside(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a result: the tensor's, if they hold its elements side by side with rows of unit stride."""
    if strides[-1] != 1:
        return dense_strides(shape)
    beside = torch.empty_strided(shape, strides, device="meta")
    return torch.empty_like(beside).stride()
