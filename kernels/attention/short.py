"""Attention of sequences so short that a single tile holds all their keys, forward and backward.

- Forward: with all scores of a row at hand there is no running maximum and nothing to rescale.
- Backward: one kernel for dQ, dK and dV. A program owns a sequence's keys and walks over its rows; since it sees every
  key of a row, that row's dQ is complete at once, without atomics, and delta = rowsum(P * dP) comes out of the scores'
  own gradient, so that the output is not read at all. Five products instead of the seven of two kernels.
- The rules and the handling of unsound values are those of `forward` and `backward`.
"""

import triton
import triton.language as tl

from fastformer.kernels.attention.score import (
    CHANGING,
    LN2,
    LOG2E,
    blank,
    blank_rows,
    kept_tile,
    score_tile,
    sequence,
    slope_of,
    sound_rows,
    start_of_row,
    visible_keys,
)
from fastformer.kernels.launch import launcher


@launcher
@triton.jit(do_not_specialize=CHANGING)
def short_forward(
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
    """One tile of BLOCK_M query rows of one head over all of its keys, BLOCK_N at most."""
    # Keys that only some rows of a tile see: their NaN and Inf must not meet the zero weights of the others.
    SCAN: tl.constexpr = CAUSAL or LEFT or RIGHT or (MASK is not None and not KEY_MASK)
    ALIBI: tl.constexpr = SLOPES is not None
    program = tl.program_id(0)
    tile = program % tiles
    head = (program // tiles) % heads
    batch = program // tiles // heads
    q_start, q_len = sequence(batch, CU_Q, q_len, tokens, batches)
    k_start, k_len = sequence(batch, CU_K, k_len, 0, batches)
    far = batch.to(tl.int64)
    wide_head = head.to(tl.int64)
    OUT += wide_head * o_sh
    LSE += wide_head * l_sh
    if CU_Q is not None:
        far = far * 0
        if batch == batches:
            blank(OUT, o_st, q_start, tile, tiles, q_len, VALUE_DIM, BLOCK_M, BLOCK_V)
            blank_rows(LSE, q_start, tile, tiles, q_len, BLOCK_M)
            return
    row_start = tile * BLOCK_M
    if row_start >= q_len:
        return
    kv_head = wide_head // GROUP
    row = row_start + tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_V)
    wide = (q_start + row_start) + tl.arange(0, BLOCK_M).to(tl.int64)
    place = k_start + column.to(tl.int64)
    mask_q *= MASK_UNIT
    if MASK is not None:
        MASK += (batch.to(tl.int64) * mask_b + wide_head * mask_h) * MASK_UNIT
    inside, key_bias = visible_keys(MASK, column, k_len, mask_k, BOOL_MASK, KEY_MASK, True)
    q = tl.load(
        Q + far * q_sb + wide_head * q_sh + wide[:, None] * q_st + d[None, :],
        mask=(row < q_len)[:, None] & (d < HEAD_DIM)[None, :],
        other=0.0,
    )  # [BLOCK_M, BLOCK_D]
    k = tl.load(
        K + far * k_sb + kv_head * k_sh + place[:, None] * k_st + d[None, :],
        mask=inside[:, None] & (d < HEAD_DIM)[None, :],
        other=0.0,
    )  # [BLOCK_N, BLOCK_D]
    v_place = V + far * v_sb + kv_head * v_sh + place[:, None] * v_st + dv[None, :]
    qk = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    read = inside
    if SCAN:
        sound = sound_rows(v_place, inside[:, None] & (dv < VALUE_DIM)[None, :])
        qk = tl.where(sound[None, :], qk, float("nan"))
        read = inside & sound
    v = tl.load(v_place, mask=read[:, None] & (dv < VALUE_DIM)[None, :], other=0.0)  # [BLOCK_N, BLOCK_V]
    offset = 0
    if BOTTOM_RIGHT:
        offset = k_len - q_len
    scores, seen, _slack = score_tile(
        qk, row[:, None], column[None, :], (row < q_len)[:, None], inside[None, :],
        key_bias[None, :] if KEY_MASK and not BOOL_MASK else 0.0, offset, MASK, mask_q, mask_k,
        slope_of(SLOPES, batch, head, slope_b), scale_in, scale_out, left, right,
        CAUSAL, LEFT, RIGHT, BOOL_MASK, KEY_MASK, SOFTCAP, ALIBI, True,
    )  # fmt: skip
    scores = tl.where(seen, scores, float("-inf"))
    peak = tl.max(scores, 1)
    if SINKS is not None:
        sink, share = start_of_row(SINKS, head, BLOCK_M)
        peak = tl.maximum(peak, sink)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    weights = tl.exp2(scores - peak[:, None])
    total = tl.sum(weights, 1)
    if SINKS is not None:
        total += share * tl.exp2(sink - peak)
    if DROPOUT:
        kept = kept_tile(tl.load(SEED), threshold, batch * heads + head, row_start, 0, BLOCK_M, BLOCK_N)
        weights = tl.where(kept, weights * keep_scale, 0.0)
    acc = tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    lse = tl.where(empty, float("-inf"), peak * LN2 + tl.log(total))
    tl.store(LSE + far * l_sb + wide, lse, mask=row < q_len)
    tl.store(
        OUT + far * o_sb + wide[:, None] * o_st + dv[None, :],
        (acc / total[:, None]).to(OUT.dtype.element_ty),
        mask=(row < q_len)[:, None] & (dv < VALUE_DIM)[None, :],
    )


@triton.jit
def _add_rows(
    dk, dv_, k, v, sound, Q, DO, LSE, DLSE, DELTA, DQ, MASK, row_start, column, column_inside, key_bias, offset, q_len,
    q_st, do_st, dl_st, dq_st, mask_q, mask_k, slope, seed, plane, threshold, keep_scale, scale, scale_in, scale_out,
    left, right,
    CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, BOOL_MASK: tl.constexpr, KEY_MASK: tl.constexpr,
    SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, DROPOUT: tl.constexpr, SCAN: tl.constexpr, HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Stores dQ and delta of BLOCK_M rows of one head, adds what they contribute to dk and dv; tiles lie transposed,
    keys by queries."""
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_V)
    row = row_start + tl.arange(0, BLOCK_M)
    wide = row.to(tl.int64)
    lse = tl.load(LSE + wide, mask=row < q_len, other=float("-inf"))
    inside = lse != float("-inf")  # the other rows have nothing to attend to, or do not exist: what they hold stays out
    lse = tl.where(inside, lse * LOG2E, float("inf"))
    q = tl.load(Q + wide[:, None] * q_st + d[None, :], mask=inside[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
    do = tl.load(DO + wide[:, None] * do_st + dv[None, :], mask=inside[:, None] & (dv < VALUE_DIM)[None, :], other=0.0)
    qk = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
    if SCAN:
        qk = tl.where(sound[:, None], qk, float("nan"))
    scores, seen, slack = score_tile(
        qk, row[None, :], column[:, None], inside[None, :], column_inside[:, None],
        key_bias[:, None] if KEY_MASK and not BOOL_MASK else 0.0, offset, MASK, mask_q, mask_k, slope,
        scale_in, scale_out, left, right, CAUSAL, LEFT, RIGHT, BOOL_MASK, KEY_MASK, SOFTCAP, ALIBI, True,
    )  # fmt: skip
    weights = tl.where(seen, tl.exp2(scores - lse[None, :]), 0.0)
    dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
    if DROPOUT:
        kept = tl.trans(kept_tile(seed, threshold, plane, row_start, 0, BLOCK_M, BLOCK_N))
        dp = tl.where(kept, dp * keep_scale, 0.0)
        dropped = tl.where(kept, weights * keep_scale, 0.0)
        dv_ = tl.dot(dropped.to(do.dtype), do, dv_, input_precision=PRECISION)
    else:
        dv_ = tl.dot(weights.to(do.dtype), do, dv_, input_precision=PRECISION)
    delta = tl.sum(tl.where(seen, weights * dp, 0.0), 0)  # [BLOCK_M]
    if DLSE is not None:
        delta -= tl.load(DLSE + wide * dl_st, mask=inside, other=0.0)
    tl.store(DELTA + wide, delta, mask=row < q_len)
    ds = tl.where(seen, weights * (dp - delta[None, :]) * slack, 0.0).to(k.dtype)
    dk = tl.dot(ds, q, dk, input_precision=PRECISION)
    dq = tl.dot(tl.trans(ds), k, input_precision=PRECISION)  # [BLOCK_M, BLOCK_D]
    tl.store(
        DQ + wide[:, None] * dq_st + d[None, :],
        (dq * scale).to(DQ.dtype.element_ty),
        mask=(row < q_len)[:, None] & (d < HEAD_DIM)[None, :],
    )
    return dk, dv_


@launcher
@triton.jit(do_not_specialize=CHANGING)
def short_backward(
    Q, K, V, DO, LSE, DLSE, DELTA, DQ, DK, DV, MASK, SLOPES, SEED, CU_Q, CU_K,
    q_sb, q_sh, q_st, k_sb, k_sh, k_st, v_sb, v_sh, v_st, do_sb, do_sh, do_st, dq_sb, dq_sh, dq_st,
    dk_sb, dk_sh, dk_st, dv_sb, dv_sh, dv_st, l_sb, l_sh, dl_sb, dl_sh, dl_st, mask_b, mask_h, mask_q, mask_k, slope_b,
    heads, q_len, k_len, tokens_q, tokens_k, batches, scale, scale_in, scale_out, left, right, threshold, keep_scale,
    GROUP: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    BOOL_MASK: tl.constexpr, KEY_MASK: tl.constexpr, MASK_UNIT: tl.constexpr, SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
    ONCE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of one head of a sequence, and delta; no heads share keys (GROUP is 1).

    ONCE: BLOCK_M rows are all there are, so that no loop holds registers.
    """
    SCAN: tl.constexpr = CAUSAL or LEFT or RIGHT or MASK is not None
    ALIBI: tl.constexpr = SLOPES is not None
    head = tl.program_id(0) % heads
    batch = tl.program_id(0) // heads
    q_start, q_len = sequence(batch, CU_Q, q_len, tokens_q, batches)
    k_start, k_len = sequence(batch, CU_K, k_len, tokens_k, batches)
    far = batch.to(tl.int64)
    wide_head = head.to(tl.int64)
    DQ += wide_head * dq_sh
    DK += wide_head * dk_sh
    DV += wide_head * dv_sh
    if CU_Q is not None:
        far = far * 0
        if batch == batches:
            blank(DK, dk_st, k_start, 0, 1, k_len, HEAD_DIM, BLOCK_N, BLOCK_D)
            blank(DV, dv_st, k_start, 0, 1, k_len, VALUE_DIM, BLOCK_N, BLOCK_V)
            blank(DQ, dq_st, q_start, 0, 1, q_len, HEAD_DIM, BLOCK_N, BLOCK_D)
            return
    column = tl.arange(0, BLOCK_N)
    there = column < k_len
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_V)
    place = (k_start + column.to(tl.int64))[:, None]
    k_place = K + far * k_sb + wide_head * k_sh + place * k_st + d[None, :]
    k_mask = there[:, None] & (d < HEAD_DIM)[None, :]
    v_mask = there[:, None] & (dv < VALUE_DIM)[None, :]
    # dQ is a sum over all keys: an unsound one that only some rows see must not meet the zeros of the others.
    sound = there
    if SCAN:
        sound = there & sound_rows(k_place, k_mask)
    k = tl.load(k_place, mask=sound[:, None] & (d < HEAD_DIM)[None, :], other=0.0)  # [BLOCK_N, BLOCK_D]
    v = tl.load(V + far * v_sb + wide_head * v_sh + place * v_st + dv[None, :], mask=v_mask, other=0.0)
    offset = 0
    if BOTTOM_RIGHT:
        offset = k_len - q_len
    seed = 0
    if DROPOUT:
        seed = tl.load(SEED)
    mask_q *= MASK_UNIT
    if MASK is not None:
        MASK += (batch.to(tl.int64) * mask_b + wide_head * mask_h) * MASK_UNIT
    column_inside, key_bias = visible_keys(MASK, column, k_len, mask_k, BOOL_MASK, KEY_MASK, True)
    rows = far * l_sb + wide_head * l_sh + q_start
    if DLSE is not None:
        DLSE += far * dl_sb + wide_head * dl_sh + q_start * dl_st
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_ = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for start in range(0, BLOCK_M if ONCE else q_len, BLOCK_M):
        dk, dv_ = _add_rows(
            dk, dv_, k, v, sound, Q + far * q_sb + wide_head * q_sh + q_start * q_st,
            DO + far * do_sb + wide_head * do_sh + q_start * do_st, LSE + rows, DLSE, DELTA + rows,
            DQ + far * dq_sb + q_start * dq_st, MASK, start, column, column_inside, key_bias, offset, q_len,
            q_st, do_st, dl_st, dq_st, mask_q, mask_k, slope_of(SLOPES, batch, head, slope_b), seed,
            batch * heads + head, threshold, keep_scale, scale, scale_in, scale_out, left, right,
            CAUSAL, LEFT, RIGHT, BOOL_MASK, KEY_MASK, SOFTCAP, ALIBI, DROPOUT, SCAN, HEAD_DIM, VALUE_DIM,
            BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_V, PRECISION,
        )  # fmt: skip
    tl.store(DK + far * dk_sb + place * dk_st + d[None, :], (dk * scale).to(DK.dtype.element_ty), mask=k_mask)
    tl.store(DV + far * dv_sb + place * dv_st + dv[None, :], dv_.to(DV.dtype.element_ty), mask=v_mask)
