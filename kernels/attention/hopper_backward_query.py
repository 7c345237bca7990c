"""dQ for Hopper, in Gluon, with the row sums that dK and dV need: without atomics, as the portable one.

- One program takes 128 query rows of one head. Two consumers of four warps hold 64 rows of dQ each; a producer brings
  queries and their gradients once, then keys and values by TMA through one ring of tiles: K, V, K, V, … A tile of
  values is free as soon as its product is, one of keys serves twice.
- At head dimension 256 the sum for dQ fills half of the registers: a tile of 64 keys is brought, and searched for NaN,
  as a whole, but multiplied in two halves.
- Both products of a tile are under way at once; probabilities are computed beside the second. While one consumer
  computes, the other keeps the tensor cores busy.
- Keys are walked from the last tile to the first, and the tiles at the edges of the causal band checked, as in forward.
- A consumer sums dO * O for its rows before the first tile, while the first copies are under way.
- Keys that some row must not see are searched for NaN and Inf; their rows of K become 0, and their values NaN.
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
    LOG2E,
    PROBE,
    PROBED,
    ROWS,
    blank,
    in_section,
    key_range,
    mend,
    seen_keys,
    tanh,
    wide_layout,
)


@gluon.constexpr_function
def taken(head_dim, rows):
    """Of so many rows, those that are looked at at once: as many as registers hold beside dQ."""
    return min(rows, 8192 // head_dim)


@gluon.jit
def _produce(
    Q, K, V, DO, q_smem, do_smem, ring, q_full, full, empty, q_row, q_column, do_row, do_column,
    k_row, k_column, v_row, v_column, tiles, HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """Brings queries and gradients, then keys and values of `tiles` tiles, the last ones first."""
    SIZE: gl.constexpr = BLOCK_N * HEAD_DIM * 2
    mbarrier.expect(q_full.index(0), CONSUMERS * ROWS * HEAD_DIM * 4)
    tma_load(DO, [do_row, do_column], q_full.index(0), do_smem.index(0))
    tma_load(Q, [q_row, q_column], q_full.index(0), q_smem.index(0))
    for step in range(tiles):
        slot = (2 * step) % SLOTS
        mbarrier.wait(empty.index(slot), ((2 * step // SLOTS) & 1) ^ 1)
        mbarrier.expect(full.index(slot), SIZE)
        tma_load(K, [k_row - step * BLOCK_N, k_column], full.index(slot), ring.index(slot))
        slot = (2 * step + 1) % SLOTS
        mbarrier.wait(empty.index(slot), (((2 * step + 1) // SLOTS) & 1) ^ 1)
        mbarrier.expect(full.index(slot), SIZE)
        tma_load(V, [v_row - step * BLOCK_N, v_column], full.index(slot), ring.index(slot))


@gluon.jit
def _row_sums(OUT, LSE, DLSE, DELTA, do, turn, first, q_len, o_st, dl_st, HEAD_DIM: gl.constexpr):
    """delta = rowsum(dO * O) - dLSE of ROWS rows, stored in DELTA and left in `turn`; 0 for rows that see no key.

    Pointers point to the first of these rows, which is row `first` of the sequence. do: [ROWS, HEAD_DIM], arrived.
    """
    wide: gl.constexpr = wide_layout(HEAD_DIM)
    some: gl.constexpr = taken(HEAD_DIM, ROWS)
    d = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, wide))
    for part in gl.static_range(ROWS // some):
        m = part * some + gl.arange(0, some, gl.SliceLayout(1, wide))
        inside = first + m < q_len
        out = gl.load(OUT + (m[:, None] * o_st + d[None, :]), mask=inside[:, None], other=0.0)
        delta = gl.sum(do.slice(part * some, some).load(wide).to(gl.float32) * out.to(gl.float32), 1)
        if DLSE is not None:
            delta -= gl.load(DLSE + m.to(gl.int64) * dl_st, mask=inside, other=0.0)
        lse = gl.load(LSE + m, mask=inside, other=float("-inf"))
        delta = gl.where(lse == float("-inf"), 0.0, delta)
        gl.store(DELTA + m, delta, mask=inside)
        turn.slice(part * some, some).store(delta)


@gluon.jit
def _add_keys(
    dq, met, q_smem, do_smem, ring, zeros, flags, full, empty, meet, lse, delta, step, last_tile, first, last,
    scale_in, scale_out, WHICH: gl.constexpr, LEFT: gl.constexpr, SOFTCAP: gl.constexpr,
    CHECK: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, SLOTS: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """Adds to dq what this step's keys contribute. lse in base 2, +inf for rows that see no key."""
    TAKEN: gl.constexpr = taken(HEAD_DIM, BLOCK_N)
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TAKEN, 16])
    sums_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    k_slot = (2 * step) % SLOTS
    v_slot = (2 * step + 1) % SLOTS
    v_phase = ((2 * step + 1) // SLOTS) & 1
    tile_k = ring.index(k_slot)
    tile_v = ring.index(v_slot)
    mbarrier.wait(full.index(k_slot), (2 * step // SLOTS) & 1)
    if CHECK:
        mbarrier.wait(full.index(v_slot), v_phase)
        met = mend(tile_k, tile_v, zeros, flags, meet, met, WHICH, HEAD_DIM, BLOCK_N)
    # Of a place that the compiler does not know: it would keep the addresses of all their parts, two registers each.
    place = held(0)
    q = q_smem.index(place).slice(WHICH * ROWS, ROWS)
    do = do_smem.index(place).slice(WHICH * ROWS, ROWS)
    for part in gl.static_range(BLOCK_N // TAKEN):
        k = tile_k.slice(part * TAKEN, TAKEN)
        v = tile_v.slice(part * TAKEN, TAKEN)
        scores = gl.zeros([ROWS, TAKEN], gl.float32, scores_layout)
        scores = warpgroup_mma(q, k.permute((1, 0)), scores, use_acc=False, is_async=True)
        if not CHECK and part == 0:
            mbarrier.wait(full.index(v_slot), v_phase)
        dp = gl.zeros([ROWS, TAKEN], gl.float32, scores_layout)
        dp = warpgroup_mma(do, v.permute((1, 0)), dp, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(1, deps=[scores])
        if SOFTCAP:
            bent = tanh(scores * scale_in)
            slack = 1.0 - bent * bent
            weights = gl.exp2(bent * scale_out - lse[:, None])
        else:
            weights = gl.exp2(scores * scale_in - lse[:, None])
        dp = warpgroup_mma_wait(0, deps=[dp])
        if (part + 1) * TAKEN == BLOCK_N:
            mbarrier.arrive(empty.index(v_slot), count=1)
        ds = weights * (dp - delta[:, None])
        if SOFTCAP:
            ds = ds * slack
        if CHECK:
            start = (last_tile - step) * BLOCK_N + part * TAKEN
            column = start + gl.arange(0, TAKEN, gl.SliceLayout(0, scores_layout))
            seen = column[None, :] <= last[:, None]
            if LEFT:
                seen = seen & (column[None, :] >= first[:, None])
            ds = gl.where(seen, ds, 0.0)
        factor = gl.convert_layout(ds.to(DTYPE), gl.DotOperandLayout(0, sums_layout, 2))
        dq = warpgroup_mma(factor, k, dq, is_async=True)
        dq, factor = warpgroup_mma_wait(0, deps=[dq, factor])
    mbarrier.arrive(empty.index(k_slot), count=1)
    return dq, met


@gluon.jit
def _consume(
    OUT, LSE, DLSE, DELTA, q_smem, do_smem, ring, turn, zeros, flag_smem, q_full, full, empty, meet, o_st, dl_st,
    first_row, q_len, k_len, offset, left, right, scale, scale_in, scale_out, last_tile, edge_tiles, whole_end, tiles,
    WHICH: gl.constexpr, CAUSAL: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, SOFTCAP: gl.constexpr,
    HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """dQ of ROWS rows, left where their queries lay, and delta.

    Args:
        OUT, LSE, DLSE, DELTA: point to the program's first row.
        last_tile, edge_tiles, whole_end, tiles: as in forward, but the first step may be a whole tile.
    """
    DTYPE: gl.constexpr = q_smem.dtype
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, taken(HEAD_DIM, BLOCK_N), 16])
    sums_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    stat_layout: gl.constexpr = gl.SliceLayout(1, scores_layout)
    sums = turn.slice(WHICH * ROWS, ROWS)
    flags = flag_smem.index(WHICH)
    mbarrier.wait(q_full.index(0), 0)
    if DLSE is not None:
        DLSE += dl_st.to(gl.int64) * (WHICH * ROWS)
    _row_sums(
        OUT + WHICH * ROWS * o_st, LSE + WHICH * ROWS, DLSE, DELTA + WHICH * ROWS,
        do_smem.index(0).slice(WHICH * ROWS, ROWS), sums, first_row + WHICH * ROWS, q_len, o_st, dl_st, HEAD_DIM,
    )  # fmt: skip
    m = WHICH * ROWS + gl.arange(0, ROWS, stat_layout)
    row = first_row + m
    first, last = seen_keys(row, offset, k_len, left, right, CAUSAL, LEFT, RIGHT)
    lse = gl.load(LSE + m, mask=row < q_len, other=float("-inf"))
    lse = gl.where(lse == float("-inf"), float("inf"), lse * LOG2E)
    delta = sums.load(stat_layout)
    dq = gl.zeros([ROWS, HEAD_DIM], gl.float32, sums_layout)
    met = 0
    # With both, registers do not suffice for more than one loop: all tiles are checked.
    ALL: gl.constexpr = LEFT and SOFTCAP and HEAD_DIM > 128
    for step in range(tiles if ALL else edge_tiles):
        dq, met = _add_keys(
            dq, met, q_smem, do_smem, ring, zeros, flags, full, empty, meet, lse, delta, step, last_tile, first,
            last, scale_in, scale_out, WHICH, LEFT, SOFTCAP, True, HEAD_DIM, BLOCK_N, SLOTS, DTYPE,
        )  # fmt: skip
    if not ALL:
        for step in range(edge_tiles, whole_end):
            dq, met = _add_keys(
                dq, met, q_smem, do_smem, ring, zeros, flags, full, empty, meet, lse, delta, step, last_tile, first,
                last, scale_in, scale_out, WHICH, LEFT, SOFTCAP, False, HEAD_DIM, BLOCK_N, SLOTS, DTYPE,
            )  # fmt: skip
    if LEFT and not ALL:
        for step in range(whole_end, tiles):
            dq, met = _add_keys(
                dq, met, q_smem, do_smem, ring, zeros, flags, full, empty, meet, lse, delta, step, last_tile, first,
                last, scale_in, scale_out, WHICH, LEFT, SOFTCAP, True, HEAD_DIM, BLOCK_N, SLOTS, DTYPE,
            )  # fmt: skip
    q_smem.index(0).slice(WHICH * ROWS, ROWS).store((dq * scale).to(DTYPE))


@gluon.jit(do_not_specialize=["tiles", "planes", "section", "q_len", "k_len", "tokens", "left", "right", "dl_st",
                              "q_rb", "q_rh", "q_ch", "k_rb", "k_rh", "k_ch", "v_rb", "v_rh", "v_ch", "do_rb", "do_rh",
                              "do_ch"])  # fmt: skip
def backward_query_kernel(
    Q, K, V, DO, OUT, LSE, DLSE, DELTA, DQ, CU_Q, CU_K, q_rb, q_rh, q_ch, k_rb, k_rh, k_ch, v_rb, v_rh, v_ch,
    do_rb, do_rh, do_ch, o_sb, o_sh, o_st, dq_sb, dq_sh, dq_st, l_sb, l_sh, dl_sb, dl_sh, dl_st,
    tiles, heads, planes, section, q_len, k_len, tokens, scale, scale_in, scale_out, left, right,
    GROUP: gl.constexpr, BOTTOM_RIGHT: gl.constexpr, CAUSAL: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr,
    SOFTCAP: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """dQ and delta of 128 query rows of one head of one sequence; planes and section as in the forward kernel.

    Args:
        Q, K, V, DO: 2-D descriptors as in the forward kernel. DLSE: gradient of the LSE, or None.
    """
    BLOCK_M: gl.constexpr = CONSUMERS * ROWS
    program = held(gl.program_id(0))
    tile, plane = in_section(program, tiles, planes, section)
    if CAUSAL:
        tile = tiles - 1 - tile  # the longest rows first
    batch = plane // heads
    head = plane % heads
    q_start = 0
    k_start = 0
    row_start = tile * BLOCK_M
    OUT += head.to(gl.int64) * o_sh
    DQ += head.to(gl.int64) * dq_sh
    LSE += head.to(gl.int64) * l_sh
    DELTA += head.to(gl.int64) * l_sh
    if CU_Q is not None:
        q_start = gl.load(CU_Q + batch)
        if batch == planes // heads - 1:
            gradients = DQ + q_start.to(gl.int64) * dq_st
            end = tokens - q_start
            for half in gl.static_range(CONSUMERS):
                first = row_start + half * ROWS
                blank(gradients, DELTA + q_start, 0.0, dq_st, first, end, tiles * BLOCK_M, HEAD_DIM)
            return
        q_len = gl.load(CU_Q + batch + 1) - q_start
        k_start = gl.load(CU_K + batch)
        k_len = gl.load(CU_K + batch + 1) - k_start
        batch = batch * 0
        if row_start >= q_len:
            return
    else:
        k_len = held(k_len)
    first_row = (q_start + row_start).to(gl.int64)
    OUT += batch.to(gl.int64) * o_sb + first_row * o_st
    DQ += batch.to(gl.int64) * dq_sb + first_row * dq_st
    LSE += batch.to(gl.int64) * l_sb + first_row
    DELTA += batch.to(gl.int64) * l_sb + first_row
    if DLSE is not None:
        DLSE += batch.to(gl.int64) * dl_sb + head.to(gl.int64) * dl_sh + first_row * dl_st

    offset = 0
    if BOTTOM_RIGHT:
        offset = k_len - q_len
    last = gl.minimum(row_start + BLOCK_M, q_len) - 1
    begin, whole_begin, whole_end, end = key_range(row_start, last, offset, k_len, left, right, CAUSAL, LEFT, RIGHT)
    # In tiles of keys: [first_tile, end_tile) are walked, and every row sees all of [whole_first, whole_last).
    first_tile = begin // BLOCK_N
    end_tile = gl.cdiv(end, BLOCK_N)
    count = end_tile - first_tile
    if count <= 0:
        blank(DQ, DELTA, 0.0, dq_st, 0, gl.minimum(BLOCK_M, q_len - row_start), ROWS, HEAD_DIM)
        return
    whole_first = gl.minimum(gl.cdiv(whole_begin, BLOCK_N), end_tile)
    whole_last = gl.maximum(gl.minimum(whole_end // BLOCK_N, end_tile), whole_first)

    smem: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    DTYPE: gl.constexpr = DQ.dtype.element_ty
    q_smem = gl.allocate_shared_memory(DTYPE, [1, BLOCK_M, HEAD_DIM], smem)
    do_smem = gl.allocate_shared_memory(DTYPE, [1, BLOCK_M, HEAD_DIM], smem)
    ring = gl.allocate_shared_memory(DTYPE, [SLOTS, BLOCK_N, HEAD_DIM], smem)
    turn = gl.allocate_shared_memory(gl.float32, [BLOCK_M], flat)
    flags = gl.allocate_shared_memory(gl.int32, [CONSUMERS, BLOCK_N], flat)
    zeros = gl.allocate_shared_memory(DTYPE, [PROBE, PROBED], smem)
    zeros.store(gl.zeros([PROBE, PROBED], DTYPE, wide_layout(PROBED)))
    q_full = barriers(1, 1)
    full = barriers(SLOTS, 1)
    empty = barriers(SLOTS, CONSUMERS)
    meet = barriers(1, CONSUMERS)
    fence_async_shared()  # zeros and barriers, for the tensor cores and TMA
    kv_head = head // GROUP
    query = q_start + row_start
    last_key = k_start + (end_tile - 1) * BLOCK_N
    gl.warp_specialize(
        [
            (_produce, (
                Q, K, V, DO, q_smem, do_smem, ring, q_full, full, empty,
                batch * q_rb + head * q_rh + query, head * q_ch, batch * do_rb + head * do_rh + query, head * do_ch,
                batch * k_rb + kv_head * k_rh + last_key, kv_head * k_ch,
                batch * v_rb + kv_head * v_rh + last_key, kv_head * v_ch, count, HEAD_DIM, BLOCK_N, SLOTS,
            )),
            (_consume, (
                OUT, LSE, DLSE, DELTA, q_smem, do_smem, ring, turn, zeros, flags, q_full, full, empty, meet, o_st,
                dl_st, row_start, q_len, k_len, offset, left, right, scale, scale_in, scale_out, end_tile - 1,
                end_tile - whole_last, end_tile - whole_first, count, 0, CAUSAL, LEFT, RIGHT, SOFTCAP, HEAD_DIM,
                BLOCK_N, SLOTS,
            )),
            (_consume, (
                OUT, LSE, DLSE, DELTA, q_smem, do_smem, ring, turn, zeros, flags, q_full, full, empty, meet, o_st,
                dl_st, row_start, q_len, k_len, offset, left, right, scale, scale_in, scale_out, end_tile - 1,
                end_tile - whole_last, end_tile - whole_first, count, 1, CAUSAL, LEFT, RIGHT, SOFTCAP, HEAD_DIM,
                BLOCK_N, SLOTS,
            )),
        ],
        [4, 4],
        [240, 240],
    )  # fmt: skip
    # Stored by the producer's warps: consumers need not hold the addresses, and 16 bytes a thread go out at once.
    wide: gl.constexpr = wide_layout(HEAD_DIM)
    m = gl.arange(0, BLOCK_M, gl.SliceLayout(1, wide))
    d = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, wide))
    place = DQ + (m[:, None] * dq_st + d[None, :])
    gl.store(place, q_smem.index(0).load(wide), mask=(row_start + m < q_len)[:, None])
