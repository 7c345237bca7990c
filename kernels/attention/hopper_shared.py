"""What the Hopper kernels share: sizes of a consumer, which scores count, unsound rows, order of the tiles."""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fastformer.kernels.attention import score

CONSUMERS: gl.constexpr = gl.constexpr(2)
ROWS: gl.constexpr = gl.constexpr(64)  # of a consumer: what one wgmma of four warps takes
PROBE: gl.constexpr = gl.constexpr(8)  # columns of the narrowest wgmma
PROBED: gl.constexpr = gl.constexpr(64)  # head dimensions that a row of 128 bytes holds
PART: gl.constexpr = gl.constexpr(16)  # rows that are mended at once: few registers at a time
LN2: gl.constexpr = gl.constexpr(0.6931471805599453)
LOG2E: gl.constexpr = gl.constexpr(1.4426950408889634)

# The rules that need no layout are those of the portable kernels.
key_range = gluon.jit(score.key_range.fn)
row_range = gluon.jit(score.row_range.fn)
tanh = gluon.jit(score.tanh.fn)


@gluon.constexpr_function
def wide_layout(head_dim):
    """16 bytes a thread, rows whole: for memory."""
    lanes = head_dim // 8
    return gl.BlockedLayout([1, 8], [32 // lanes, lanes], [4, 1], [1, 0])


@gluon.constexpr_function
def whole_layout(length):
    """A vector of which every warp holds all: then no warp waits for another within a reduction."""
    return gl.SliceLayout(0, gl.BlockedLayout([1, length // 32], [1, 32], [4, 1], [1, 0]))


@gluon.jit
def in_section(program, tiles, planes, section):
    """(tile, plane) of a program: the tiles of `section` planes are interleaved, so that what these planes read
    again and again stays in L2."""
    first_plane = program // (tiles * section) * section
    within = program - first_plane * tiles
    abreast = gl.minimum(section, planes - first_plane)
    return within // abreast, first_plane + within % abreast


@gluon.jit
def seen_keys(
    row, offset, k_len, left, right, CAUSAL: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr
):  # fmt: skip
    """(first, last) key that each row sees under the causal band and the window, both included; the first may be
    negative, the last below the first."""
    first = gl.zeros_like(row)
    last = first + (k_len - 1)
    if LEFT:
        first = row + (offset - left)
    if CAUSAL:
        last = gl.minimum(last, row + offset)
    if RIGHT:
        last = gl.minimum(last, row + (offset + right))
    return first, last


@gluon.jit
def seeing_rows(column, length, left, right, CAUSAL: gl.constexpr, LEFT: gl.constexpr, RIGHT: gl.constexpr):
    """(first, last) row that sees each key, both included, where a causal row of the key's own number sees it; rows
    are numbered below `length`. Without causality or a right side the first bounds nothing."""
    first = column
    last = gl.zeros_like(column) + (length - 1)
    if LEFT:
        last = gl.minimum(last, column + left)
    if RIGHT:
        first = column - right
        if CAUSAL:
            first = gl.maximum(first, column)
    return first, last


@gluon.jit
def mend(
    tile, partner, zeros, flags, meet, met, WHICH: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """Finds the keys whose rows in `tile` hold NaN or Inf; zeroes these rows, and makes those of `partner` NaN instead.

    Rows of `tile` are summed with weights, and a weight of zero times NaN would not be zero. `partner` decides on the
    weights: NaN there are seen by the queries that see the key, and masked for the others.

    All consumers see the same tile and decide alike. If there are any, they meet before the first of them writes and
    after the last has written; each mends its share.

    Args:
        tile, partner: [BLOCK_N, HEAD_DIM], arrived. zeros: [PROBE, PROBED] of zeros.
        flags: int32 [BLOCK_N], of this consumer: room to turn a vector in.
        met: phases of `meet` that are over.

    Returns:
        phases of `meet` that are over now.
    """
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PROBE, 16])
    probe = gl.zeros([BLOCK_N, PROBE], gl.float32, layout)
    # Zero times NaN or Inf is NaN, and the tensor cores look at a tile in no time.
    for part in gl.static_range(HEAD_DIM // PROBED):
        columns = tile.slice(part * PROBED, PROBED, 1)
        probe = warpgroup_mma(columns, zeros.permute((1, 0)), probe, use_acc=part > 0, is_async=True)
    probe = warpgroup_mma_wait(0, deps=[probe])
    sound = gl.min((probe == 0.0).to(gl.int32), 1)
    flags.store(sound)
    if gl.min(flags.load(whole_layout(BLOCK_N)), 0) == 0:
        rows: gl.constexpr = wide_layout(HEAD_DIM)
        mbarrier.arrive(meet.index(0), count=1)
        mbarrier.wait(meet.index(0), met & 1)
        for part in gl.static_range(WHICH, BLOCK_N // PART, CONSUMERS):
            kept = flags.slice(part * PART, PART).load(gl.SliceLayout(1, rows)) != 0
            some = tile.slice(part * PART, PART)
            x = some.load(rows)
            some.store(gl.where(kept[:, None], x, gl.zeros_like(x)))
            other = partner.slice(part * PART, PART)
            y = other.load(rows)
            other.store(gl.where(kept[:, None], y, gl.full_like(y, float("nan"))))
        fence_async_shared()
        mbarrier.arrive(meet.index(0), count=1)
        mbarrier.wait(meet.index(0), (met + 1) & 1)
        met += 2
    return met


@gluon.jit
def blank(OUT, STAT, nothing, stride, begin, end, step, HEAD_DIM: gl.constexpr):
    """Zeros for rows [begin, end) of OUT, ROWS of every `step`, and `nothing` for those of STAT, if there is one."""
    wide: gl.constexpr = wide_layout(HEAD_DIM)
    d = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, wide))
    for first in range(begin, end, step):
        row = first + gl.arange(0, ROWS, gl.SliceLayout(1, wide))
        place = OUT + (row.to(gl.int64)[:, None] * stride + d[None, :])
        gl.store(place, gl.zeros([ROWS, HEAD_DIM], OUT.dtype.element_ty, wide), mask=(row < end)[:, None])
        if STAT is not None:
            gl.store(STAT + row, gl.full([ROWS], nothing, gl.float32, gl.SliceLayout(1, wide)), mask=row < end)
