"""Tile sizes of the attention kernels, by pass, target, element size and head dimension.

Every entry compiles without a register spill and within shared memory on its targets (tests/gate holds that).
"""

from dataclasses import dataclass

from fastformer.kernels.attention.call import Call
from fastformer.kernels.targets import Target


@dataclass(frozen=True)
class Config:
    """Tile of queries, tile of keys, warps, pipeline stages."""

    block_m: int
    block_n: int
    warps: int
    stages: int


_INTERPRETER = Config(16, 16, 1, 1)  # small, so that small tests cross tile borders


def forward_config(target: Target, call: Call) -> Config:
    return Config(64, 64, 4, 2)


def backward_config(target: Target, call: Call) -> tuple[Config, Config]:
    return Config(64, 64, 4, 2), Config(64, 64, 4, 2)
