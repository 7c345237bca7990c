"""The backward pass's second kernel: dK and dV of a tile of keys, over the rows of all query heads that share them.

The probabilities are recomputed from the LSE. Hidden places are selected away from the scores' gradient.
"""

import triton
import triton.language as tl

from fastformer.kernels.attention.score import (
    CHANGING,
    LOG2E,
    blank,
    kept_tile,
    row_range,
    score_tile,
    sequence,
    slope_of,
    visible_keys,
)
from fastformer.kernels.launch import launcher


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
@triton.jit(do_not_specialize=CHANGING)
def backward_key(
    Q, K, V, DO, LSE, DELTA, DK, DV, MASK, SLOPES, SEED, CU_Q, CU_K,
    q_sb, q_sh, q_st, k_sb, k_sh, k_st, v_sb, v_sh, v_st, do_sb, do_sh, do_st, dk_sb, dk_sh, dk_st,
    dv_sb, dv_sh, dv_st, l_sb, l_sh, mask_b, mask_h, mask_q, mask_k, slope_b,
    tiles, heads, q_len, k_len, tokens, batches, scale, scale_in, scale_out, left, right, threshold, keep_scale,
    GROUP: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    BOOL_MASK: tl.constexpr, KEY_MASK: tl.constexpr, MASK_UNIT: tl.constexpr, SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
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
    mask_q *= MASK_UNIT
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
            mask_of = MASK + (batch.to(tl.int64) * mask_b + q_head * mask_h) * MASK_UNIT
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
