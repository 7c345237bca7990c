"""The backward pass's first kernel: dQ of a tile of queries, walking over keys, and delta = rowsum(dO * O) - dLSE.

The probabilities are recomputed from the LSE. Hidden places are selected away from the scores' gradient. Unsound keys
are left unread as in forward.
"""

import triton
import triton.language as tl

from fastformer.kernels.attention.score import (
    CHANGING,
    LOG2E,
    blank,
    kept_tile,
    key_range,
    score_tile,
    sequence,
    slope_of,
    sound_rows,
    visible_keys,
)
from fastformer.kernels.launch import launcher


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
@triton.jit(do_not_specialize=CHANGING)
def backward_query(
    Q, K, V, OUT, DO, LSE, DLSE, DELTA, DQ, MASK, SLOPES, SEED, CU_Q, CU_K,
    q_sb, q_sh, q_st, k_sb, k_sh, k_st, v_sb, v_sh, v_st, o_sb, o_sh, o_st, do_sb, do_sh, do_st, dq_sb, dq_sh, dq_st,
    l_sb, l_sh, dl_sb, dl_sh, dl_st, mask_b, mask_h, mask_q, mask_k, slope_b,
    tiles, heads, q_len, k_len, tokens, batches, scale, scale_in, scale_out, left, right, threshold, keep_scale,
    GROUP: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    BOOL_MASK: tl.constexpr, KEY_MASK: tl.constexpr, MASK_UNIT: tl.constexpr, SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
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
        MASK += (batch.to(tl.int64) * mask_b + wide_head * mask_h) * MASK_UNIT
    slope = slope_of(SLOPES, batch, head, slope_b)
    plane = batch * heads + head
    mask_q *= MASK_UNIT
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
