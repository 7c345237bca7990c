"""Attention for head dimensions that a program cannot hold: above 256, and above 64 in fp32, whose products run without
matrix units.

- One program owns WIDE columns of its output; the scores' products walk over the head dimension in chunks.
- Programs that own other columns of the same tile compute its scores anew, which costs less than storing them.
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
    key_range,
    product,
    row_range,
    score_tile,
    sequence,
    slope_of,
    sound_in_chunks,
    start_of_row,
    visible_keys,
)
from fastformer.kernels.launch import launcher


@launcher
@triton.jit(do_not_specialize=CHANGING)
def wide_forward(
    Q, K, V, OUT, LSE, MASK, SLOPES, SINKS, SEED, CU_Q, CU_K,
    q_sb, q_sh, q_st, k_sb, k_sh, k_st, v_sb, v_sh, v_st, o_sb, o_sh, o_st, l_sb, l_sh,
    mask_b, mask_h, mask_q, mask_k, slope_b, tiles, heads, q_len, k_len, tokens, batches, scale_in, scale_out,
    left, right, threshold, keep_scale,
    head_dim, value_dim,
    GROUP: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    BOOL_MASK: tl.constexpr, KEY_MASK: tl.constexpr, MASK_UNIT: tl.constexpr, SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, CHUNK: tl.constexpr, WIDE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows and WIDE columns of one head's output."""
    SCAN: tl.constexpr = CAUSAL or LEFT or RIGHT or (MASK is not None and not KEY_MASK)
    ALIBI: tl.constexpr = SLOPES is not None
    part = tl.program_id(0) % PARTS
    program = tl.program_id(0) // PARTS
    tile = program % tiles
    head = (program // tiles) % heads
    batch = program // tiles // heads
    q_start, q_len = sequence(batch, CU_Q, q_len, tokens, batches)
    k_start, k_len = sequence(batch, CU_K, k_len, 0, batches)
    far = batch.to(tl.int64)
    wide_head = head.to(tl.int64)
    dv = part * WIDE + tl.arange(0, WIDE)
    LSE += wide_head * l_sh
    OUT += wide_head * o_sh
    if CU_Q is not None:
        far = far * 0
        if batch == batches:
            blank(OUT + part * WIDE, o_st, q_start, tile, tiles, q_len, value_dim - part * WIDE, BLOCK_M, WIDE)
            blank_rows(LSE, q_start, tile, tiles, q_len if part == 0 else 0, BLOCK_M)
            return
    row_start = tile * BLOCK_M
    if row_start >= q_len:
        return
    kv_head = wide_head // GROUP
    row = row_start + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    wide = (q_start + row_start) + tl.arange(0, BLOCK_M).to(tl.int64)
    q_of = Q + far * q_sb + wide_head * q_sh + wide * q_st
    offset = 0
    if BOTTOM_RIGHT:
        offset = k_len - q_len
    if MASK is not None:
        MASK += (batch.to(tl.int64) * mask_b + wide_head * mask_h) * MASK_UNIT
    slope = slope_of(SLOPES, batch, head, slope_b)
    seed = 0
    if DROPOUT:
        seed = tl.load(SEED)
    peak, total = start_of_row(SINKS, head, BLOCK_M)
    acc = tl.zeros([BLOCK_M, WIDE], tl.float32)
    mask_q *= MASK_UNIT
    last = tl.minimum(row_start + BLOCK_M, q_len) - 1
    begin, _from, _to, end = key_range(row_start, last, offset, k_len, left, right, CAUSAL, LEFT, RIGHT)
    for start in tl.range(begin // BLOCK_N * BLOCK_N, end, BLOCK_N, num_stages=1):
        column = start + n
        inside, key_bias = visible_keys(MASK, column, k_len, mask_k, BOOL_MASK, KEY_MASK, True)
        place = (k_start + start) + n.to(tl.int64)
        v_of = V + far * v_sb + kv_head * v_sh + place * v_st
        qk = product(
            q_of, row < q_len, K + far * k_sb + kv_head * k_sh + place * k_st, inside, head_dim,
            BLOCK_M, BLOCK_N, CHUNK, PRECISION,
        )  # fmt: skip
        read = inside
        if SCAN:
            sound = sound_in_chunks(v_of, inside, value_dim, BLOCK_N, CHUNK)
            qk = tl.where(sound[None, :], qk, float("nan"))
            read = inside & sound
        v = tl.load(v_of[:, None] + dv[None, :], mask=read[:, None] & (dv < value_dim)[None, :], other=0.0)
        scores, seen, _slack = score_tile(
            qk, row[:, None], column[None, :], (row < q_len)[:, None], inside[None, :],
            key_bias[None, :] if KEY_MASK and not BOOL_MASK else 0.0, offset, MASK, mask_q, mask_k, slope,
            scale_in, scale_out, left, right, CAUSAL, LEFT, RIGHT, BOOL_MASK, KEY_MASK, SOFTCAP, ALIBI, True,
        )  # fmt: skip
        scores = tl.where(seen, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp2(scores - base[:, None])
        fade = tl.exp2(peak - base)
        total = total * fade + tl.sum(weights, 1)
        if DROPOUT:
            kept = kept_tile(seed, threshold, batch * heads + head, row_start, start, BLOCK_M, BLOCK_N)
            weights = tl.where(kept, weights * keep_scale, 0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
        peak = new_peak
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    lse = tl.where(empty, float("-inf"), peak * LN2 + tl.log(total))
    tl.store(LSE + far * l_sb + wide, lse, mask=(row < q_len) & (part == 0))
    tl.store(
        OUT + far * o_sb + wide[:, None] * o_st + dv[None, :],
        (acc / total[:, None]).to(OUT.dtype.element_ty),
        mask=(row < q_len)[:, None] & (dv < value_dim)[None, :],
    )


@launcher
@triton.jit(do_not_specialize=CHANGING)
def wide_query(
    Q, K, V, OUT, DO, LSE, DLSE, DELTA, DQ, MASK, SLOPES, SEED, CU_Q, CU_K,
    q_sb, q_sh, q_st, k_sb, k_sh, k_st, v_sb, v_sh, v_st, o_sb, o_sh, o_st, do_sb, do_sh, do_st, dq_sb, dq_sh, dq_st,
    l_sb, l_sh, dl_sb, dl_sh, dl_st, mask_b, mask_h, mask_q, mask_k, slope_b,
    tiles, heads, q_len, k_len, tokens, batches, scale, scale_in, scale_out, left, right, threshold, keep_scale,
    head_dim, value_dim,
    GROUP: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    BOOL_MASK: tl.constexpr, KEY_MASK: tl.constexpr, MASK_UNIT: tl.constexpr, SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, CHUNK: tl.constexpr, WIDE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """WIDE columns of dQ of BLOCK_M query rows of one head, and delta."""
    SCAN: tl.constexpr = CAUSAL or LEFT or RIGHT or (MASK is not None and not KEY_MASK)
    ALIBI: tl.constexpr = SLOPES is not None
    part = tl.program_id(0) % PARTS
    program = tl.program_id(0) // PARTS
    tile = program % tiles
    head = (program // tiles) % heads
    batch = program // tiles // heads
    q_start, q_len = sequence(batch, CU_Q, q_len, tokens, batches)
    k_start, k_len = sequence(batch, CU_K, k_len, 0, batches)
    far = batch.to(tl.int64)
    wide_head = head.to(tl.int64)
    d = part * WIDE + tl.arange(0, WIDE)
    DQ += wide_head * dq_sh
    if CU_Q is not None:
        far = far * 0
        if batch == batches:
            blank(DQ + part * WIDE, dq_st, q_start, tile, tiles, q_len, head_dim - part * WIDE, BLOCK_M, WIDE)
            return
    row_start = tile * BLOCK_M
    if row_start >= q_len:
        return
    kv_head = wide_head // GROUP
    row = row_start + tl.arange(0, BLOCK_M)
    valid = row < q_len
    n = tl.arange(0, BLOCK_N)
    wide = (q_start + row_start) + tl.arange(0, BLOCK_M).to(tl.int64)
    q_of = Q + far * q_sb + wide_head * q_sh + wide * q_st
    do_of = DO + far * do_sb + wide_head * do_sh + wide * do_st
    o_of = OUT + far * o_sb + wide_head * o_sh + wide * o_st
    delta = tl.zeros([BLOCK_M], tl.float32)
    for first in tl.range(0, value_dim, CHUNK, num_stages=1):
        dv = first + tl.arange(0, CHUNK)
        v_mask = valid[:, None] & (dv < value_dim)[None, :]
        do = tl.load(do_of[:, None] + dv[None, :], mask=v_mask, other=0.0).to(tl.float32)
        delta += tl.sum(do * tl.load(o_of[:, None] + dv[None, :], mask=v_mask, other=0.0).to(tl.float32), 1)
    if DLSE is not None:
        delta -= tl.load(DLSE + far * dl_sb + wide_head * dl_sh + wide * dl_st, mask=valid, other=0.0)
    rows_of_head = far * l_sb + wide_head * l_sh + wide
    lse = tl.load(LSE + rows_of_head, mask=valid, other=float("inf"))
    empty = lse == float("-inf")
    lse = tl.where(empty, float("inf"), lse * LOG2E)
    delta = tl.where(empty, 0.0, delta)
    tl.store(DELTA + rows_of_head, delta, mask=valid & (part == 0))

    offset = 0
    if BOTTOM_RIGHT:
        offset = k_len - q_len
    if MASK is not None:
        MASK += (batch.to(tl.int64) * mask_b + wide_head * mask_h) * MASK_UNIT
    slope = slope_of(SLOPES, batch, head, slope_b)
    seed = 0
    if DROPOUT:
        seed = tl.load(SEED)
    mask_q *= MASK_UNIT
    last = tl.minimum(row_start + BLOCK_M, q_len) - 1
    begin, _from, _to, end = key_range(row_start, last, offset, k_len, left, right, CAUSAL, LEFT, RIGHT)
    dq = tl.zeros([BLOCK_M, WIDE], tl.float32)
    for start in tl.range(begin // BLOCK_N * BLOCK_N, end, BLOCK_N, num_stages=1):
        column = start + n
        inside, key_bias = visible_keys(MASK, column, k_len, mask_k, BOOL_MASK, KEY_MASK, True)
        place = (k_start + start) + n.to(tl.int64)
        k_of = K + far * k_sb + kv_head * k_sh + place * k_st
        qk = product(q_of, valid, k_of, inside, head_dim, BLOCK_M, BLOCK_N, CHUNK, PRECISION)
        read = inside
        if SCAN:
            sound = sound_in_chunks(k_of, inside, head_dim, BLOCK_N, CHUNK)
            qk = tl.where(sound[None, :], qk, float("nan"))
            read = inside & sound
        scores, seen, slack = score_tile(
            qk, row[:, None], column[None, :], valid[:, None], inside[None, :],
            key_bias[None, :] if KEY_MASK and not BOOL_MASK else 0.0, offset, MASK, mask_q, mask_k, slope,
            scale_in, scale_out, left, right, CAUSAL, LEFT, RIGHT, BOOL_MASK, KEY_MASK, SOFTCAP, ALIBI, True,
        )  # fmt: skip
        weights = tl.exp2(scores - lse[:, None])
        dp = product(
            do_of, valid, V + far * v_sb + kv_head * v_sh + place * v_st, inside, value_dim,
            BLOCK_M, BLOCK_N, CHUNK, PRECISION,
        )  # fmt: skip
        if DROPOUT:
            kept = kept_tile(seed, threshold, batch * heads + head, row_start, start, BLOCK_M, BLOCK_N)
            dp = tl.where(kept, dp * keep_scale, 0.0)
        ds = tl.where(seen, weights * (dp - delta[:, None]) * slack, 0.0)
        k = tl.load(k_of[:, None] + d[None, :], mask=read[:, None] & (d < head_dim)[None, :], other=0.0)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    tl.store(
        DQ + far * dq_sb + wide[:, None] * dq_st + d[None, :],
        (dq * scale).to(DQ.dtype.element_ty),
        mask=valid[:, None] & (d < head_dim)[None, :],
    )


@launcher
@triton.jit(do_not_specialize=CHANGING)
def wide_key(
    Q, K, V, DO, LSE, DELTA, DK, DV, MASK, SLOPES, SEED, CU_Q, CU_K,
    q_sb, q_sh, q_st, k_sb, k_sh, k_st, v_sb, v_sh, v_st, do_sb, do_sh, do_st, dk_sb, dk_sh, dk_st,
    dv_sb, dv_sh, dv_st, l_sb, l_sh, mask_b, mask_h, mask_q, mask_k, slope_b,
    tiles, heads, q_len, k_len, tokens, batches, scale, scale_in, scale_out, left, right, threshold, keep_scale,
    head_dim, value_dim,
    GROUP: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    BOOL_MASK: tl.constexpr, KEY_MASK: tl.constexpr, MASK_UNIT: tl.constexpr, SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, CHUNK: tl.constexpr, WIDE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """WIDE columns of dK and of dV of BLOCK_N keys of one key head."""
    ALIBI: tl.constexpr = SLOPES is not None
    part = tl.program_id(0) % PARTS
    program = tl.program_id(0) // PARTS
    kv_heads = heads // GROUP
    tile = program % tiles
    kv_head = (program // tiles) % kv_heads
    batch = program // tiles // kv_heads
    q_start, q_len = sequence(batch, CU_Q, q_len, 0, batches)
    k_start, k_len = sequence(batch, CU_K, k_len, tokens, batches)
    far = batch.to(tl.int64)
    wide_head = kv_head.to(tl.int64)
    own = part * WIDE + tl.arange(0, WIDE)
    DK += wide_head * dk_sh
    DV += wide_head * dv_sh
    if CU_Q is not None:
        far = far * 0
        if batch == batches:
            first = part * WIDE
            blank(DK + first, dk_st, k_start, tile, tiles, k_len, head_dim - first, BLOCK_N, WIDE)
            blank(DV + first, dv_st, k_start, tile, tiles, k_len, value_dim - first, BLOCK_N, WIDE)
            return
    column_start = tile * BLOCK_N
    if column_start >= k_len:
        return
    column = column_start + tl.arange(0, BLOCK_N)
    there = column < k_len
    m = tl.arange(0, BLOCK_M)
    wide = (k_start + column_start) + tl.arange(0, BLOCK_N).to(tl.int64)
    k_of = K + far * k_sb + wide_head * k_sh + wide * k_st
    v_of = V + far * v_sb + wide_head * v_sh + wide * v_st
    offset = 0
    if BOTTOM_RIGHT:
        offset = k_len - q_len
    seed = 0
    if DROPOUT:
        seed = tl.load(SEED)
    mask_q *= MASK_UNIT
    last = tl.minimum(column_start + BLOCK_N, k_len) - 1
    begin, _from, _to, end = row_range(column_start, last, offset, q_len, left, right, CAUSAL, LEFT, RIGHT)
    dk = tl.zeros([BLOCK_N, WIDE], tl.float32)
    dv = tl.zeros([BLOCK_N, WIDE], tl.float32)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        q_head = head.to(tl.int64)
        slope = slope_of(SLOPES, batch, head, slope_b)
        mask_of = MASK
        if MASK is not None:
            mask_of = MASK + (batch.to(tl.int64) * mask_b + q_head * mask_h) * MASK_UNIT
        inside, key_bias = visible_keys(mask_of, column, k_len, mask_k, BOOL_MASK, KEY_MASK, True)
        for start in tl.range(begin // BLOCK_M * BLOCK_M, end, BLOCK_M, num_stages=1):
            row = start + m
            place = (q_start + start) + m.to(tl.int64)
            rows_of_head = far * l_sb + q_head * l_sh + place
            lse = tl.load(LSE + rows_of_head, mask=row < q_len, other=float("-inf"))
            valid = lse != float("-inf")  # the other rows have nothing to attend to, and what they hold stays out
            lse = tl.where(valid, lse * LOG2E, float("inf"))
            delta = tl.load(DELTA + rows_of_head, mask=valid, other=0.0)
            q_of = Q + far * q_sb + q_head * q_sh + place * q_st
            do_of = DO + far * do_sb + q_head * do_sh + place * do_st
            qk = product(k_of, there, q_of, valid, head_dim, BLOCK_N, BLOCK_M, CHUNK, PRECISION)
            scores, seen, slack = score_tile(
                qk, row[None, :], column[:, None], valid[None, :], inside[:, None],
                key_bias[:, None] if KEY_MASK and not BOOL_MASK else 0.0, offset, mask_of, mask_q, mask_k, slope,
                scale_in, scale_out, left, right, CAUSAL, LEFT, RIGHT, BOOL_MASK, KEY_MASK, SOFTCAP, ALIBI, True,
            )  # fmt: skip
            weights = tl.where(seen, tl.exp2(scores - lse[None, :]), 0.0)
            dp = product(v_of, there, do_of, valid, value_dim, BLOCK_N, BLOCK_M, CHUNK, PRECISION)
            dropped = weights
            if DROPOUT:
                kept = kept_tile(seed, threshold, batch * heads + head, start, column_start, BLOCK_M, BLOCK_N)
                kept = tl.trans(kept)
                dp = tl.where(kept, dp * keep_scale, 0.0)
                dropped = tl.where(kept, weights * keep_scale, 0.0)
            do = tl.load(do_of[:, None] + own[None, :], mask=valid[:, None] & (own < value_dim)[None, :], other=0.0)
            dv = tl.dot(dropped.to(do.dtype), do, dv, input_precision=PRECISION)
            ds = tl.where(seen, weights * (dp - delta[None, :]) * slack, 0.0)
            q = tl.load(q_of[:, None] + own[None, :], mask=valid[:, None] & (own < head_dim)[None, :], other=0.0)
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    tl.store(
        DK + far * dk_sb + wide[:, None] * dk_st + own[None, :],
        (dk * scale).to(DK.dtype.element_ty),
        mask=there[:, None] & (own < head_dim)[None, :],
    )
    tl.store(
        DV + far * dv_sb + wide[:, None] * dv_st + own[None, :],
        dv.to(DV.dtype.element_ty),
        mask=there[:, None] & (own < value_dim)[None, :],
    )
