"""One call of an attention kernel: its tensors, and the numbers every launcher derives from them.

Those numbers follow from shapes, strides, dtypes and options alone, so they are derived once for each combination, and
with them whatever launchers make of them: a training step repeats the same few calls in every layer.
"""

import functools
import importlib
import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastformer.kernels.rows import power_of_two
from fastformer.kernels.targets import interpreting, target_of

_Made = TypeVar("_Made")
_LOG2E = 1.0 / math.log(2.0)
_BOOL, _BYTE = torch.bool, torch.uint8

# Sequences of at most so many tokens take the kernels of `short`, in half precision and up to a head dimension of 128.
SHORT = 128
# Combinations remembered; packed batches bring a new one each step.
_KEPT = 256
_derived: dict[Any, dict[str, Any]] = {}


def forget() -> None:
    """Derive and prepare anew from now on, as after a change of the tiles."""
    _derived.clear()


@functools.cache
def hopper_launchers() -> Any:
    """The module of the Hopper kernels' launchers; imported where they are chosen."""
    return importlib.import_module("fastformer.kernels.attention.hopper")


def as_bytes(mask: Tensor | None) -> Tensor | None:
    """A bool mask as the kernels read it."""
    return mask.view(_BYTE) if mask is not None and mask.dtype == _BOOL else mask


class Call:
    """What forward and backward launchers are given.

    Args:
        query: dense (B, H, Sq, D), or packed (T, H, D) with cu_q and cu_k; last stride 1.
        key, value: as query, with Hk heads; (…, D) and (…, Dv).
        cu_q, cu_k: int32 (B + 1,) boundaries of packed sequences, or None.
        max_q, max_k: longest packed sequences; ignored for dense calls.
        mask: bool or float, expanded to (B, H, Sq, Sk), or None.
        slopes: (H,) or (B, H), contiguous; sinks: (H,), contiguous; seed: int64 (1,); or None.
        dropout_p, causal, scale, bottom_right, left, right, softcap: as `fastformer.ops.attention.options.Options`.
        threshold: dropout's 32-bit threshold.
    """

    packed: bool
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    q_len: int
    k_len: int
    mask_strides: tuple[int, ...]
    slope_stride: int
    scale: float
    scales: tuple[float, float]
    left: int
    right: int
    threshold: int
    keep_scale: float
    block_d: int
    block_v: int
    rich: bool
    heavy: bool
    short: bool
    short_backward: bool
    wide: bool
    constants: dict[str, Any]
    _made: dict[Any, Any]

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_q: Tensor | None,
        cu_k: Tensor | None,
        max_q: int,
        max_k: int,
        mask: Tensor | None,
        slopes: Tensor | None,
        sinks: Tensor | None,
        seed: Tensor | None,
        dropout_p: float,
        threshold: int,
        causal: bool,
        scale: float,
        bottom_right: bool,
        left: int,
        right: int,
        softcap: float,
    ) -> None:
        # Causal rows may see nothing only if aligned with more queries than keys. Packed, the lengths are on the
        # device; the same bounds make the same lengths.
        uneven = False
        if causal and bottom_right and cu_q is not None and cu_k is not None:
            uneven = cu_q.data_ptr() != cu_k.data_ptr()
        batch = query.shape[0] if cu_q is None else cu_q.shape[0] - 1
        numbers = (batch, max_q, max_k, dropout_p, threshold, causal, scale, bottom_right, left, right, softcap, uneven)
        signature = (
            *((x.shape, x.stride()) for x in (query, key, value)),
            *(None if x is None else (x.shape, x.dtype) for x in (slopes, sinks)),
            None if mask is None else (mask.stride(), mask.dtype),
            (query.dtype, query.device, cu_q is None, seed is None),
            numbers,
        )
        derived = _derived.get(signature)
        if derived is None:
            if len(_derived) >= _KEPT:
                _derived.clear()
            derived = _derived[signature] = _derive(query, key, value, cu_q is not None, mask, slopes, *numbers)
        vars(self).update(derived)
        self.query, self.key, self.value = query, key, value
        self.cu_q, self.cu_k, self.slopes, self.sinks, self.seed = cu_q, cu_k, slopes, sinks, seed
        self.mask = as_bytes(mask)

    def once(self, name: object, make: Callable[[], _Made]) -> _Made:
        """What `make` made for the first of all calls with these numbers on this target. It must hold no tensor.

        Args:
            name: of what is made, with whatever it depends on besides the call's numbers. Same name, same thing.
        """
        key = (name, target_of(self.query.device))
        found = self._made.get(key)
        if found is None:
            found = self._made[key] = make()
        return found

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Query, key, value, boundaries of queries and keys, mask, slopes, sinks, seed."""
        return (
            self.query, self.key, self.value, self.cu_q, self.cu_k, self.mask, self.slopes, self.sinks, self.seed
        )  # fmt: skip

    def strides(self, x: Tensor) -> tuple[int, int, int]:
        """(batch, head, token) strides of a tensor laid out like query."""
        return self.along(x.stride())

    def along(self, strides: tuple[int, ...]) -> tuple[int, int, int]:
        """The same of its strides."""
        return (0, strides[1], strides[0]) if self.packed else (strides[0], strides[1], strides[2])

    def layout_like(self, x: Tensor, last: int | None = None) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shape and strides of a tensor of x's shape (with another last dimension), tokens outside heads in memory."""
        last = x.shape[-1] if last is None else last
        row = max(last, 1)
        if self.packed:
            tokens, heads, _ = x.shape
            return (tokens, heads, last), (max(heads, 1) * row, row, 1)
        batch, heads, length, _ = x.shape
        strides = (max(length, 1) * max(heads, 1) * row, row, max(heads, 1) * row, 1)
        return (batch, heads, length, last), strides

    def empty_like(self, x: Tensor) -> Tensor:
        """Uninitialised tensor of that layout."""
        shape, strides = self.layout_like(x)
        return torch.empty_strided(shape, strides, dtype=x.dtype, device=x.device)

    def row_strides(self) -> tuple[int, int]:
        """(batch, head) strides of the LSE and of delta."""
        return (0, self.query.shape[0]) if self.packed else (self.heads * self.q_len, self.q_len)


def _derive(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packed: bool,
    mask: Tensor | None,
    slopes: Tensor | None,
    batch: int,
    max_q: int,
    max_k: int,
    dropout_p: float,
    threshold: int,
    causal: bool,
    scale: float,
    bottom_right: bool,
    left: int,
    right: int,
    softcap: float,
    uneven: bool,
) -> dict[str, Any]:
    """The attributes of a call that hold no tensor."""
    heads, kv_heads = query.shape[1], key.shape[1]
    head_dim, value_dim = query.shape[-1], value.shape[-1]
    q_len, k_len = (max_q, max_k) if packed else (query.shape[2], key.shape[2])
    # A side as long as the sequences bounds nothing; left in, it would overflow the kernels' 32-bit positions.
    left, right = (-1 if side >= max(q_len, k_len) else side for side in (left, right))
    # Causal rows that may see nothing are those of a window, and treated as one.
    if causal and bottom_right and right < 0 and (uneven or q_len > k_len):
        right = 0
    block_d, block_v = max(16, power_of_two(head_dim)), max(16, power_of_two(value_dim))
    # Head dimensions that a program cannot hold. fp32 products run without matrix units and hold a whole head dimension
    # of both factors in registers; half precision with few rules fits up to 512.
    rich = mask is not None or slopes is not None or dropout_p > 0.0 or softcap != 0.0 or left >= 0 or right >= 0
    longest, single = max(head_dim, value_dim), query.dtype == torch.float32
    # Rules that look at every place of a tile. The others cost registers by row or by key alone, or one draw a place.
    heavy = softcap != 0.0 or slopes is not None or left >= 0 or right >= 0
    heavy = heavy or (mask is not None and mask.stride(-2) != 0)
    # Sequences whose keys lie in one tile. The interpreter's bound is small, so that small tests reach both ways.
    length = max(q_len, k_len)
    short = length <= (20 if interpreting() else SHORT) and longest <= 128 and (interpreting() or not single)
    # Kernels are compiled once for masks whose rows are aligned, and once for all others, whatever their lengths: only
    # where rows of keys differ from query to query is that worth anything.
    mask_strides = (0, 0, 0, 0) if mask is None else mask.stride()
    aligned = mask_strides[2] != 0 and mask_strides[2] < 2**31 and not any(s % 16 for s in mask_strides[:3])
    unit = 16 if aligned else 1
    # One program would hold the sums of several heads, or of 128 tokens of wider ones, only by spilling.
    return {
        "packed": packed,
        "batch": batch,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "value_dim": value_dim,
        "q_len": q_len,
        "k_len": k_len,
        "mask_strides": (*(s // unit for s in mask_strides[:3]), mask_strides[3]),
        "slope_stride": slopes.shape[-1] if slopes is not None and slopes.ndim == 2 else 0,
        "scale": scale,
        "scales": (scale / softcap, softcap * _LOG2E) if softcap else (scale * _LOG2E, 1.0),
        "left": left,
        "right": right,
        "threshold": threshold,
        "keep_scale": 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0,
        "block_d": block_d,
        "block_v": block_v,
        "rich": rich,
        "heavy": heavy,
        "short": short,
        "short_backward": short and not heavy and heads == kv_heads and (length <= 64 or longest <= 64),
        "wide": longest > 64 if single else longest > (256 if rich or bottom_right else 512),
        "constants": {
            "GROUP": heads // max(1, kv_heads),
            "BOTTOM_RIGHT": bottom_right,
            "CAUSAL": causal,
            "LEFT": left >= 0,
            "RIGHT": right >= 0,
            "BOOL_MASK": mask is not None and mask.dtype == _BOOL,
            # A mask that is the same for all queries, as padding is: its keys need not even be read.
            "KEY_MASK": mask is not None and mask.stride(-2) == 0,
            "MASK_UNIT": unit,
            "SOFTCAP": softcap != 0.0,
            "DROPOUT": dropout_p > 0.0,
            "HEAD_DIM": head_dim,
            "VALUE_DIM": value_dim,
            "BLOCK_D": block_d,
            "BLOCK_V": block_v,
            # fp32 is fp32: no TF32 rounding of the inputs.
            "PRECISION": "ieee",
        },
        "_made": {},
    }
