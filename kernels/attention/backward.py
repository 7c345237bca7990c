"""Backward pass of attention in two kernels, without atomics: dQ, then dK and dV (Dao 2023).

- The first walks over keys for a tile of queries and, on the way, stores delta = rowsum(dO * O) - dLSE, which the
  second needs; that one walks over queries for a tile of keys, over all query heads that share them.
- Both recompute the probabilities from the LSE. Hidden places are selected away from the scores' gradient. Unsound
  keys are left unread as in forward.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastformer.kernels.attention.call import Call
from fastformer.kernels.attention.config import backward_config, wide_constants
from fastformer.kernels.attention.score import (
    LOG2E,
    blank,
    kept_tile,
    key_range,
    row_range,
    score_tile,
    sequence,
    slope_of,
    sound_rows,
    visible_keys,
)
from fastformer.kernels.attention.wide import wide_key, wide_query
from fastformer.kernels.launch import launcher
from fastformer.kernels.rows import cdiv
from fastformer.kernels.targets import hopper_chosen, target_of


@triton.jit
def _walk_keys(
    dq, q, do, delta, lse, K, V, MASK, begin, end, row, row_start, offset, q_len, k_len, k_st, v_st, mask_q, mask_k,
    slope, seed, plane, threshold, keep_scale, scale_in, scale_out, left, right,
    CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, BOOL_MASK: tl.constexpr, KEY_MASK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr, DROPOUT: tl.constexpr, CHECK: tl.constexpr, HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds to dq what keys begin … end contribute."""
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
        inside, key_bias = visible_keys(MASK, column, k_len, mask_k, BOOL_MASK, KEY_MASK, CHECK)
        k_place = K + start.to(tl.int64) * k_st + (n[:, None] * k_st + d[None, :])
        if SCAN:
            sound = sound_rows(k_place, inside[:, None] & (d < HEAD_DIM)[None, :])
            k = tl.load(k_place, mask=(inside & sound)[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
        else:
            k = tl.load(k_place, mask=inside[:, None] & (d < HEAD_DIM)[None, :], other=0.0)  # [BLOCK_N, BLOCK_D]
        v = tl.load(
            V + start.to(tl.int64) * v_st + (n[:, None] * v_st + dv[None, :]),
            mask=inside[:, None] & (dv < VALUE_DIM)[None, :],
            other=0.0,
        )  # [BLOCK_N, BLOCK_V]
        qk = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        if SCAN:
            qk = tl.where(sound[None, :], qk, float("nan"))
        scores, seen, slack = score_tile(
            qk, row[:, None], column[None, :], (row < q_len)[:, None], inside[None, :],
            key_bias[None, :] if KEY_MASK and not BOOL_MASK and CHECK else 0.0, offset, MASK, mask_q, mask_k, slope,
            scale_in, scale_out, left, right, CAUSAL, LEFT, RIGHT, BOOL_MASK, KEY_MASK, SOFTCAP, ALIBI, CHECK,
        )  # fmt: skip
        weights = tl.exp2(scores - lse[:, None])
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        if DROPOUT:
            dp = tl.where(kept_tile(seed, threshold, plane, row_start, start, BLOCK_M, BLOCK_N), dp * keep_scale, 0.0)
        ds = weights * (dp - delta[:, None]) * slack
        if CHECK:
            ds = tl.where(seen, ds, 0.0)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@launcher
@triton.jit(do_not_specialize=["tiles", "q_len", "k_len", "tokens", "batches", "left", "right", "threshold"])
def _backward_query(
    Q, K, V, OUT, DO, LSE, DLSE, DELTA, DQ, MASK, SLOPES, SEED, CU_Q, CU_K,
    q_sb, q_sh, q_st, k_sb, k_sh, k_st, v_sb, v_sh, v_st, o_sb, o_sh, o_st, do_sb, do_sh, do_st, dq_sb, dq_sh, dq_st,
    l_sb, l_sh, dl_sb, dl_sh, dl_st, mask_b, mask_h, mask_q, mask_k, slope_b,
    tiles, heads, q_len, k_len, tokens, batches, scale, scale_in, scale_out, left, right, threshold, keep_scale,
    GROUP: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    BOOL_MASK: tl.constexpr, KEY_MASK: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dQ and delta of BLOCK_M query rows of one head."""
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
            blank(DQ + wide_head * dq_sh, dq_st, q_start, tile, tiles, q_len, HEAD_DIM, BLOCK_M, BLOCK_D)
            return
    row_start = tile * BLOCK_M
    if row_start >= q_len:
        return
    kv_head = wide_head // GROUP
    row = row_start + tl.arange(0, BLOCK_M)
    valid = row < q_len
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_V)
    wide = (q_start + row_start) + tl.arange(0, BLOCK_M).to(tl.int64)
    q_mask = valid[:, None] & (d < HEAD_DIM)[None, :]
    v_mask = valid[:, None] & (dv < VALUE_DIM)[None, :]
    q = tl.load(Q + far * q_sb + wide_head * q_sh + wide[:, None] * q_st + d[None, :], mask=q_mask, other=0.0)
    do = tl.load(DO + far * do_sb + wide_head * do_sh + wide[:, None] * do_st + dv[None, :], mask=v_mask, other=0.0)
    out = tl.load(OUT + far * o_sb + wide_head * o_sh + wide[:, None] * o_st + dv[None, :], mask=v_mask, other=0.0)
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)  # [BLOCK_M]
    if DLSE is not None:
        delta -= tl.load(DLSE + far * dl_sb + wide_head * dl_sh + wide * dl_st, mask=valid, other=0.0)
    rows_of_head = far * l_sb + wide_head * l_sh + wide
    lse = tl.load(LSE + rows_of_head, mask=valid, other=float("inf"))
    # A row with nothing to attend to has no probabilities: exp2(x - inf) = 0.
    empty = lse == float("-inf")
    lse = tl.where(empty, float("inf"), lse * LOG2E)
    delta = tl.where(empty, 0.0, delta)
    tl.store(DELTA + rows_of_head, delta, mask=valid)

    K += far * k_sb + kv_head * k_sh + k_start * k_st
    V += far * v_sb + kv_head * v_sh + k_start * v_st
    offset = 0
    if BOTTOM_RIGHT:
        offset = k_len - q_len
    if MASK is not None:
        MASK += batch.to(tl.int64) * mask_b + wide_head * mask_h
    slope = slope_of(SLOPES, batch, head, slope_b)
    plane = batch * heads + head
    seed = 0
    if DROPOUT:
        seed = tl.load(SEED)
    ALIBI: tl.constexpr = SLOPES is not None
    last = tl.minimum(row_start + BLOCK_M, q_len) - 1
    begin, full_begin, full_end, end = key_range(row_start, last, offset, k_len, left, right, CAUSAL, LEFT, RIGHT)
    begin = begin // BLOCK_N * BLOCK_N
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if MASK is None:
        full_begin = tl.minimum(tl.cdiv(full_begin, BLOCK_N) * BLOCK_N, end)
        full_end = tl.maximum(full_end // BLOCK_N * BLOCK_N, full_begin)
        if LEFT:
            dq = _walk_keys(
                dq, q, do, delta, lse, K, V, MASK, begin, full_begin, row, row_start, offset, q_len, k_len, k_st, v_st,
                mask_q, mask_k, slope, seed, plane, threshold, keep_scale, scale_in, scale_out, left, right,
                CAUSAL, LEFT, RIGHT, BOOL_MASK, KEY_MASK, SOFTCAP, ALIBI, DROPOUT, True, HEAD_DIM, VALUE_DIM,
                BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_V, PRECISION,
            )  # fmt: skip
        dq = _walk_keys(
            dq, q, do, delta, lse, K, V, MASK, full_begin, full_end, row, row_start, offset, q_len, k_len, k_st, v_st,
            mask_q, mask_k, slope, seed, plane, threshold, keep_scale, scale_in, scale_out, left, right,
            CAUSAL, LEFT, RIGHT, BOOL_MASK, KEY_MASK, SOFTCAP, ALIBI, DROPOUT, False, HEAD_DIM, VALUE_DIM,
            BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_V, PRECISION,
        )  # fmt: skip
        begin = full_end
    dq = _walk_keys(
        dq, q, do, delta, lse, K, V, MASK, begin, end, row, row_start, offset, q_len, k_len, k_st, v_st,
        mask_q, mask_k, slope, seed, plane, threshold, keep_scale, scale_in, scale_out, left, right,
        CAUSAL, LEFT, RIGHT, BOOL_MASK, KEY_MASK, SOFTCAP, ALIBI, DROPOUT, True, HEAD_DIM, VALUE_DIM,
        BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_V, PRECISION,
    )  # fmt: skip
    tl.store(
        DQ + far * dq_sb + wide_head * dq_sh + wide[:, None] * dq_st + d[None, :],
        (dq * scale).to(DQ.dtype.element_ty),
        mask=q_mask,
    )


@triton.jit
def _walk_rows(
    dk, dv_, k, v, Q, DO, LSE, DELTA, MASK, begin, end, column, column_inside, key_bias, column_start, offset, q_len,
    q_st, do_st,
    mask_q, mask_k, slope, seed, plane, threshold, keep_scale, scale_in, scale_out, left, right,
    CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, BOOL_MASK: tl.constexpr, KEY_MASK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr, DROPOUT: tl.constexpr, CHECK: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds to dk and dv what query rows begin … end of one head contribute; tiles lie transposed, keys by queries."""
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_V)
    m = tl.arange(0, BLOCK_M)
    for start in range(begin, end, BLOCK_M):
        start = tl.multiple_of(start, BLOCK_M)
        row = start + m
        inside = row < q_len
        lse = tl.load(LSE + start.to(tl.int64) + m, mask=inside, other=float("inf"))
        # A row with nothing to attend to has no probabilities (exp2(x - inf) = 0), and whatever it holds stays out.
        empty = lse == float("-inf")
        lse = tl.where(empty, float("inf"), lse * LOG2E)
        if MASK is not None or LEFT or RIGHT:
            inside = inside & (lse != float("inf"))
        q = tl.load(
            Q + start.to(tl.int64) * q_st + (m[:, None] * q_st + d[None, :]),
            mask=inside[:, None] & (d < HEAD_DIM)[None, :],
            other=0.0,
        )  # [BLOCK_M, BLOCK_D]
        do = tl.load(
            DO + start.to(tl.int64) * do_st + (m[:, None] * do_st + dv[None, :]),
            mask=inside[:, None] & (dv < VALUE_DIM)[None, :],
            other=0.0,
        )  # [BLOCK_M, BLOCK_V]
        delta = tl.load(DELTA + start.to(tl.int64) + m, mask=inside, other=0.0)
        qk = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
        scores, seen, slack = score_tile(
            qk, row[None, :], column[:, None], inside[None, :], column_inside[:, None],
            key_bias[:, None] if KEY_MASK and not BOOL_MASK and CHECK else 0.0, offset, MASK, mask_q, mask_k, slope,
            scale_in, scale_out, left, right, CAUSAL, LEFT, RIGHT, BOOL_MASK, KEY_MASK, SOFTCAP, ALIBI, CHECK,
        )  # fmt: skip
        weights = tl.exp2(scores - lse[None, :])
        if CHECK:
            weights = tl.where(seen, weights, 0.0)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
        if DROPOUT:
            kept = tl.trans(kept_tile(seed, threshold, plane, start, column_start, BLOCK_M, BLOCK_N))
            dp = tl.where(kept, dp * keep_scale, 0.0)
            dropped = tl.where(kept, weights * keep_scale, 0.0)
            dv_ = tl.dot(dropped.to(do.dtype), do, dv_, input_precision=PRECISION)
        else:
            dv_ = tl.dot(weights.to(do.dtype), do, dv_, input_precision=PRECISION)
        ds = weights * (dp - delta[None, :]) * slack
        if CHECK:
            ds = tl.where(seen, ds, 0.0)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv_


@launcher
@triton.jit(do_not_specialize=["tiles", "q_len", "k_len", "tokens", "batches", "left", "right", "threshold"])
def _backward_key(
    Q, K, V, DO, LSE, DELTA, DK, DV, MASK, SLOPES, SEED, CU_Q, CU_K,
    q_sb, q_sh, q_st, k_sb, k_sh, k_st, v_sb, v_sh, v_st, do_sb, do_sh, do_st, dk_sb, dk_sh, dk_st,
    dv_sb, dv_sh, dv_st, l_sb, l_sh, mask_b, mask_h, mask_q, mask_k, slope_b,
    tiles, heads, q_len, k_len, tokens, batches, scale, scale_in, scale_out, left, right, threshold, keep_scale,
    GROUP: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    BOOL_MASK: tl.constexpr, KEY_MASK: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dK and dV of BLOCK_N keys of one key head."""
    program = tl.program_id(0)
    kv_heads = heads // GROUP
    tile = program % tiles
    kv_head = (program // tiles) % kv_heads
    batch = program // tiles // kv_heads
    q_start, q_len = sequence(batch, CU_Q, q_len, 0, batches)
    k_start, k_len = sequence(batch, CU_K, k_len, tokens, batches)
    far = batch.to(tl.int64)
    wide_head = kv_head.to(tl.int64)
    if CU_Q is not None:
        far = far * 0
        if batch == batches:
            blank(DK + wide_head * dk_sh, dk_st, k_start, tile, tiles, k_len, HEAD_DIM, BLOCK_N, BLOCK_D)
            blank(DV + wide_head * dv_sh, dv_st, k_start, tile, tiles, k_len, VALUE_DIM, BLOCK_N, BLOCK_V)
            return
    column_start = tile * BLOCK_N
    if column_start >= k_len:
        return
    column = column_start + tl.arange(0, BLOCK_N)
    valid = column < k_len
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_V)
    wide = (k_start + column_start) + tl.arange(0, BLOCK_N).to(tl.int64)
    k_mask = valid[:, None] & (d < HEAD_DIM)[None, :]
    v_mask = valid[:, None] & (dv < VALUE_DIM)[None, :]
    k = tl.load(K + far * k_sb + wide_head * k_sh + wide[:, None] * k_st + d[None, :], mask=k_mask, other=0.0)
    v = tl.load(V + far * v_sb + wide_head * v_sh + wide[:, None] * v_st + dv[None, :], mask=v_mask, other=0.0)
    offset = 0
    if BOTTOM_RIGHT:
        offset = k_len - q_len
    seed = 0
    if DROPOUT:
        seed = tl.load(SEED)
    ALIBI: tl.constexpr = SLOPES is not None
    last = tl.minimum(column_start + BLOCK_N, k_len) - 1
    begin, full_begin, full_end, end = row_range(column_start, last, offset, q_len, left, right, CAUSAL, LEFT, RIGHT)
    begin = begin // BLOCK_M * BLOCK_M
    full_begin = tl.minimum(tl.cdiv(full_begin, BLOCK_M) * BLOCK_M, end)
    full_end = tl.maximum(full_end // BLOCK_M * BLOCK_M, full_begin)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_ = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for shared in range(GROUP):
        head = kv_head * GROUP + shared
        q_head = head.to(tl.int64)
        q_of = Q + far * q_sb + q_head * q_sh + q_start * q_st
        do_of = DO + far * do_sb + q_head * do_sh + q_start * do_st
        rows_of_head = far * l_sb + q_head * l_sh + q_start
        lse_of = LSE + rows_of_head
        delta_of = DELTA + rows_of_head
        slope = slope_of(SLOPES, batch, head, slope_b)
        plane = batch * heads + head
        mask_of = MASK
        if MASK is not None:
            mask_of = MASK + batch.to(tl.int64) * mask_b + q_head * mask_h
        column_inside, key_bias = visible_keys(mask_of, column, k_len, mask_k, BOOL_MASK, KEY_MASK, True)
        if MASK is None:
            if CAUSAL or RIGHT:
                dk, dv_ = _walk_rows(
                    dk, dv_, k, v, q_of, do_of, lse_of, delta_of, MASK, begin, full_begin, column, column_inside,
                    key_bias, column_start, offset, q_len, q_st, do_st, mask_q, mask_k, slope, seed, plane, threshold,
                    keep_scale,
                    scale_in, scale_out, left, right, CAUSAL, LEFT, RIGHT, BOOL_MASK, KEY_MASK, SOFTCAP, ALIBI,
                    DROPOUT, True,
                    HEAD_DIM, VALUE_DIM, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_V, PRECISION,
                )  # fmt: skip
            # Rows past the end count nothing: their LSE reads as inf.
            dk, dv_ = _walk_rows(
                dk, dv_, k, v, q_of, do_of, lse_of, delta_of, MASK, full_begin, full_end if LEFT else end, column,
                column_inside, key_bias, column_start, offset, q_len, q_st, do_st, mask_q, mask_k, slope, seed, plane,
                threshold,
                keep_scale, scale_in, scale_out, left, right, CAUSAL, LEFT, RIGHT, BOOL_MASK, KEY_MASK, SOFTCAP, ALIBI,
                DROPOUT, False, HEAD_DIM, VALUE_DIM, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_V, PRECISION,
            )  # fmt: skip
            if LEFT:
                dk, dv_ = _walk_rows(
                    dk, dv_, k, v, q_of, do_of, lse_of, delta_of, MASK, full_end, end, column, column_inside, key_bias,
                    column_start, offset, q_len, q_st, do_st, mask_q, mask_k, slope, seed, plane, threshold,
                    keep_scale, scale_in,
                    scale_out, left, right, CAUSAL, LEFT, RIGHT, BOOL_MASK, KEY_MASK, SOFTCAP, ALIBI, DROPOUT, True,
                    HEAD_DIM, VALUE_DIM, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_V, PRECISION,
                )  # fmt: skip
        else:
            dk, dv_ = _walk_rows(
                dk, dv_, k, v, q_of, do_of, lse_of, delta_of, mask_of, begin, end, column, column_inside, key_bias,
                column_start, offset, q_len, q_st, do_st, mask_q, mask_k, slope, seed, plane, threshold, keep_scale,
                scale_in,
                scale_out, left, right, CAUSAL, LEFT, RIGHT, BOOL_MASK, KEY_MASK, SOFTCAP, ALIBI, DROPOUT, True,
                HEAD_DIM, VALUE_DIM, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_V, PRECISION,
            )  # fmt: skip
    tl.store(
        DK + far * dk_sb + wide_head * dk_sh + wide[:, None] * dk_st + d[None, :],
        (dk * scale).to(DK.dtype.element_ty),
        mask=k_mask,
    )
    tl.store(
        DV + far * dv_sb + wide_head * dv_sh + wide[:, None] * dv_st + dv[None, :],
        dv_.to(DV.dtype.element_ty),
        mask=v_mask,
    )


def attention_backward(
    call: Call,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    into: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of a call.

    Args:
        call: as in forward. out, lse: what forward returned. grad_out: like out, last stride 1.
        grad_lse: like lse, any strides, or None.
        into: memory for dQ, dK, dV, shaped as query, key, value, last stride 1; None: allocated here, laid out as
            (B, S, H, D).

    Returns:
        dQ, dK, dV, and delta (like lse): rowsum(dO * O) - dLSE.
    """
    query, key, value = call.query, call.key, call.value
    dq, dk, dv = into or (call.empty_like(x) for x in (query, key, value))
    delta = torch.empty_like(lse)
    l_sb, l_sh = (0, query.shape[0]) if call.packed else (call.heads * call.q_len, call.q_len)
    dl_strides: tuple[int, ...]
    if grad_lse is None:
        dl_strides = (0, 0, 0)
    else:
        dl_strides = (0, *grad_lse.stride()) if call.packed else grad_lse.stride()
    numbers = (call.scale, *call.scales, call.left, call.right, call.threshold, call.keep_scale)
    batches = call.batch + call.packed

    def prepare_query() -> tuple[Any, ...]:
        target = target_of(query.device)
        config = backward_config(target, call)[0]
        tiles = max(1, cdiv(call.q_len, config.block_m))
        others = (
            *call.strides(query), *call.strides(key), *call.strides(value), *call.strides(out),
            *call.strides(grad_out), *call.strides(dq), l_sb, l_sh, *dl_strides, *call.mask_strides, call.slope_stride,
            tiles, call.heads, call.q_len, call.k_len, query.shape[0] if call.packed else 0, call.batch, *numbers,
        )  # fmt: skip
        programs = tiles * call.heads * batches
        if call.wide:
            constants, parts = wide_constants(target, call, call.head_dim)
            others = (*others, call.head_dim, call.value_dim)
            return wide_query, (parts * programs,), others, {**constants, **config.options(target)}
        return _backward_query, (programs,), others, {**call.constants, **config.options(target)}

    def prepare_key() -> tuple[Any, ...]:
        target = target_of(query.device)
        config = backward_config(target, call)[1]
        tiles = max(1, cdiv(call.k_len, config.block_n))
        others = (
            *call.strides(query), *call.strides(key), *call.strides(value),
            *call.strides(grad_out), *call.strides(dk), *call.strides(dv), l_sb, l_sh,
            *call.mask_strides, call.slope_stride,
            tiles, call.heads, call.q_len, call.k_len, key.shape[0] if call.packed else 0, call.batch, *numbers,
        )  # fmt: skip
        programs = tiles * call.kv_heads * batches
        if call.wide:
            constants, parts = wide_constants(target, call, max(call.head_dim, call.value_dim))
            others = (*others, call.head_dim, call.value_dim)
            return wide_key, (parts * programs,), others, {**constants, **config.options(target)}
        return _backward_key, (programs,), others, {**call.constants, **config.options(target)}

    hopper = False
    if hopper_chosen(query.device):
        from fastformer.kernels.attention.hopper import hopper_backward_key, hopper_backward_query

        hopper = hopper_backward_query(call, out, lse, grad_out, grad_lse, delta, dq)
    if (query.numel() or out.numel()) and not hopper:
        call.launch(
            ("dQ", out.stride(), grad_out.stride(), dl_strides, dq.stride()),
            (
                query, key, value, out, grad_out, lse, grad_lse, delta, dq, call.mask, call.slopes, call.seed,
                call.cu_q, call.cu_k,
            ),
            prepare_query,
        )  # fmt: skip
    if hopper_chosen(query.device):
        hopper = hopper_backward_key(call, lse, delta, grad_out, dk, dv)
    if (key.numel() or value.numel()) and not hopper:
        call.launch(
            ("dK and dV", grad_out.stride(), dk.stride(), dv.stride()),
            (
                query, key, value, grad_out, lse, delta, dk, dv, call.mask, call.slopes, call.seed,
                call.cu_q, call.cu_k,
            ),
            prepare_key,
        )  # fmt: skip
    return dq, dk, dv, delta
