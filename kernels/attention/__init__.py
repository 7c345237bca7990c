"""Attention kernels: `score` holds the rules of a score once, `forward` and `backward` walk over tiles with them."""
