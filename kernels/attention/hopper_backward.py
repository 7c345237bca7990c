"""dK and dV for Hopper, in Gluon: after the dQ kernel, without atomics, as the portable one.

- One program takes 128 keys of one key head. Two consumers hold 64 keys each, with the sums for dK and dV in registers;
  a producer brings tiles of queries and their gradients by TMA, for all query heads that share the keys.
- Tiles lie transposed, keys by queries, so that probabilities go from registers into the products that sum over
  queries. The product for dV runs while the gradient of the scores is computed.
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

from fastformer.kernels.attention import score
from fastformer.kernels.attention.hopper_forward import CONSUMERS, tanh, wide_layout
from fastformer.kernels.attention.hopper_gluon import barriers, held, tma_load

KEYS: gl.constexpr = gl.constexpr(64)  # of a consumer: what one wgmma of four warps takes
LOG2E: gl.constexpr = gl.constexpr(1.4426950408889634)

row_range = gluon.jit(score.row_range.fn)


@gluon.jit
def _produce(
    Q, K, V, DO, k_smem, v_smem, q_smem, do_smem, kv_full, full, empty,
    k_row, k_column, v_row, v_column, q_row, q_rh, q_column, q_ch, do_row, do_rh, do_column, do_ch, tiles,
    GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Brings keys and values, then for each query head `tiles` tiles of queries and gradients."""
    mbarrier.expect(kv_full.index(0), CONSUMERS * KEYS * HEAD_DIM * 4)
    tma_load(K, [k_row, k_column], kv_full.index(0), k_smem)
    tma_load(V, [v_row, v_column], kv_full.index(0), v_smem)
    for step in range(tiles * GROUP):
        shared = step // tiles
        down = (step % tiles) * BLOCK_M
        stage = step % STAGES
        mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
        mbarrier.expect(full.index(stage), BLOCK_M * HEAD_DIM * 4)
        tma_load(Q, [q_row + shared * q_rh + down, q_column + shared * q_ch], full.index(stage), q_smem.index(stage))
        tma_load(
            DO, [do_row + shared * do_rh + down, do_column + shared * do_ch], full.index(stage), do_smem.index(stage)
        )


@gluon.jit
def _clear(
    q, do, alive, flags, meet, met, WHICH: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr,
):  # fmt: skip
    """Zeroes the queries and gradients of rows that count nothing, if there are any; each consumer its share.

    Args:
        q, do: [BLOCK_M, HEAD_DIM], arrived. alive: int32 [BLOCK_M].
        flags: int32 [BLOCK_M] in shared memory, of this consumer: room to turn a vector in.
        met: phases of `meet` that are over.

    Returns:
        phases of `meet` that are over now.
    """
    flags.store(alive)
    all_rows: gl.constexpr = gl.SliceLayout(0, gl.BlockedLayout([1, BLOCK_M // 32], [1, 32], [4, 1], [1, 0]))
    if gl.min(flags.load(all_rows), 0) == 0:
        PART: gl.constexpr = 16  # few registers at a time
        rows: gl.constexpr = wide_layout(HEAD_DIM)
        for part in gl.static_range(WHICH, BLOCK_M // PART, CONSUMERS):
            kept = flags.slice(part * PART, PART).load(gl.SliceLayout(1, rows)) != 0
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
    dk, dv, met, k, v, q_smem, do_smem, flags, full, empty, meet, LSE, DELTA, step, start, column, offset, q_len,
    left, right, scale_in, scale_out,
    WHICH: gl.constexpr, CAUSAL: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, SOFTCAP: gl.constexpr,
    CHECK: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """Adds to dk and dv what the query rows start … start + BLOCK_M contribute. LSE and DELTA point to row 0."""
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    sums_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    left_layout: gl.constexpr = gl.DotOperandLayout(0, sums_layout, 2)
    stage = step % STAGES
    row = start + gl.arange(0, BLOCK_M, gl.SliceLayout(0, scores_layout))
    inside = row < q_len
    lse = gl.load(LSE + row, mask=inside, other=float("-inf"))
    delta = gl.load(DELTA + row, mask=inside, other=0.0)
    alive = lse != float("-inf")
    lse = gl.where(alive, lse * LOG2E, float("inf"))
    delta = gl.where(alive, delta, 0.0)
    mbarrier.wait(full.index(stage), (step // STAGES) & 1)
    q = q_smem.index(stage)
    do = do_smem.index(stage)
    if CHECK:
        met = _clear(q, do, alive.to(gl.int32), flags, meet, met, WHICH, HEAD_DIM, BLOCK_M)
    scores = gl.zeros([KEYS, BLOCK_M], gl.float32, scores_layout)
    scores = warpgroup_mma(k, q.permute((1, 0)), scores, use_acc=False, is_async=True)
    dp = gl.zeros([KEYS, BLOCK_M], gl.float32, scores_layout)
    dp = warpgroup_mma(v, do.permute((1, 0)), dp, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(1, deps=[scores])
    if SOFTCAP:
        bent = tanh(scores * scale_in)
        slack = 1.0 - bent * bent
        weights = gl.exp2(bent * scale_out - lse[None, :])
    else:
        weights = gl.exp2(scores * scale_in - lse[None, :])
    if CHECK:
        seen = alive[None, :]
        if CAUSAL:
            seen = seen & (column[:, None] <= row[None, :] + offset)
        if LEFT:
            seen = seen & (column[:, None] >= row[None, :] + offset - left)
        if RIGHT:
            seen = seen & (column[:, None] <= row[None, :] + offset + right)
        weights = gl.where(seen, weights, 0.0)
    factor = gl.convert_layout(weights.to(DTYPE), left_layout)
    dv = warpgroup_mma(factor, do, dv, is_async=True)
    dp = warpgroup_mma_wait(1, deps=[dp])
    ds = weights * (dp - delta[None, :])
    if SOFTCAP:
        ds = ds * slack
    if CHECK:
        ds = gl.where(seen, ds, 0.0)
    other = gl.convert_layout(ds.to(DTYPE), left_layout)
    dk = warpgroup_mma(other, q, dk, is_async=True)
    dk, dv, factor, other = warpgroup_mma_wait(0, deps=[dk, dv, factor, other])
    mbarrier.arrive(empty.index(stage), count=1)
    return dk, dv, met


@gluon.jit
def _consume(
    LSE, DELTA, k_smem, v_smem, q_smem, do_smem, flag_smem, kv_full, full, empty, meet, l_sh, first_key, q_len,
    offset, left, right, scale, scale_in, scale_out, first, whole_first, whole_last, end,
    WHICH: gl.constexpr, GROUP: gl.constexpr, CAUSAL: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr,
    SOFTCAP: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dK and dV of KEYS keys, left where these and their values lay. LSE and DELTA point to row 0 of the first head.

    Args:
        first, whole_first, whole_last, end: tiles [first, end) of queries are walked; [whole_first, whole_last) see all
            keys of the program and need no check.
    """
    DTYPE: gl.constexpr = k_smem.dtype
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    sums_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    place = WHICH * KEYS
    k = k_smem.slice(WHICH * KEYS, KEYS)
    v = v_smem.slice(WHICH * KEYS, KEYS)
    flags = flag_smem.index(WHICH)
    column = first_key + place + gl.arange(0, KEYS, gl.SliceLayout(1, scores_layout))
    dk = gl.zeros([KEYS, HEAD_DIM], gl.float32, sums_layout)
    dv = gl.zeros([KEYS, HEAD_DIM], gl.float32, sums_layout)
    met = 0
    mbarrier.wait(kv_full.index(0), 0)
    for shared in range(GROUP):
        past = shared * (end - first) - first
        for tile in range(first, whole_first):
            dk, dv, met = _add_rows(
                dk, dv, met, k, v, q_smem, do_smem, flags, full, empty, meet, LSE, DELTA, past + tile, tile * BLOCK_M,
                column, offset, q_len, left, right, scale_in, scale_out, WHICH, CAUSAL, LEFT, RIGHT, SOFTCAP, True,
                HEAD_DIM, BLOCK_M, STAGES, DTYPE,
            )  # fmt: skip
        for tile in range(whole_first, whole_last):
            dk, dv, met = _add_rows(
                dk, dv, met, k, v, q_smem, do_smem, flags, full, empty, meet, LSE, DELTA, past + tile, tile * BLOCK_M,
                column, offset, q_len, left, right, scale_in, scale_out, WHICH, CAUSAL, LEFT, RIGHT, SOFTCAP, False,
                HEAD_DIM, BLOCK_M, STAGES, DTYPE,
            )  # fmt: skip
        for tile in range(whole_last, end):
            dk, dv, met = _add_rows(
                dk, dv, met, k, v, q_smem, do_smem, flags, full, empty, meet, LSE, DELTA, past + tile, tile * BLOCK_M,
                column, offset, q_len, left, right, scale_in, scale_out, WHICH, CAUSAL, LEFT, RIGHT, SOFTCAP, True,
                HEAD_DIM, BLOCK_M, STAGES, DTYPE,
            )  # fmt: skip
        LSE += l_sh
        DELTA += l_sh
    k.store((dk * scale).to(DTYPE))
    v.store(dv.to(DTYPE))


@gluon.jit
def _blank(DK, DV, dk_st, begin, end, step, HEAD_DIM: gl.constexpr):
    """Zeros for keys [begin, end), KEYS of every `step`."""
    wide: gl.constexpr = wide_layout(HEAD_DIM)
    d = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, wide))
    for first in range(begin, end, step):
        n = first + gl.arange(0, KEYS, gl.SliceLayout(1, wide))
        there = n.to(gl.int64)[:, None] * dk_st + d[None, :]
        nothing = gl.zeros([KEYS, HEAD_DIM], DK.dtype.element_ty, wide)
        gl.store(DK + there, nothing, mask=(n < end)[:, None])
        gl.store(DV + there, nothing, mask=(n < end)[:, None])


@gluon.jit(do_not_specialize=["tiles", "planes", "q_len", "k_len", "tokens", "left", "right", "q_rb", "q_rh", "q_ch",
                              "k_rb", "k_rh", "k_ch", "v_rb", "v_rh", "v_ch", "do_rb", "do_rh", "do_ch"])  # fmt: skip
def backward_key_kernel(
    Q, K, V, DO, LSE, DELTA, DK, DV, CU_Q, CU_K, q_rb, q_rh, q_ch, k_rb, k_rh, k_ch, v_rb, v_rh, v_ch,
    do_rb, do_rh, do_ch, dk_sb, dk_sh, dk_st, l_sb, l_sh, tiles, kv_heads, planes, q_len, k_len, tokens,
    scale, scale_in, scale_out, left, right,
    GROUP: gl.constexpr, BOTTOM_RIGHT: gl.constexpr, CAUSAL: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr,
    SOFTCAP: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dK and dV of 128 keys of one key head of one sequence.

    Args:
        Q, K, V, DO: 2-D descriptors as in the forward kernel. DK and DV have the same strides.
        planes: sequences times key heads (packed: with one more sequence, the tokens after the last boundary).
    """
    BLOCK_N: gl.constexpr = CONSUMERS * KEYS
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
    LSE += (kv_head * GROUP).to(gl.int64) * l_sh
    DELTA += (kv_head * GROUP).to(gl.int64) * l_sh
    if CU_K is not None:
        k_start = gl.load(CU_K + batch)
        if batch == planes // kv_heads - 1:
            there = k_start.to(gl.int64) * dk_st
            for half in gl.static_range(CONSUMERS):
                _blank(
                    DK + there, DV + there, dk_st, first_key + half * KEYS, tokens - k_start, tiles * BLOCK_N, HEAD_DIM
                )
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
    LSE += batch.to(gl.int64) * l_sb + q_start
    DELTA += batch.to(gl.int64) * l_sb + q_start
    offset = 0
    if BOTTOM_RIGHT:
        offset = k_len - q_len
    last = gl.minimum(first_key + BLOCK_N, k_len) - 1
    begin, whole_begin, whole_end, end = row_range(first_key, last, offset, q_len, left, right, CAUSAL, LEFT, RIGHT)
    first = begin // BLOCK_M
    end_tile = gl.cdiv(end, BLOCK_M)
    count = end_tile - first
    if count <= 0:
        _blank(DK, DV, dk_st, 0, gl.minimum(BLOCK_N, k_len - first_key), KEYS, HEAD_DIM)
        return
    whole_first = gl.minimum(gl.cdiv(whole_begin, BLOCK_M), end_tile)
    whole_last = gl.maximum(gl.minimum(whole_end // BLOCK_M, end_tile), whole_first)

    smem: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    DTYPE: gl.constexpr = DK.dtype.element_ty
    k_smem = gl.allocate_shared_memory(DTYPE, [BLOCK_N, HEAD_DIM], smem)
    v_smem = gl.allocate_shared_memory(DTYPE, [BLOCK_N, HEAD_DIM], smem)
    q_smem = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_M, HEAD_DIM], smem)
    do_smem = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_M, HEAD_DIM], smem)
    flags = gl.allocate_shared_memory(gl.int32, [CONSUMERS, BLOCK_M], flat)
    kv_full = barriers(1, 1)
    full = barriers(STAGES, 1)
    empty = barriers(STAGES, CONSUMERS)
    meet = barriers(1, CONSUMERS)
    head = kv_head * GROUP
    key_row = k_start + first_key
    query_row = q_start + first * BLOCK_M
    gl.warp_specialize(
        [
            (_produce, (
                Q, K, V, DO, k_smem, v_smem, q_smem, do_smem, kv_full, full, empty,
                batch * k_rb + kv_head * k_rh + key_row, kv_head * k_ch,
                batch * v_rb + kv_head * v_rh + key_row, kv_head * v_ch,
                batch * q_rb + head * q_rh + query_row, q_rh, head * q_ch, q_ch,
                batch * do_rb + head * do_rh + query_row, do_rh, head * do_ch, do_ch,
                count, GROUP, HEAD_DIM, BLOCK_M, STAGES,
            )),
            (_consume, (
                LSE, DELTA, k_smem, v_smem, q_smem, do_smem, flags, kv_full, full, empty, meet, l_sh, first_key, q_len,
                offset, left, right, scale, scale_in, scale_out, first, whole_first,
                whole_last, end_tile, 0, GROUP, CAUSAL, LEFT, RIGHT, SOFTCAP, HEAD_DIM, BLOCK_M, STAGES,
            )),
            (_consume, (
                LSE, DELTA, k_smem, v_smem, q_smem, do_smem, flags, kv_full, full, empty, meet, l_sh, first_key, q_len,
                offset, left, right, scale, scale_in, scale_out, first, whole_first,
                whole_last, end_tile, 1, GROUP, CAUSAL, LEFT, RIGHT, SOFTCAP, HEAD_DIM, BLOCK_M, STAGES,
            )),
        ],
        [4, 4],
        [240, 240],
    )  # fmt: skip
    # Stored by the producer's warps: consumers need not hold the addresses.
    wide: gl.constexpr = wide_layout(HEAD_DIM)
    n = gl.arange(0, BLOCK_N, gl.SliceLayout(1, wide))
    d = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, wide))
    there = n[:, None] * dk_st + d[None, :]
    mask = (first_key + n < k_len)[:, None]
    gl.store(DK + there, k_smem.load(wide), mask=mask)
    gl.store(DV + there, v_smem.load(wide), mask=mask)
