"""Counter-based random numbers for dropout, shared by every kernel that drops.

- Philox-4x32-10 (Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3"): the key is the call's 64-bit
  seed, the counter is the element's place (column, row, plane), never a thread or tile number. So the mask is the
  same in forward and backward, whatever the tile sizes, and nothing of it is stored.
- `fastformer.ops.random.philox_keep` is the same function in PyTorch.
"""

import triton
import triton.language as tl


@triton.jit
def keep(seed, column, row, plane, threshold):
    """Which elements survive: True with probability 1 - threshold / 2**32.

    Args:
        seed: int64 scalar, the key.
        column, row, plane: integer tensors or scalars that broadcast together, each below 2**32: the element's place.
        threshold: uint32-valued scalar, round(p * 2**32).
    """
    c0 = tl.cast(column, tl.uint32)
    c1 = tl.cast(row, tl.uint32)
    c2 = tl.cast(plane, tl.uint32)
    zero = (c0 ^ c0) + (c1 ^ c1) + (c2 ^ c2)
    draw, _, _, _ = tl.philox(seed, zero + c0, zero + c1, zero + c2, zero)
    return draw >= tl.cast(threshold, tl.uint32)


@triton.jit
def keep_columns(seed, first_column, row, plane, threshold, WIDTH: tl.constexpr):
    """Which elements of a tile survive, four neighbouring columns a Philox call (the integer work of one call a column
    would outlast the memory traffic of a row operator about four times).

    Element (row, column) takes draw `column % 4` of the counter (column // 4, row, plane), so the mask depends on
    places alone here too, but differs from `keep`'s; `philox_keep(..., draws=4)` is its reference.

    Args:
        seed, plane, threshold: as in `keep`.
        first_column: the tile's first column, a multiple of 4.
        row: integer tensor [BLOCK_M].
        WIDTH: columns of the tile, a power of two and a multiple of 4.

    Returns:
        bool tensor [BLOCK_M, WIDTH].
    """
    quarter: tl.constexpr = WIDTH // 4
    c0 = (tl.cast(first_column, tl.uint32) // 4 + tl.arange(0, quarter).to(tl.uint32))[None, :]
    c1 = row.to(tl.uint32)[:, None]
    c2 = tl.cast(plane, tl.uint32)
    zero = (c0 ^ c0) + (c1 ^ c1) + (c2 ^ c2)  # [BLOCK_M, quarter]
    d0, d1, d2, d3 = tl.philox(seed, zero + c0, zero + c1, zero + c2, zero)
    limit = tl.cast(threshold, tl.uint32)
    even = tl.interleave((d0 >= limit).to(tl.int8), (d2 >= limit).to(tl.int8))
    odd = tl.interleave((d1 >= limit).to(tl.int8), (d3 >= limit).to(tl.int8))
    return tl.interleave(even, odd) != 0  # [BLOCK_M, WIDTH]
