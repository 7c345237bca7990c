"""dK and dV for Hopper, in Gluon: after the dQ kernel, without atomics, as the portable one.

- Head dimensions 64 and 128: one program takes 128 keys of one key head. Two consumers hold 64 keys each, with the sums
  for dK and dV in registers. 256: the two sums of 64 keys fill 256 registers a thread, so a program takes 64 keys, one
  consumer sums dV and the other dK; scores are then computed twice, five products instead of four.
- A producer brings tiles of queries, their gradients, LSE and delta by TMA, for all query heads that share the keys.
- Tiles lie transposed, keys by queries, so that probabilities go from registers into the products that sum over
  queries. The product for dV runs while the gradient of the scores is computed.
- LSE and delta belong to columns then, a quarter of a tile's in each thread: read from shared memory where they are
  used, they do not stay in registers.
- Query rows past the end of their sequence, and rows that see no key, have probability 0; in the few tiles that hold
  such rows the consumers zero their memory, for it may hold NaN.
"""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fastformer.kernels.attention.hopper_gluon import barriers, held, tma_load
from fastformer.kernels.attention.hopper_shared import (
    CONSUMERS,
    LN2,
    LOG2E,
    PART,
    ROWS,
    blank,
    row_range,
    seeing_rows,
    tanh,
    whole_layout,
    wide_layout,
)


@gluon.jit
def _produce(
    Q, K, V, DO, LSE, DELTA, k_smem, v_smem, q_smem, do_smem, lse_smem, delta_smem, kv_full, full, empty,
    k_row, k_column, v_row, v_column, q_row, q_rh, q_column, q_ch, do_row, do_rh, do_column, do_ch, l_row, l_sh,
    front, checked, tiles,
    GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Brings keys and values, then tiles of queries, gradients, LSE and delta.

    Of each head's `tiles` tiles `checked` are to be checked: `front` before the whole ones, the others behind these.
    Those of all heads come first, then the whole ones of all heads.
    """
    mbarrier.expect(kv_full.index(0), BLOCK_N * HEAD_DIM * 4)
    tma_load(K, [k_row, k_column], kv_full.index(0), k_smem.index(0))
    tma_load(V, [v_row, v_column], kv_full.index(0), v_smem.index(0))
    for step in range(tiles * GROUP):
        if step < checked * GROUP:
            shared = step // checked
            tile = step % checked
            if tile >= front:
                tile += tiles - checked
        else:
            shared = (step - checked * GROUP) // (tiles - checked)
            tile = front + (step - checked * GROUP) % (tiles - checked)
        down = tile * BLOCK_M
        stage = step % STAGES
        mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
        mbarrier.expect(full.index(stage), BLOCK_M * (HEAD_DIM * 4 + 8))
        tma_load(Q, [q_row + shared * q_rh + down, q_column + shared * q_ch], full.index(stage), q_smem.index(stage))
        tma_load(
            DO, [do_row + shared * do_rh + down, do_column + shared * do_ch], full.index(stage), do_smem.index(stage)
        )
        tma_load(LSE, [l_row + shared * l_sh + down], full.index(stage), lse_smem.index(stage))
        tma_load(DELTA, [l_row + shared * l_sh + down], full.index(stage), delta_smem.index(stage))


@gluon.jit
def _clear(
    q, do, lse, length, meet, met, WHICH: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr,
):  # fmt: skip
    """Zeroes the queries and gradients of rows that count nothing, if there are any; each consumer its share.

    Args:
        q, do: [BLOCK_M, HEAD_DIM], arrived. lse: [BLOCK_M], likewise.
        length: how many of these rows there are before the end of the sequence.
        met: phases of `meet` that are over.

    Returns:
        phases of `meet` that are over now.
    """
    vector: gl.constexpr = whole_layout(BLOCK_M)
    alive = (lse.load(vector) != float("-inf")) & (gl.arange(0, BLOCK_M, vector) < length)
    if gl.min(alive.to(gl.int32), 0) == 0:
        rows: gl.constexpr = wide_layout(HEAD_DIM)
        row: gl.constexpr = gl.SliceLayout(1, rows)
        for part in gl.static_range(WHICH, BLOCK_M // PART, CONSUMERS):
            inside = part * PART + gl.arange(0, PART, row) < length
            kept = (lse.slice(part * PART, PART).load(row) != float("-inf")) & inside
            queries = q.slice(part * PART, PART)
            x = queries.load(rows)
            queries.store(gl.where(kept[:, None], x, gl.zeros_like(x)))
            gradients = do.slice(part * PART, PART)
            y = gradients.load(rows)
            gradients.store(gl.where(kept[:, None], y, gl.zeros_like(y)))
        fence_async_shared()
        mbarrier.arrive(meet.index(0), count=1)
        mbarrier.wait(meet.index(0), met & 1)
        met += 1
    return met


@gluon.jit
def _add_rows(
    dk, dv, met, k_smem, v_smem, q_smem, do_smem, lse_smem, delta_smem, full, empty, meet, step, first, last, diagonal,
    limit, scale_in, scale_out,
    WHICH: gl.constexpr, PLACE: gl.constexpr, WANT_DK: gl.constexpr, WANT_DV: gl.constexpr, LATER: gl.constexpr,
    SOFTCAP: gl.constexpr, CHECK: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
    DTYPE: gl.constexpr,
):  # fmt: skip
    """Adds to dk and dv, as far as they are wanted, what a tile of queries contributes.

    Args:
        first, last: rows that see each of the consumer's keys, as seeing_rows gives them for keys from 0.
        diagonal: the tile's first row, so numbered.
        limit: the row behind the last of the sequence.
    """
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    sums_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    left_layout: gl.constexpr = gl.DotOperandLayout(0, sums_layout, 2)
    stat_layout: gl.constexpr = gl.SliceLayout(0, scores_layout)
    stage = step % STAGES
    mbarrier.wait(full.index(stage), (step // STAGES) & 1)
    # Of a place that the compiler does not know: it would keep the addresses of all their parts, two registers each.
    place = held(0)
    k = k_smem.index(place).slice(PLACE, ROWS)
    v = v_smem.index(place).slice(PLACE, ROWS)
    q = q_smem.index(stage)
    do = do_smem.index(stage)
    lse_of = lse_smem.index(stage)
    if CHECK:
        met = _clear(q, do, lse_of, limit - diagonal, meet, met, WHICH, HEAD_DIM, BLOCK_M)
    scores = gl.zeros([ROWS, BLOCK_M], gl.float32, scores_layout)
    scores = warpgroup_mma(k, q.permute((1, 0)), scores, use_acc=False, is_async=True)
    # Both at once; but where much is compared, registers do not suffice for it.
    if WANT_DK:
        dp = gl.zeros([ROWS, BLOCK_M], gl.float32, scores_layout)
    if WANT_DK and not CHECK:
        dp = warpgroup_mma(v, do.permute((1, 0)), dp, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(1, deps=[scores])
    else:
        scores = warpgroup_mma_wait(0, deps=[scores])
    lse = lse_of.load(stat_layout)
    if SOFTCAP:
        bent = tanh(scores * scale_in)
        slack = 1.0 - bent * bent
        weights = gl.exp2(bent * scale_out - (lse * LOG2E)[None, :])
    else:
        weights = gl.exp2(scores * scale_in - (lse * LOG2E)[None, :])
    if CHECK:
        row = diagonal + gl.arange(0, BLOCK_M, stat_layout)
        seen = (lse != float("-inf"))[None, :] & (row[None, :] <= last[:, None])
        if LATER:
            seen = seen & (row[None, :] >= first[:, None])
        weights = gl.where(seen, weights, 0.0)
    if WANT_DV:
        factor = gl.convert_layout(weights.to(DTYPE), left_layout)
        dv = warpgroup_mma(factor, do, dv, is_async=True)
    if WANT_DK:
        if not CHECK:
            dp = warpgroup_mma_wait(1 if WANT_DV else 0, deps=[dp])
        else:
            dp = warpgroup_mma(v, do.permute((1, 0)), dp, use_acc=False, is_async=True)
            if WANT_DV:
                dp, dv, factor = warpgroup_mma_wait(0, deps=[dp, dv, factor])
            else:
                dp = warpgroup_mma_wait(0, deps=[dp])
        ds = weights * (dp - delta_smem.index(stage).load(stat_layout)[None, :])
        if SOFTCAP:
            ds = ds * slack
        if CHECK:
            ds = gl.where(seen, ds, 0.0)
        other = gl.convert_layout(ds.to(DTYPE), left_layout)
        dk = warpgroup_mma(other, q, dk, is_async=True)
        if WANT_DV and not CHECK:
            dk, dv, factor, other = warpgroup_mma_wait(0, deps=[dk, dv, factor, other])
        else:
            dk, other = warpgroup_mma_wait(0, deps=[dk, other])
    else:
        dv, factor = warpgroup_mma_wait(0, deps=[dv, factor])
    mbarrier.arrive(empty.index(stage), count=1)
    return dk, dv, met


@gluon.jit
def _consume(
    k_smem, v_smem, q_smem, do_smem, lse_smem, delta_smem, kv_full, full, empty, meet, diagonal, limit, left, right,
    scale_in, scale_out, front, checked, tiles,
    WHICH: gl.constexpr, SPLIT: gl.constexpr, GROUP: gl.constexpr, CAUSAL: gl.constexpr, LEFT: gl.constexpr,
    RIGHT: gl.constexpr, SOFTCAP: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dK and dV of ROWS keys, left where these and their values lay; with SPLIT consumer 0 leaves dV, 1 leaves dK.

    Args:
        diagonal, limit: as in _add_rows, for the first tile and the program's keys.
        front, checked, tiles: as in _produce.
    """
    DTYPE: gl.constexpr = k_smem.dtype
    WANT_DK: gl.constexpr = not SPLIT or WHICH == 1
    WANT_DV: gl.constexpr = not SPLIT or WHICH == 0
    PLACE: gl.constexpr = 0 if SPLIT else WHICH * ROWS
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    sums_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    diagonal -= PLACE
    limit -= PLACE
    column = gl.arange(0, ROWS, gl.SliceLayout(1, scores_layout))
    first, last = seeing_rows(column, limit, left, right, CAUSAL, LEFT, RIGHT)
    dk = gl.zeros([ROWS, HEAD_DIM], gl.float32, sums_layout)
    dv = gl.zeros([ROWS, HEAD_DIM], gl.float32, sums_layout)
    met = 0
    mbarrier.wait(kv_full.index(0), 0)
    i = 0
    for step in range(checked * GROUP):
        start = gl.where(i < front, i, i + tiles - checked) * BLOCK_M
        dk, dv, met = _add_rows(
            dk, dv, met, k_smem, v_smem, q_smem, do_smem, lse_smem, delta_smem, full, empty, meet, step, first, last,
            diagonal + start, limit, scale_in, scale_out, WHICH, PLACE, WANT_DK, WANT_DV, CAUSAL or RIGHT, SOFTCAP,
            True, HEAD_DIM, BLOCK_M, STAGES, DTYPE,
        )  # fmt: skip
        i = gl.where(i + 1 == checked, 0, i + 1)
    for step in range(checked * GROUP, tiles * GROUP):
        dk, dv, met = _add_rows(
            dk, dv, met, k_smem, v_smem, q_smem, do_smem, lse_smem, delta_smem, full, empty, meet, step, first, last,
            diagonal, limit, scale_in, scale_out, WHICH, PLACE, WANT_DK, WANT_DV, CAUSAL or RIGHT, SOFTCAP, False,
            HEAD_DIM, BLOCK_M, STAGES, DTYPE,
        )  # fmt: skip
    if SPLIT:
        # Both have read all of the keys and values.
        mbarrier.arrive(meet.index(0), count=1)
        mbarrier.wait(meet.index(0), met & 1)
    if WANT_DK:
        scale = scale_in * LN2  # both are in base 2
        if SOFTCAP:
            scale *= scale_out
        k_smem.index(0).slice(PLACE, ROWS).store((dk * scale).to(DTYPE))
    if WANT_DV:
        v_smem.index(0).slice(PLACE, ROWS).store(dv.to(DTYPE))


@gluon.jit(do_not_specialize=["tiles", "planes", "q_len", "k_len", "tokens", "left", "right", "q_rb", "q_rh", "q_ch",
                              "k_rb", "k_rh", "k_ch", "v_rb", "v_rh", "v_ch", "do_rb", "do_rh", "do_ch",
                              "l_sb", "l_sh"])  # fmt: skip
def backward_key_kernel(
    Q, K, V, DO, LSE, DELTA, DK, DV, CU_Q, CU_K, q_rb, q_rh, q_ch, k_rb, k_rh, k_ch, v_rb, v_rh, v_ch,
    do_rb, do_rh, do_ch, dk_sb, dk_sh, dk_st, l_sb, l_sh, tiles, kv_heads, planes, q_len, k_len, tokens,
    scale_in, scale_out, left, right,
    GROUP: gl.constexpr, BOTTOM_RIGHT: gl.constexpr, CAUSAL: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr,
    SOFTCAP: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dK and dV of 128 keys (head dimension 256: 64) of one key head of one sequence.

    Args:
        Q, K, V, DO: 2-D descriptors as in the forward kernel. LSE, DELTA: 1-D ones; the row t of head h of sequence b
            lies at b * l_sb + h * l_sh + t. DK and DV have the same strides.
        planes: sequences times key heads (packed: with one more sequence, the tokens after the last boundary).
    """
    SPLIT: gl.constexpr = HEAD_DIM > 128
    BLOCK_N: gl.constexpr = ROWS if SPLIT else CONSUMERS * ROWS
    program = held(gl.program_id(0))
    # The first keys, which causal rows see most, first; programs of one sequence's heads beside each other.
    tile = program // planes
    plane = program % planes
    batch = plane // kv_heads
    kv_head = plane % kv_heads
    q_start = 0
    k_start = 0
    first_key = tile * BLOCK_N
    DK += kv_head.to(gl.int64) * dk_sh
    DV += kv_head.to(gl.int64) * dk_sh
    if CU_K is not None:
        k_start = gl.load(CU_K + batch)
        if batch == planes // kv_heads - 1:
            there = k_start.to(gl.int64) * dk_st
            end = tokens - k_start
            for half in gl.static_range(BLOCK_N // ROWS):
                first = first_key + half * ROWS
                blank(DK + there, None, 0.0, dk_st, first, end, tiles * BLOCK_N, HEAD_DIM)
                blank(DV + there, None, 0.0, dk_st, first, end, tiles * BLOCK_N, HEAD_DIM)
            return
        k_len = gl.load(CU_K + batch + 1) - k_start
        q_start = gl.load(CU_Q + batch)
        q_len = gl.load(CU_Q + batch + 1) - q_start
        batch = batch * 0
        if first_key >= k_len:
            return
    else:
        q_len = held(q_len)
    DK += batch.to(gl.int64) * dk_sb + (k_start + first_key).to(gl.int64) * dk_st
    DV += batch.to(gl.int64) * dk_sb + (k_start + first_key).to(gl.int64) * dk_st
    offset = 0
    if BOTTOM_RIGHT:
        offset = k_len - q_len
    last = gl.minimum(first_key + BLOCK_N, k_len) - 1
    begin, whole_begin, whole_end, end = row_range(first_key, last, offset, q_len, left, right, CAUSAL, LEFT, RIGHT)
    # In tiles of queries: [first_tile, end_tile) are walked, and [whole_first, whole_last) see all of these keys.
    first_tile = begin // BLOCK_M
    end_tile = gl.cdiv(end, BLOCK_M)
    count = end_tile - first_tile
    if count <= 0:
        end = gl.minimum(BLOCK_N, k_len - first_key)
        blank(DK, None, 0.0, dk_st, 0, end, ROWS, HEAD_DIM)
        blank(DV, None, 0.0, dk_st, 0, end, ROWS, HEAD_DIM)
        return
    whole_first = gl.minimum(gl.cdiv(whole_begin, BLOCK_M), end_tile)
    whole_last = gl.maximum(gl.minimum(whole_end // BLOCK_M, end_tile), whole_first)

    smem: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    vector: gl.constexpr = gl.NVMMASharedLayout(0, 32, 1)
    DTYPE: gl.constexpr = DK.dtype.element_ty
    k_smem = gl.allocate_shared_memory(DTYPE, [1, BLOCK_N, HEAD_DIM], smem)
    v_smem = gl.allocate_shared_memory(DTYPE, [1, BLOCK_N, HEAD_DIM], smem)
    q_smem = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_M, HEAD_DIM], smem)
    do_smem = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_M, HEAD_DIM], smem)
    lse_smem = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], vector)
    delta_smem = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], vector)
    kv_full = barriers(1, 1)
    full = barriers(STAGES, 1)
    empty = barriers(STAGES, CONSUMERS)
    meet = barriers(1, CONSUMERS)
    fence_async_shared()  # the barriers, for TMA
    front = whole_first - first_tile
    checked = front + end_tile - whole_last
    first_row = first_tile * BLOCK_M
    to_key = offset - first_key  # what is added to a row to compare it with the number of a key among these
    head = kv_head * GROUP
    query_row = q_start + first_row
    key_row = k_start + first_key
    gl.warp_specialize(
        [
            (_produce, (
                Q, K, V, DO, LSE, DELTA, k_smem, v_smem, q_smem, do_smem, lse_smem, delta_smem, kv_full, full, empty,
                batch * k_rb + kv_head * k_rh + key_row, kv_head * k_ch,
                batch * v_rb + kv_head * v_rh + key_row, kv_head * v_ch,
                batch * q_rb + head * q_rh + query_row, q_rh, head * q_ch, q_ch,
                batch * do_rb + head * do_rh + query_row, do_rh, head * do_ch, do_ch,
                batch * l_sb + head * l_sh + query_row, l_sh, front, checked, count,
                GROUP, HEAD_DIM, BLOCK_N, BLOCK_M, STAGES,
            )),
            (_consume, (
                k_smem, v_smem, q_smem, do_smem, lse_smem, delta_smem, kv_full, full, empty, meet,
                first_row + to_key, q_len + to_key, left, right, scale_in, scale_out, front, checked, count, 0, SPLIT,
                GROUP, CAUSAL, LEFT, RIGHT, SOFTCAP, HEAD_DIM, BLOCK_M, STAGES,
            )),
            (_consume, (
                k_smem, v_smem, q_smem, do_smem, lse_smem, delta_smem, kv_full, full, empty, meet,
                first_row + to_key, q_len + to_key, left, right, scale_in, scale_out, front, checked, count, 1, SPLIT,
                GROUP, CAUSAL, LEFT, RIGHT, SOFTCAP, HEAD_DIM, BLOCK_M, STAGES,
            )),
        ],
        [4, 4],
        [216, 256] if SPLIT else [240, 240],
    )  # fmt: skip
    # Stored by the producer's warps: consumers need not hold the addresses.
    wide: gl.constexpr = wide_layout(HEAD_DIM)
    n = gl.arange(0, BLOCK_N, gl.SliceLayout(1, wide))
    d = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, wide))
    there = n[:, None] * dk_st + d[None, :]
    mask = (first_key + n < k_len)[:, None]
    gl.store(DK + there, k_smem.index(0).load(wide), mask=mask)
    gl.store(DV + there, v_smem.index(0).load(wide), mask=mask)
