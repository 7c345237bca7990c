"""A small kernel by the book, the one on which every fault of the simulator's list is planted.

It multiplies a row of tiles with the same factor: a producer brings them through a ring of two buffers, a consumer
multiplies and stores.
"""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

M: gl.constexpr = gl.constexpr(64)
N: gl.constexpr = gl.constexpr(32)
STAGES: gl.constexpr = gl.constexpr(2)


@gluon.jit
def _produce(X, ring, full, empty, tiles):
    for i in range(tiles):
        stage = i % STAGES
        mbarrier.wait(empty.index(stage), ((i // STAGES) & 1) ^ 1)
        mbarrier.expect(full.index(stage), M * N * 2)
        tma.async_load(X, [i * M, 0], full.index(stage), ring.index(stage))


@gluon.jit
def _consume(OUT, ring, factor, full, empty, tiles):
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    m = gl.arange(0, M, gl.SliceLayout(1, layout))
    n = gl.arange(0, N, gl.SliceLayout(0, layout))
    for i in range(tiles):
        stage = i % STAGES
        mbarrier.wait(full.index(stage), (i // STAGES) & 1)
        acc = gl.zeros([M, N], gl.float32, layout)
        acc = warpgroup_mma(ring.index(stage), factor, acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index(stage), count=1)
        # The tile itself, doubled in registers, times the factor once more.
        left = gl.convert_layout((acc * 2.0).to(gl.float16), gl.DotOperandLayout(0, layout, 2))
        twice = warpgroup_mma(left, factor, gl.zeros([M, N], gl.float32, layout), is_async=True)
        twice, left = warpgroup_mma_wait(0, deps=[twice, left])
        gl.store(OUT + ((i * M + m)[:, None] * N + n[None, :]), twice)


@gluon.jit
def multiply(X, FACTOR, OUT, tiles):
    """OUT = 2 X F F for `tiles` tiles of 64 x 32."""
    smem: gl.constexpr = gl.NVMMASharedLayout(64, 16, 2)
    rows: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0])
    ring = gl.allocate_shared_memory(gl.float16, [STAGES, M, N], smem)
    factor = gl.allocate_shared_memory(gl.float16, [N, N], smem)
    k = gl.arange(0, N, gl.SliceLayout(1, rows))
    n = gl.arange(0, N, gl.SliceLayout(0, rows))
    factor.store(gl.load(FACTOR + (k[:, None] * N + n[None, :])))
    fence_async_shared()
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    gl.warp_specialize(
        [(_consume, (OUT, ring, factor, full, empty, tiles)), (_produce, (X, ring, full, empty, tiles))], [1], [24]
    )
