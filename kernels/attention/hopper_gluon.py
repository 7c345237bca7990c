"""The calls of Gluon that changed their names between Triton 3.6 and 3.9, each under one name.

- 3.6 and 3.7 say `async_copy_global_to_shared`, 3.8 says both, 3.9 only `async_load`; the arguments are the same.
- Where a barrier lives has one spelling that all of them accept, so it stands here once too.
"""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


@gluon.jit
def barriers(NUMBER: gl.constexpr, COUNT: gl.constexpr):
    """NUMBER barriers in shared memory, each of whose phases takes COUNT arrivals."""
    made = gl.allocate_shared_memory(gl.int64, [NUMBER, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUMBER):
        mbarrier.init(made.index(i), count=COUNT)
    return made


@gluon.jit
def held(x):
    """x, computed once. Whatever follows from arguments and program numbers alone, the compiler computes again for
    every partition, at the program's start, and spills it there."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)
