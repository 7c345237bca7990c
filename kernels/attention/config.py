"""Tile sizes of the attention kernels, by pass, target, dtype and head dimension.

These are the defaults; where `tiles` has a measured row, that counts. Every entry compiles without a register spill and
within shared memory on its targets; tests/gate holds that. Masks over keys alone and dropout cost registers by key or
one draw a place (`_MASKED`); rules that look at every place (windows, softcap, ALiBi, other masks) take the small tiles
of `_RICH`.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton

from fastformer.kernels.attention import tiles
from fastformer.kernels.attention.call import Call
from fastformer.kernels.launch import Bound
from fastformer.kernels.rows import power_of_two
from fastformer.kernels.targets import Target


@dataclass(frozen=True)
class Config:
    """Tile of queries, tile of keys, warps, pipeline stages."""

    block_m: int
    block_n: int
    warps: int
    stages: int

    def options(self, target: Target) -> dict[str, int]:
        """Launch options. Left alone, ptxas now and then spills a few registers to reach a better occupancy."""
        found = {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "num_warps": self.warps, "num_stages": self.stages}
        if target.backend == "cuda":
            found["maxnreg"] = min(255, 65536 // (32 * self.warps))
        return found


_INTERPRETER = Config(16, 16, 1, 1)  # small, so that small tests cross tile borders

# By head dimension up to …: (forward, dQ, dK and dV).
_Table = dict[int, tuple[Config, Config, Config]]

_HOPPER: _Table = {
    64: (Config(128, 128, 8, 2), Config(128, 64, 8, 2), Config(32, 128, 8, 2)),
    128: (Config(128, 64, 8, 3), Config(128, 64, 8, 2), Config(32, 64, 8, 2)),
    256: (Config(128, 32, 8, 3), Config(32, 32, 8, 1), Config(32, 32, 8, 2)),
    512: (Config(32, 16, 8, 1), Config(32, 16, 8, 1), Config(16, 16, 8, 1)),
}
# The ptxas of Triton 3.9 spills where older ones do not: here 144 bytes with twice the queries.
_VERSION = tuple(map(int, triton.__version__.split(".")[:2]))
_NEWER = _VERSION >= (3, 8)
if _NEWER:
    _HOPPER[128] = (*_HOPPER[128][:2], Config(16, 64, 8, 2))
_BLACKWELL: _Table = {
    64: (Config(128, 64, 8, 2), Config(128, 64, 8, 2), Config(32, 64, 8, 2)),
    128: (Config(128, 64, 8, 2), Config(128, 64, 8, 2), Config(32, 32, 8, 2)),
    256: (Config(32, 16, 8, 1), Config(32, 32, 8, 1), Config(32, 32, 8, 2)),
    512: (Config(32, 16, 8, 1), Config(32, 16, 8, 1), Config(16, 16, 8, 1)),
}
# Four warps may use all 512 vector registers a lane there.
_AMD: _Table = {
    64: (Config(64, 64, 4, 2), Config(64, 32, 4, 2), Config(32, 32, 4, 2)),
    128: (Config(64, 32, 4, 2), Config(32, 32, 4, 2), Config(32, 32, 4, 1)),
    256: (Config(32, 32, 4, 1), Config(32, 32, 4, 1), Config(16, 16, 4, 1)),
    512: (Config(16, 16, 4, 1), Config(16, 16, 4, 1), Config(16, 16, 4, 1)),
}
_AMD_MASKED: _Table = {
    64: (Config(128, 64, 4, 2), Config(64, 64, 4, 1), Config(32, 64, 4, 1)),
    128: (Config(64, 64, 4, 1), Config(32, 64, 4, 1), Config(32, 64, 4, 1)),
}
_AMD_RICH: _Table = {
    64: (Config(32, 32, 4, 1), Config(32, 32, 4, 1), Config(32, 32, 4, 1)),
    128: (Config(32, 32, 4, 1), Config(32, 32, 4, 1), Config(32, 32, 4, 1)),
    256: (Config(32, 32, 4, 1), Config(32, 32, 4, 1), Config(16, 32, 4, 1)),
}
_OTHER: _Table = {
    64: (Config(64, 64, 4, 2), Config(64, 32, 4, 2), Config(32, 32, 4, 2)),
    128: (Config(64, 32, 8, 2), Config(64, 32, 8, 2), Config(32, 32, 8, 2)),
    256: (Config(32, 32, 8, 1), Config(32, 32, 8, 1), Config(32, 32, 8, 1)),
    512: (Config(32, 16, 8, 1), Config(32, 16, 8, 1), Config(16, 16, 8, 1)),
}
_RICH: _Table = {
    64: (Config(32, 32, 4, 1), Config(32, 32, 4, 1), Config(32, 32, 4, 1)),
    128: (Config(32, 32, 4, 1), Config(32, 32, 4, 1), Config(32, 32, 8, 1)),
    256: (Config(32, 32, 8, 1), Config(32, 32, 8, 1), Config(16, 32, 8, 1)),
}
if _NEWER:
    _RICH[256] = (Config(32, 16, 8, 1), *_RICH[256][1:])  # 12 bytes with twice the keys
_MASKED: dict[str, _Table] = {
    "sm_80": {
        64: (Config(128, 64, 8, 2), Config(64, 32, 4, 1), Config(32, 64, 8, 1)),
        128: (Config(64, 64, 8, 1), Config(64, 64, 8, 1), Config(32, 64, 8, 1)),
    },
    "sm_90": {
        64: (Config(128, 64, 8, 2), Config(64, 64, 4, 1), Config(32, 64, 4, 1)),
        128: (Config(64, 64, 8, 2), Config(64, 32, 8, 1), Config(32, 32, 4, 1)),
    },
    "sm_100": {
        64: (Config(128, 64, 8, 2), Config(64, 64, 4, 1), Config(32, 64, 4, 1)),
        128: (Config(128, 64, 8, 2), Config(64, 64, 8, 1), Config(32, 64, 8, 1)),
    },
}
if _VERSION < (3, 7):
    _MASKED["sm_80"][64] = (Config(128, 64, 8, 1), *_MASKED["sm_80"][64][1:])  # 8 bytes with two stages
_OTHER_MASKED: _Table = {
    64: (Config(128, 64, 8, 1), Config(64, 32, 4, 1), Config(32, 32, 4, 1)),
    128: (Config(64, 64, 8, 1), Config(32, 32, 4, 1), Config(32, 32, 8, 1)),
}
_SINGLE: _Table = {
    64: (Config(32, 16, 8, 1), Config(16, 16, 4, 1), Config(32, 16, 4, 1)),
}

# Tiles of `short` by head dimension up to …, and tokens up to …: (rows, warps); the tile of keys holds all of them. The
# last is forward's under rules that look at every place of a tile.
_SHORT_FORWARD = {
    64: {32: (32, 2), 64: (64, 4), 128: (64, 4)},
    128: {32: (32, 2), 64: (64, 4), 128: (64, 8)},
}
_SHORT_HEAVY = {64: (32, 4), 128: (32, 8)}
_SHORT_BACKWARD = {
    64: {32: (32, 2), 64: (64, 4), 128: (32, 8)},
    128: {32: (32, 4), 64: (64, 8)},
}

# Tiles of `wide`, with the columns of a chunk and those that a program owns: half precision, and fp32.
_WIDE = ((Config(32, 32, 4, 1), Config(32, 32, 4, 1), Config(16, 32, 4, 1)), 64, 128)
_WIDE_SINGLE = ((Config(16, 16, 4, 1),) * 3, 32, 128)
# Tile of `bias` and `weights`, with the columns of a chunk: half precision, and fp32.
_MAPS = (Config(64, 32, 4, 1), 64)
_MAPS_SINGLE = (Config(16, 16, 4, 1), 32)


def rules_of(call: Call) -> str:
    """The class of a call's rules, one of `tiles.RULES`. Of wider heads than 128 masked calls count as rich."""
    if not call.rich:
        return "plain"
    return "rich" if call.heavy or max(call.block_d, call.block_v) > 128 else "masked"


def _measured(target: Target, call: Call, name: str) -> Config | None:
    """What a table of `tiles` says of this call."""
    dtype = "single" if call.query.dtype == torch.float32 else "half"
    width, length = max(64, call.block_d, call.block_v), tiles.length_class(name, max(call.q_len, call.k_len))
    tile = tiles.chosen((target.name, name, rules_of(call), dtype, width, length))
    return None if tile is None else Config(*tile)


def _configs(target: Target, call: Call) -> tuple[Config, Config, Config]:
    if target.name == "interpreter":
        return (_INTERPRETER,) * 3
    if call.wide:
        return (_WIDE_SINGLE if call.query.dtype == torch.float32 else _WIDE)[0]
    width = max(64, call.block_d, call.block_v)
    if call.query.dtype == torch.float32:
        table = _SINGLE
    elif target.backend == "hip":
        table = {"plain": _AMD, "masked": _AMD_MASKED, "rich": _AMD_RICH}[rules_of(call)]
    elif rules_of(call) == "plain":
        table = {"sm_90": _HOPPER, "sm_100": _BLACKWELL}.get(target.name, _OTHER)
    else:
        table = _MASKED.get(target.name, _OTHER_MASKED) if rules_of(call) == "masked" else _RICH
    return table[width]


def forward_config(target: Target, call: Call) -> Config:
    """Tiles of the forward kernel."""
    return _measured(target, call, "forward") or _configs(target, call)[0]


def backward_config(target: Target, call: Call) -> tuple[Config, Config]:
    """Tiles of the dQ kernel and of the dK and dV kernel."""
    by_row, by_key = _configs(target, call)[1:]
    return _measured(target, call, "dQ") or by_row, _measured(target, call, "dK and dV") or by_key


def takes_short_backward(target: Target, call: Call) -> bool:
    """Whether the backward is the one kernel of `short`. Beyond 64 tokens dropout's draws leave too few registers where
    factors of a product lie in registers (sm_80 and its kin: 24 bytes spill)."""
    beyond = max(call.q_len, call.k_len) > 64 and target.backend == "cuda" and target.name not in ("sm_90", "sm_100")
    return call.short_backward and not beyond


def short_config(target: Target, call: Call, name: str) -> Config:
    """Tiles of the kernels of `short`.

    Args:
        name: "short forward" or "short backward".
    """
    keys = max(16, power_of_two(max(call.q_len, call.k_len)))
    measured = _measured(target, call, name)
    if measured is not None:
        return Config(measured.block_m, keys, measured.warps, measured.stages)
    if target.name == "interpreter":
        return Config(16, keys, 1, 1)
    width, length = max(64, call.block_d, call.block_v), max(32, keys)
    if name == "short backward":
        rows, warps = _SHORT_BACKWARD[width][length]
    else:
        rows, warps = _SHORT_HEAVY[width] if call.heavy else _SHORT_FORWARD[width][length]
    # Four warps may use all 512 vector registers a lane on AMD.
    return Config(rows, keys, min(warps, 4) if target.backend == "hip" else warps, 1)


# Tiles of decoding by head dimension up to …: (rows at most, keys, warps, stages).
_DECODE = {64: (64, 64, 4, 3), 128: (32, 64, 4, 2), 256: (16, 32, 4, 2), 512: (16, 16, 8, 1)}
_DECODE_SINGLE = {64: (16, 16, 4, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1), 512: (16, 16, 8, 1)}
_DECODE_AMD_SINGLE = {**_DECODE_SINGLE, 512: (16, 16, 4, 1)}
# Several new tokens in a tile: the causal edge needs registers of its own, which wider heads do not leave.
_DECODE_SEVERAL = {64: (64, 64, 4, 3), 128: (32, 64, 8, 1), 256: (16, 32, 8, 1)}
_DECODE_AMD = {64: (32, 32, 4, 1), 128: (16, 32, 4, 1), 256: (16, 16, 4, 1), 512: (16, 16, 4, 1)}


def widest_of_several(target: Target, dtype: torch.dtype) -> int:
    """The widest padded head of which a tile may hold several new tokens."""
    if target.name == "interpreter":
        return 64
    return 128 if dtype == torch.float32 else 256


def decode_config(target: Target, width: int, dtype: torch.dtype, single: bool, rows: int, capacity: int) -> Config:
    """Tiles of attention over a cache.

    Args:
        width: the larger of the padded head dimensions.
        single: whether the rows of a tile are those of one new token.
        rows: query heads that share a key head, of one token or of all.
        capacity: tokens that the cache has room for.
    """
    held = min(256, max(16, power_of_two(rows)))
    if single:
        length = tiles.length_class("decode", capacity)
        kind = "single" if dtype == torch.float32 else "half"
        measured = tiles.chosen((target.name, "decode", "plain", kind, max(64, width), length))
        if measured is not None:
            return Config(min(held, measured[0]), *measured[1:])
    if target.name == "interpreter":
        return _INTERPRETER
    if dtype == torch.float32:
        table = _DECODE_AMD_SINGLE if target.backend == "hip" else _DECODE_SINGLE
    elif target.backend == "hip":
        table = _DECODE_AMD
    else:
        table = _DECODE if single else _DECODE_SEVERAL
    most, *others = table[max(64, width)]
    return Config(min(held, most), *others)


def chunked_constants(call: Call) -> dict[str, Any]:
    """Constants of the kernels that walk over the head dimension in chunks. It is no constant there: unrolled, the loop
    would load whole rows ahead and spill."""
    return {name: x for name, x in call.constants.items() if not name.endswith(("_DIM", "BLOCK_D", "BLOCK_V"))}


def wide_constants(target: Target, call: Call, columns: int) -> tuple[dict[str, Any], int]:
    """Constants of a kernel of `wide` whose outputs have so many columns, and how many programs share them."""
    if target.name == "interpreter":
        chunk, wide = 64, 128
    else:
        chunk, wide = (_WIDE_SINGLE if call.query.dtype == torch.float32 else _WIDE)[1:]
    parts = max(1, -(-columns // wide))
    return chunked_constants(call) | {"CHUNK": chunk, "WIDE": wide, "PARTS": parts}, parts


def map_config(target: Target, call: Call) -> tuple[Config, int]:
    """Tile of the kernels that hold nothing but scores (the bias's gradient, weights), and the columns of a chunk."""
    if target.name == "interpreter":
        return _INTERPRETER, 16
    return _MAPS_SINGLE if call.query.dtype == torch.float32 else _MAPS


def bind(
    target: Target,
    call: Call,
    kernel: Any,
    wide_kernel: Any,
    programs: int,
    numbers: tuple[Any, ...],
    config: Config,
    columns: int,
) -> Bound:
    """The launch of a kernel, or for wide heads of the one of `wide` whose outputs have so many columns.

    Args:
        programs: of the kernel; the other one has more. numbers: its arguments behind the tensors, likewise.
    """
    if not call.wide:
        return Bound(kernel, (programs,), numbers, {**call.constants, **config.options(target)})
    constants, parts = wide_constants(target, call, columns)
    numbers = (*numbers, call.head_dim, call.value_dim)
    return Bound(wide_kernel, (parts * programs,), numbers, {**constants, **config.options(target)})
