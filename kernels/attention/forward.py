"""Forward pass of attention: one program a tile of queries, keys in tiles, softmax on line (Milakov, Gimelshein 2018;
Dao et al. 2022).

- Tiles that every row of the program sees whole are walked without any check; those at the edges of the causal or
  window band, at the end of the sequence, or under a mask, with all of them.
- NaN and Inf in a hidden value do not reach the output: where only some rows of a tile see a key, unsound values are
  left unread, and the scores of the rows that do see them turn to NaN instead.
"""

import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastformer.kernels.attention.call import Call, as_bytes, hopper_launchers
from fastformer.kernels.attention.config import bind, forward_config, short_config
from fastformer.kernels.attention.score import (
    CHANGING,
    LN2,
    blank,
    blank_rows,
    kept_tile,
    key_range,
    score_tile,
    sequence,
    slope_of,
    sound_rows,
    start_of_row,
    visible_keys,
)
from fastformer.kernels.attention.short import short_forward
from fastformer.kernels.attention.wide import wide_forward
from fastformer.kernels.launch import launcher
from fastformer.kernels.rows import cdiv, dense_strides
from fastformer.kernels.targets import hopper_chosen, target_of

Forward = Callable[..., tuple[Tensor, Tensor]]


@triton.jit
def _walk(
    acc, peak, total, q, K, V, MASK, begin, end, row, row_start, offset, q_len, k_len, k_st, v_st, mask_q, mask_k,
    slope, seed, plane, threshold, keep_scale, scale_in, scale_out, left, right,
    CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, BOOL_MASK: tl.constexpr, KEY_MASK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr, DROPOUT: tl.constexpr, CHECK: tl.constexpr, HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Keys begin … end in steps of BLOCK_N."""
    # The few tiles at the edges of a band are not worth the registers of a pipeline.
    STAGES: tl.constexpr = 1 if CHECK and MASK is None else None
    # Keys that only some rows of a tile see: their NaN and Inf must not meet the zero weights of the others.
    SCAN: tl.constexpr = CHECK and (CAUSAL or LEFT or RIGHT or (MASK is not None and not KEY_MASK))
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_V)
    n = tl.arange(0, BLOCK_N)
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        start = tl.multiple_of(start, BLOCK_N)
        column = start + n
        k_place = K + start.to(tl.int64) * k_st + (n[:, None] * k_st + d[None, :])
        v_place = V + start.to(tl.int64) * v_st + (n[:, None] * v_st + dv[None, :])
        inside, key_bias = visible_keys(MASK, column, k_len, mask_k, BOOL_MASK, KEY_MASK, CHECK)
        if CHECK:
            k = tl.load(k_place, mask=inside[:, None] & (d < HEAD_DIM)[None, :], other=0.0)  # [BLOCK_N, BLOCK_D]
        elif BLOCK_D == HEAD_DIM:
            k = tl.load(k_place)
        else:
            k = tl.load(k_place, mask=(d < HEAD_DIM)[None, :], other=0.0)
        # Transposed here as in backward: the same product in the same order, or its rounding counts twice.
        qk = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        if SCAN:
            sound = sound_rows(v_place, inside[:, None] & (dv < VALUE_DIM)[None, :])
            qk = tl.where(sound[None, :], qk, float("nan"))
            v = tl.load(v_place, mask=(inside & sound)[:, None] & (dv < VALUE_DIM)[None, :], other=0.0)
        elif CHECK:
            v = tl.load(v_place, mask=inside[:, None] & (dv < VALUE_DIM)[None, :], other=0.0)  # [BLOCK_N, BLOCK_V]
        elif BLOCK_V == VALUE_DIM:
            v = tl.load(v_place)
        else:
            v = tl.load(v_place, mask=(dv < VALUE_DIM)[None, :], other=0.0)
        scores, seen, _ = score_tile(
            qk, row[:, None], column[None, :], (row < q_len)[:, None], inside[None, :],
            key_bias[None, :] if KEY_MASK and not BOOL_MASK and CHECK else 0.0, offset, MASK, mask_q, mask_k, slope,
            scale_in, scale_out, left, right, CAUSAL, LEFT, RIGHT, BOOL_MASK, KEY_MASK, SOFTCAP, ALIBI, CHECK,
        )  # fmt: skip
        if CHECK:
            scores = tl.where(seen, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        base = new_peak
        if CHECK:
            base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp2(scores - base[:, None])
        fade = tl.exp2(peak - base)
        total = total * fade + tl.sum(weights, 1)
        if DROPOUT:
            kept = kept_tile(seed, threshold, plane, row_start, start, BLOCK_M, BLOCK_N)
            weights = tl.where(kept, weights * keep_scale, 0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
        peak = new_peak
    return acc, peak, total


@launcher
@triton.jit(do_not_specialize=CHANGING)
def _forward(
    Q, K, V, OUT, LSE, MASK, SLOPES, SINKS, SEED, CU_Q, CU_K,
    q_sb, q_sh, q_st, k_sb, k_sh, k_st, v_sb, v_sh, v_st, o_sb, o_sh, o_st, l_sb, l_sh,
    mask_b, mask_h, mask_q, mask_k, slope_b, tiles, heads, q_len, k_len, tokens, batches, scale_in, scale_out,
    left, right, threshold, keep_scale,
    GROUP: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    BOOL_MASK: tl.constexpr, KEY_MASK: tl.constexpr, MASK_UNIT: tl.constexpr, SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_M query rows of one head."""
    program = tl.program_id(0)
    tile = program % tiles
    head = (program // tiles) % heads
    batch = program // tiles // heads
    if CAUSAL:
        tile = tiles - 1 - tile  # the longest rows first
    q_start, q_len = sequence(batch, CU_Q, q_len, tokens, batches)
    k_start, k_len = sequence(batch, CU_K, k_len, 0, batches)
    far = batch.to(tl.int64)
    wide_head = head.to(tl.int64)
    if CU_Q is not None:
        far = far * 0
        if batch == batches:
            blank(OUT + wide_head * o_sh, o_st, q_start, tile, tiles, q_len, VALUE_DIM, BLOCK_M, BLOCK_V)
            blank_rows(LSE + wide_head * l_sh, q_start, tile, tiles, q_len, BLOCK_M)
            return
    row_start = tile * BLOCK_M
    if row_start >= q_len:
        return
    kv_head = wide_head // GROUP
    row = row_start + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_V)
    wide = (q_start + row_start) + tl.arange(0, BLOCK_M).to(tl.int64)
    q = tl.load(
        Q + far * q_sb + wide_head * q_sh + wide[:, None] * q_st + d[None, :],
        mask=(row < q_len)[:, None] & (d < HEAD_DIM)[None, :],
        other=0.0,
    )  # [BLOCK_M, BLOCK_D]
    K += far * k_sb + kv_head * k_sh + k_start * k_st
    V += far * v_sb + kv_head * v_sh + k_start * v_st
    offset = 0
    if BOTTOM_RIGHT:
        offset = k_len - q_len
    if MASK is not None:
        MASK += (batch.to(tl.int64) * mask_b + wide_head * mask_h) * MASK_UNIT
    slope = slope_of(SLOPES, batch, head, slope_b)
    seed = 0
    if DROPOUT:
        seed = tl.load(SEED)
    plane = batch * heads + head
    mask_q *= MASK_UNIT

    peak, total = start_of_row(SINKS, head, BLOCK_M)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    ALIBI: tl.constexpr = SLOPES is not None
    last = tl.minimum(row_start + BLOCK_M, q_len) - 1
    begin, full_begin, full_end, end = key_range(row_start, last, offset, k_len, left, right, CAUSAL, LEFT, RIGHT)
    begin = begin // BLOCK_N * BLOCK_N
    if MASK is None:
        # Whole tiles that every row sees lie between full_begin and full_end.
        full_begin = tl.minimum(tl.cdiv(full_begin, BLOCK_N) * BLOCK_N, end)
        full_end = tl.maximum(full_end // BLOCK_N * BLOCK_N, full_begin)
        if LEFT:
            acc, peak, total = _walk(
                acc, peak, total, q, K, V, MASK, begin, full_begin, row, row_start, offset, q_len, k_len, k_st, v_st,
                mask_q, mask_k, slope, seed, plane, threshold, keep_scale, scale_in, scale_out, left, right,
                CAUSAL, LEFT, RIGHT, BOOL_MASK, KEY_MASK, SOFTCAP, ALIBI, DROPOUT, True, HEAD_DIM, VALUE_DIM,
                BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_V, PRECISION,
            )  # fmt: skip
        acc, peak, total = _walk(
            acc, peak, total, q, K, V, MASK, full_begin, full_end, row, row_start, offset, q_len, k_len, k_st, v_st,
            mask_q, mask_k, slope, seed, plane, threshold, keep_scale, scale_in, scale_out, left, right,
            CAUSAL, LEFT, RIGHT, BOOL_MASK, KEY_MASK, SOFTCAP, ALIBI, DROPOUT, False, HEAD_DIM, VALUE_DIM,
            BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_V, PRECISION,
        )  # fmt: skip
        begin = full_end
    acc, peak, total = _walk(
        acc, peak, total, q, K, V, MASK, begin, end, row, row_start, offset, q_len, k_len, k_st, v_st,
        mask_q, mask_k, slope, seed, plane, threshold, keep_scale, scale_in, scale_out, left, right,
        CAUSAL, LEFT, RIGHT, BOOL_MASK, KEY_MASK, SOFTCAP, ALIBI, DROPOUT, True, HEAD_DIM, VALUE_DIM,
        BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_V, PRECISION,
    )  # fmt: skip

    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    acc = acc / total[:, None]
    lse = tl.where(empty, float("-inf"), peak * LN2 + tl.log(total))
    tl.store(LSE + far * l_sb + wide_head * l_sh + wide, lse, mask=row < q_len)
    tl.store(
        OUT + far * o_sb + wide_head * o_sh + wide[:, None] * o_st + dv[None, :],
        acc.to(OUT.dtype.element_ty),
        mask=(row < q_len)[:, None] & (dv < VALUE_DIM)[None, :],
    )


def attention_forward(call: Call) -> tuple[Tensor, Tensor]:
    """Output and LSE of a call.

    Returns:
        dense: output (B, H, Sq, Dv) contiguous as (B, Sq, H, Dv), LSE (B, H, Sq) fp32; packed: (T, H, Dv), (H, T).
    """
    return bind_forward(call)(*call.tensors)


def bind_forward(call: Call) -> Forward:
    """`attention_forward` as a function of `Call.tensors` for all calls with these numbers."""
    if not hopper_chosen(call.query.device):
        return call.once(("forward", call.short), lambda: _forward_of(call))
    hopper = hopper_launchers()
    return call.once(("Hopper forward", hopper.forward_kernel), lambda: hopper.bind_forward(call, _forward_of(call)))


def _forward_of(call: Call) -> Forward:
    device, dtype = call.query.device, call.query.dtype
    target = target_of(device)
    tokens = call.query.shape[0] if call.packed else 0
    shape, laid = call.layout_like(call.query, call.value_dim)
    rows = (call.heads, tokens) if call.packed else (call.batch, call.heads, call.q_len)
    row_strides, empty = dense_strides(rows), math.prod(rows) == 0
    config = short_config(target, call, "short forward") if call.short else forward_config(target, call)
    tiles = max(1, cdiv(call.q_len, config.block_m))
    numbers = (
        *call.strides(call.query), *call.strides(call.key), *call.strides(call.value), *call.along(laid),
        *call.row_strides(), *call.mask_strides, call.slope_stride, tiles, call.heads, call.q_len, call.k_len, tokens,
        call.batch, *call.scales, call.left, call.right, call.threshold, call.keep_scale,
    )  # fmt: skip
    programs = tiles * call.heads * (call.batch + call.packed)
    kernel = short_forward if call.short else _forward
    bound = bind(target, call, kernel, wide_forward, programs, numbers, config, call.value_dim)

    def run(
        query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, mask: Tensor | None,
        slopes: Tensor | None, sinks: Tensor | None, seed: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        out = torch.empty_strided(shape, laid, dtype=dtype, device=device)
        lse = torch.empty_strided(rows, row_strides, dtype=torch.float32, device=device)
        if not empty:
            bound.launch(query, key, value, out, lse, as_bytes(mask), slopes, sinks, seed, cu_q, cu_k)
        return out, lse

    return run
