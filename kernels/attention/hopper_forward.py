"""Forward pass of attention for Hopper, after FlashAttention-3 (Shah et al. 2024, arXiv 2407.08608), in Gluon.

- One program takes 128 query rows of one head. Two consumers of four warps hold 64 rows each; a producer brings keys
  and values by TMA into a ring of shared memory, needs almost no registers, and stores the output at the end.
- A consumer issues the product of the next keys before the softmax of these, so that the tensor cores work while it
  does: at most one product is waited for at a time.
- Keys are walked from the last tile to the first: tiles at the edge of the causal band or at the end of the sequence
  come first and are checked, whole ones are not. A window adds the tiles of its left edge at the end.
- A tile may reach past its sequence, into the next one: its keys are masked. Values that some row must not see are
  searched for NaN and Inf, and only if there are any, the consumers meet and zero those keys in place.
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


@gluon.jit
def _produce(
    Q, K, V, q_smem, k_smem, v_smem, q_full, k_full, k_empty, v_full, v_empty,
    q_row, q_column, k_row, k_column, v_row, v_column, tiles, HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Brings the queries, then keys and values of `tiles` tiles, the last ones first.

    Keys run one tile ahead of values, in the order in which consumers need them.
    """
    SIZE: gl.constexpr = BLOCK_N * HEAD_DIM * 2
    mbarrier.expect(q_full.index(0), CONSUMERS * ROWS * HEAD_DIM * 2)
    tma_load(Q, [q_row, q_column], q_full.index(0), q_smem.index(0))
    for step in range(tiles + 1):
        if step < tiles:
            stage = step % STAGES
            mbarrier.wait(k_empty.index(stage), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(k_full.index(stage), SIZE)
            tma_load(K, [k_row - step * BLOCK_N, k_column], k_full.index(stage), k_smem.index(stage))
        if step > 0:
            stage = (step - 1) % STAGES
            mbarrier.wait(v_empty.index(stage), (((step - 1) // STAGES) & 1) ^ 1)
            mbarrier.expect(v_full.index(stage), SIZE)
            tma_load(V, [v_row - (step - 1) * BLOCK_N, v_column], v_full.index(stage), v_smem.index(stage))


@gluon.jit
def _soften(
    qk, peak, total, start, first, last, scale_in, scale_out,
    LEFT: gl.constexpr, SOFTCAP: gl.constexpr, CHECK: gl.constexpr,
    BLOCK_N: gl.constexpr, DTYPE: gl.constexpr, scores_layout: gl.constexpr, weights_layout: gl.constexpr,
):  # fmt: skip
    """Running softmax over one tile of dot products.

    Args:
        qk: fp32 [ROWS, BLOCK_N], of the keys from `start`. first, last: as seen_keys gives them.
        peak: largest score so far, before scaling. total: sum of weights so far.

    Returns:
        (weights as the left factor of the product with the values, factor of what came before, peak, total).
    """
    if SOFTCAP:
        qk = tanh(qk * scale_in)
        factor = scale_out
    else:
        factor = scale_in
    if CHECK:
        column = start + gl.arange(0, BLOCK_N, gl.SliceLayout(0, scores_layout))
        seen = column[None, :] <= last[:, None]
        if LEFT:
            seen = seen & (column[None, :] >= first[:, None])
        qk = gl.where(seen, qk, float("-inf"))
    new_peak = gl.maximum(peak, gl.max(qk, 1))
    base = new_peak * factor
    if CHECK:
        base = gl.where(new_peak == float("-inf"), 0.0, base)
    weights = gl.exp2(qk * factor - base[:, None])
    fade = gl.exp2(peak * factor - base)
    total = total * fade + gl.sum(weights, 1)
    return gl.convert_layout(weights.to(DTYPE), weights_layout), fade, new_peak, total


@gluon.jit
def _advance(
    acc, weights, peak, total, met, q_smem, k_smem, v_smem, zeros, flags, k_full, k_empty, v_full, v_empty, meet,
    step, last_tile, first, last, scale_in, scale_out, WHICH: gl.constexpr, LEFT: gl.constexpr, SOFTCAP: gl.constexpr,
    FIRST: gl.constexpr, CHECK: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    DTYPE: gl.constexpr,
):  # fmt: skip
    """Weights of this step's keys, while the values of the step before are added to acc.

    Returns:
        (acc without this step's values, their weights, peak, total, met); the values have arrived.
    """
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    # Of a place that the compiler does not know: it would keep the addresses of all its parts, two registers each.
    q = q_smem.index(held(0)).slice(WHICH * ROWS, ROWS)
    stage = step % STAGES
    phase = (step // STAGES) & 1
    before = (step + STAGES - 1) % STAGES
    mbarrier.wait(k_full.index(stage), phase)
    if CHECK:
        mbarrier.wait(v_full.index(stage), phase)
        met = mend(v_smem.index(stage), k_smem.index(stage), zeros, flags, meet, met, WHICH, HEAD_DIM, BLOCK_N)
    qk = gl.zeros([ROWS, BLOCK_N], gl.float32, scores_layout)
    qk = warpgroup_mma(q, k_smem.index(stage).permute((1, 0)), qk, use_acc=False, is_async=True)
    if FIRST:
        qk = warpgroup_mma_wait(0, deps=[qk])
    else:
        acc = warpgroup_mma(weights, v_smem.index(before), acc, is_async=True)
        qk = warpgroup_mma_wait(1, deps=[qk])
    mbarrier.arrive(k_empty.index(stage), count=1)
    new_weights, fade, peak, total = _soften(
        qk, peak, total, (last_tile - step) * BLOCK_N, first, last, scale_in, scale_out, LEFT, SOFTCAP,
        CHECK, BLOCK_N, DTYPE, scores_layout, gl.DotOperandLayout(0, out_layout, 2),
    )  # fmt: skip
    if not CHECK:
        mbarrier.wait(v_full.index(stage), phase)
    if not FIRST:
        acc, weights = warpgroup_mma_wait(0, deps=[acc, weights])
        mbarrier.arrive(v_empty.index(before), count=1)
        acc = acc * gl.convert_layout(fade, gl.SliceLayout(1, out_layout))[:, None]
    return acc, new_weights, peak, total, met


@gluon.jit
def _consume(
    q_smem, lse_smem, k_smem, v_smem, zeros, flag_smem, q_full, k_full, k_empty, v_full, v_empty, meet,
    first_row, k_len, offset, left, right, scale_in, scale_out, last_tile, edge_tiles, whole_end, tiles,
    WHICH: gl.constexpr, CAUSAL: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr, SOFTCAP: gl.constexpr,
    HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """LSE of ROWS rows, and their output, left where their queries lay.

    Args:
        last_tile: number of the last tile of keys; step j takes tile last_tile - j.
        edge_tiles, whole_end, tiles: steps [0, edge_tiles) are checked, [edge_tiles, whole_end) are not, and
            [whole_end, tiles) are again. The first step is checked always.
    """
    DTYPE: gl.constexpr = q_smem.dtype
    scores_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    stat_layout: gl.constexpr = gl.SliceLayout(1, scores_layout)
    flags = flag_smem.index(WHICH)
    row = first_row + WHICH * ROWS + gl.arange(0, ROWS, stat_layout)
    first, last = seen_keys(row, offset, k_len, left, right, CAUSAL, LEFT, RIGHT)
    acc = gl.zeros([ROWS, HEAD_DIM], gl.float32, out_layout)
    weights = gl.zeros([ROWS, BLOCK_N], DTYPE, gl.DotOperandLayout(0, out_layout, 2))
    peak = gl.full([ROWS], float("-inf"), gl.float32, stat_layout)
    total = gl.zeros([ROWS], gl.float32, stat_layout)
    met = 0
    mbarrier.wait(q_full.index(0), 0)
    acc, weights, peak, total, met = _advance(
        acc, weights, peak, total, met, q_smem, k_smem, v_smem, zeros, flags, k_full, k_empty, v_full, v_empty, meet,
        0, last_tile, first, last, scale_in, scale_out, WHICH, LEFT, SOFTCAP,
        True, True, HEAD_DIM, BLOCK_N, STAGES, DTYPE,
    )  # fmt: skip
    for step in range(1, edge_tiles):
        acc, weights, peak, total, met = _advance(
            acc, weights, peak, total, met, q_smem, k_smem, v_smem, zeros, flags, k_full, k_empty, v_full, v_empty,
            meet, step, last_tile, first, last, scale_in, scale_out, WHICH, LEFT, SOFTCAP,
            False, True, HEAD_DIM, BLOCK_N, STAGES, DTYPE,
        )  # fmt: skip
    for step in range(gl.maximum(edge_tiles, 1), whole_end):
        acc, weights, peak, total, met = _advance(
            acc, weights, peak, total, met, q_smem, k_smem, v_smem, zeros, flags, k_full, k_empty, v_full, v_empty,
            meet, step, last_tile, first, last, scale_in, scale_out, WHICH, LEFT, SOFTCAP,
            False, False, HEAD_DIM, BLOCK_N, STAGES, DTYPE,
        )  # fmt: skip
    if LEFT:
        for step in range(gl.maximum(whole_end, 1), tiles):
            acc, weights, peak, total, met = _advance(
                acc, weights, peak, total, met, q_smem, k_smem, v_smem, zeros, flags, k_full, k_empty, v_full, v_empty,
                meet, step, last_tile, first, last, scale_in, scale_out, WHICH, LEFT, SOFTCAP, False, True, HEAD_DIM,
                BLOCK_N, STAGES, DTYPE,
            )  # fmt: skip
    acc = warpgroup_mma(weights, v_smem.index((tiles - 1) % STAGES), acc, is_async=True)
    acc, weights = warpgroup_mma_wait(0, deps=[acc, weights])

    factor = scale_out if SOFTCAP else scale_in
    empty = total == 0.0
    total = gl.where(empty, 1.0, total)
    acc = acc * gl.convert_layout(1.0 / total, gl.SliceLayout(1, out_layout))[:, None]
    lse = gl.where(empty, float("-inf"), peak * factor * LN2 + gl.log(total))
    lse_smem.slice(WHICH * ROWS, ROWS).store(lse)
    q_smem.index(0).slice(WHICH * ROWS, ROWS).store(acc.to(DTYPE))


@gluon.jit(do_not_specialize=["tiles", "planes", "section", "q_len", "k_len", "tokens", "left", "right",
                              "q_rb", "q_rh", "q_ch", "k_rb", "k_rh", "k_ch", "v_rb", "v_rh", "v_ch"])  # fmt: skip
def forward_kernel(
    Q, K, V, OUT, LSE, CU_Q, CU_K, q_rb, q_rh, q_ch, k_rb, k_rh, k_ch, v_rb, v_rh, v_ch, o_sb, o_sh, o_st, l_sb, l_sh,
    tiles, heads, planes, section, q_len, k_len, tokens, scale_in, scale_out, left, right,
    GROUP: gl.constexpr, BOTTOM_RIGHT: gl.constexpr, CAUSAL: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr,
    SOFTCAP: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """128 query rows of one head of one sequence.

    Args:
        Q, K, V: 2-D descriptors; the token t of head h of sequence b begins at row b * rb + h * rh + t, column h * ch.
        planes: sequences times heads (packed: with one more sequence, the tokens after the last boundary).
        section: planes whose tiles are interleaved, the last ones first, so that their keys and values stay in L2.
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
    LSE += head.to(gl.int64) * l_sh
    if CU_Q is not None:
        q_start = gl.load(CU_Q + batch)
        if batch == planes // heads - 1:
            out_of = OUT + q_start.to(gl.int64) * o_st
            end = tokens - q_start
            for half in gl.static_range(CONSUMERS):
                first = row_start + half * ROWS
                blank(out_of, LSE + q_start, float("-inf"), o_st, first, end, tiles * BLOCK_M, HEAD_DIM)
            return
        q_len = gl.load(CU_Q + batch + 1) - q_start
        k_start = gl.load(CU_K + batch)
        k_len = gl.load(CU_K + batch + 1) - k_start
        batch = batch * 0
        if row_start >= q_len:
            return
    else:
        k_len = held(k_len)
    OUT += batch.to(gl.int64) * o_sb + (q_start + row_start).to(gl.int64) * o_st
    LSE += batch.to(gl.int64) * l_sb + (q_start + row_start)

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
        blank(OUT, LSE, float("-inf"), o_st, 0, gl.minimum(BLOCK_M, q_len - row_start), ROWS, HEAD_DIM)
        return
    whole_first = gl.minimum(gl.cdiv(whole_begin, BLOCK_N), end_tile)
    whole_last = gl.maximum(gl.minimum(whole_end // BLOCK_N, end_tile), whole_first)

    smem: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    DTYPE: gl.constexpr = OUT.dtype.element_ty
    q_smem = gl.allocate_shared_memory(DTYPE, [1, BLOCK_M, HEAD_DIM], smem)
    lse_smem = gl.allocate_shared_memory(gl.float32, [BLOCK_M], flat)
    k_smem = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, HEAD_DIM], smem)
    v_smem = gl.allocate_shared_memory(DTYPE, [STAGES, BLOCK_N, HEAD_DIM], smem)
    flags = gl.allocate_shared_memory(gl.int32, [CONSUMERS, BLOCK_N], flat)
    zeros = gl.allocate_shared_memory(DTYPE, [PROBE, PROBED], smem)
    zeros.store(gl.zeros([PROBE, PROBED], DTYPE, wide_layout(PROBED)))
    q_full = barriers(1, 1)
    k_full = barriers(STAGES, 1)
    v_full = barriers(STAGES, 1)
    k_empty = barriers(STAGES, CONSUMERS)
    v_empty = barriers(STAGES, CONSUMERS)
    meet = barriers(1, CONSUMERS)
    fence_async_shared()  # zeros and barriers, for the tensor cores and TMA
    kv_head = head // GROUP
    last_key = k_start + (end_tile - 1) * BLOCK_N
    gl.warp_specialize(
        [
            (_produce, (
                Q, K, V, q_smem, k_smem, v_smem, q_full, k_full, k_empty, v_full, v_empty,
                batch * q_rb + head * q_rh + q_start + row_start, head * q_ch,
                batch * k_rb + kv_head * k_rh + last_key, kv_head * k_ch,
                batch * v_rb + kv_head * v_rh + last_key, kv_head * v_ch, count, HEAD_DIM, BLOCK_N, STAGES,
            )),
            (_consume, (
                q_smem, lse_smem, k_smem, v_smem, zeros, flags, q_full, k_full, k_empty, v_full, v_empty, meet,
                row_start, k_len, offset, left, right, scale_in, scale_out, end_tile - 1, end_tile - whole_last,
                end_tile - whole_first, count, 0, CAUSAL, LEFT, RIGHT, SOFTCAP, HEAD_DIM, BLOCK_N, STAGES,
            )),
            (_consume, (
                q_smem, lse_smem, k_smem, v_smem, zeros, flags, q_full, k_full, k_empty, v_full, v_empty, meet,
                row_start, k_len, offset, left, right, scale_in, scale_out, end_tile - 1, end_tile - whole_last,
                end_tile - whole_first, count, 1, CAUSAL, LEFT, RIGHT, SOFTCAP, HEAD_DIM, BLOCK_N, STAGES,
            )),
        ],
        [4, 4],
        [240, 240],
    )  # fmt: skip
    # Stored by the producer's warps: consumers need not hold the addresses, and 16 bytes a thread go out at once.
    wide: gl.constexpr = wide_layout(HEAD_DIM)
    m = gl.arange(0, BLOCK_M, gl.SliceLayout(1, wide))
    d = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, wide))
    inside = row_start + m < q_len
    gl.store(OUT + (m[:, None] * o_st + d[None, :]), q_smem.index(0).load(wide), mask=inside[:, None])
    gl.store(LSE + m, lse_smem.load(gl.SliceLayout(1, wide)), mask=inside)
