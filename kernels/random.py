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
    c0 = tl.to_tensor(column).to(tl.uint32)
    c1 = tl.to_tensor(row).to(tl.uint32)
    c2 = tl.to_tensor(plane).to(tl.uint32)
    zero = (c0 ^ c0) + (c1 ^ c1) + (c2 ^ c2)
    draw, _, _, _ = tl.philox(seed, zero + c0, zero + c1, zero + c2, zero)
    return draw >= tl.to_tensor(threshold).to(tl.uint32)
