"""What a call of an attention operator asks for, checked once for dense, packed and cached calls.

The rules, in the order in which every implementation applies them to the score of query row i and key column j:

    s = scale * <q_i, k_j>
    s = softcap * tanh(s / softcap)                       softcap
    s = s + attn_mask[i, j]                               float attn_mask
    s = s - alibi_slopes[h] * |i + offset - j|            ALiBi (Press et al., 2022)
    s = -inf unless   attn_mask[i, j]                     bool attn_mask
                 and  j <= i + offset                     is_causal
                 and  i + offset - left <= j <= i + offset + right      window

with offset = 0 for causal_alignment "top-left" and len(key) - len(query) for "bottom-right". `sinks[h]` is one more
logit in the softmax's denominator, without a value. Dropout acts on the probabilities.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from fastformer.ops.validate import check_probability, check_tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
OPEN = -1  # a side of the window without a limit


@dataclass(frozen=True)
class Options:
    """The numbers of a call; its tensors travel beside it.

    Attributes:
        dropout_p: probability of dropping an attention probability.
        is_causal: whether key j is visible to query i only if j <= i + offset.
        scale: factor of the scores.
        bottom_right: offset is len(key) - len(query) rather than 0.
        left, right: window around i + offset, OPEN for no limit.
        softcap: bound of the scores, 0.0 for none.
    """

    dropout_p: float
    is_causal: bool
    scale: float
    bottom_right: bool
    left: int
    right: int
    softcap: float

    @property
    def has_window(self) -> bool:
        return self.left != OPEN or self.right != OPEN

    @property
    def banded(self) -> bool:
        """Whether the place (i, j) alone can hide a key: causal or window."""
        return self.is_causal or self.has_window


_passed: dict[Any, Options] = {}


def once(check: Callable[[], Options], tensors: tuple[object, ...], numbers: tuple[Any, ...]) -> Options:
    """check(), or what it said of an earlier call of the same kind, for the calls that have no `Kind`.

    Args:
        check: looks at nothing but the tensors' shapes, dtypes and devices, and the numbers.
        tensors: the call's tensor arguments; anything but plain tensors and None is checked each time.
        numbers: its other arguments, with what tells apart different checks.
    """
    if torch.compiler.is_compiling():
        return check()
    kind: list[Any] = [numbers]
    for x in tensors:
        if x is None:
            kind.append(None)
        elif type(x) is Tensor or type(x) is Parameter:
            kind.append((x.shape, x.dtype, x.device))
        else:
            return check()
    try:
        key = tuple(kind)
        found = _passed.get(key)
    except TypeError:  # a list for the window
        return check()
    if found is None:
        found = check()
        if len(_passed) >= 256:
            _passed.clear()
        _passed[key] = found
    return found


def read_options(
    head_dim: int,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    causal_alignment: str,
    window: tuple[int | None, int | None] | None,
    softcap: float | None,
) -> Options:
    """Check the numbers of a call.

    Raises:
        ValueError: one is out of range; the message names it.
        TypeError: window is not a pair.
    """
    check_probability("dropout_p", dropout_p)
    if causal_alignment not in ("top-left", "bottom-right"):
        raise ValueError(f"causal_alignment must be 'top-left' or 'bottom-right', got {causal_alignment!r}")
    left, right = OPEN, OPEN
    if window is not None:
        if not isinstance(window, (tuple, list)) or len(window) != 2:
            raise TypeError(f"window must be a pair (left, right), got {window!r}")
        sides = []
        for name, side in zip(("left", "right"), window, strict=True):
            if side is not None and (not isinstance(side, int) or side < OPEN):
                raise ValueError(
                    f"window's {name} side must be an integer >= 0, or None or -1 for no limit, got {side!r}"
                )
            # No sequence is that long; a longer side would overflow where it is added to a position.
            sides.append(OPEN if side is None or side >= 2**31 - 1 else side)
        left, right = sides
    if softcap is not None and not (softcap > 0.0 and math.isfinite(softcap)):
        raise ValueError(f"softcap must be a positive number or None, got {softcap}")
    if scale is None:
        scale = 1.0 / math.sqrt(head_dim) if head_dim else 1.0
    elif not -math.inf < scale < math.inf:  # torch.compile may hand in a symbol, which math.isfinite refuses
        raise ValueError(f"scale must be finite, got {scale}")
    return Options(
        float(dropout_p),
        bool(is_causal),
        float(scale),
        causal_alignment == "bottom-right",
        left,
        right,
        float(softcap or 0.0),
    )


def check_heads(query: Tensor, key: Tensor, value: Tensor, head_axis: int, enable_gqa: bool) -> None:
    """Check that three projections of rank 3 or 4 fit together.

    Raises:
        ValueError: ranks, head dimensions, head counts or lengths disagree.
        TypeError: dtypes differ or are no floating-point dtype attention works in.
    """
    check_tensor("query", query, dtypes=FLOATS)
    for name, tensor in (("key", key), ("value", value)):
        check_tensor(name, tensor, ndim=query.ndim, device=query.device)
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name} must have query's dtype {query.dtype}, got {tensor.dtype}")
    if key.shape[:-1] != value.shape[:-1]:
        raise ValueError(
            f"value must have key's shape but for the last dimension, got {tuple(value.shape)} for {tuple(key.shape)}"
        )
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"key must have query's head dimension {query.shape[-1]}, got {key.shape[-1]}")
    heads, kv_heads = query.shape[head_axis], key.shape[head_axis]
    if heads != kv_heads:
        if not enable_gqa:
            raise ValueError(
                f"key must have query's {heads} heads, got {kv_heads}; pass enable_gqa=True to share key heads"
            )
        if heads == 0 or kv_heads == 0 or heads % kv_heads:
            raise ValueError(f"query's {heads} heads must be a multiple of key's {kv_heads} heads")


def check_extras(
    query: Tensor,
    heads: int,
    batch: int,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    dropout_seed: Tensor | None,
) -> None:
    """Check the small tensors that go with a call.

    Raises:
        TypeError, ValueError: wrong dtype, shape or device; the message names the argument.
    """
    if alibi_slopes is not None:
        check_tensor("alibi_slopes", alibi_slopes, dtypes=FLOATS, device=query.device)
        if alibi_slopes.shape not in ((heads,), (batch, heads)):
            raise ValueError(
                f"alibi_slopes must have shape ({heads},) or ({batch}, {heads}), got {tuple(alibi_slopes.shape)}"
            )
    if sinks is not None:
        check_tensor("sinks", sinks, dtypes=FLOATS, device=query.device, shape=(heads,))
    if dropout_seed is not None:
        check_tensor("dropout_seed", dropout_seed, dtypes=(torch.int64,), device=query.device)
        if dropout_seed.numel() != 1:
            raise ValueError(f"dropout_seed must hold one element, got shape {tuple(dropout_seed.shape)}")


def check_mask(attn_mask: Tensor | None, query: Tensor, shape: tuple[int, int, int, int]) -> None:
    """Check that attn_mask broadcasts to (B, H, Sq, Sk).

    Raises:
        TypeError: neither bool nor floating point.
        ValueError: not 2-D to 4-D, does not broadcast, or on another device.
    """
    if attn_mask is None:
        return
    check_tensor("attn_mask", attn_mask, dtypes=(torch.bool, *FLOATS), device=query.device)
    padded = (1,) * (4 - attn_mask.ndim) + tuple(attn_mask.shape)
    if not 2 <= attn_mask.ndim <= 4 or any(m not in (1, s) for m, s in zip(padded, shape, strict=True)):
        raise ValueError(f"attn_mask must be 2-D to 4-D and broadcast to {shape}, got {tuple(attn_mask.shape)}")


def check_boundaries(
    query: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int
) -> int:
    """Check shapes and dtypes of packed sequences' boundaries; returns the number of sequences.

    Raises:
        TypeError, ValueError: the message names the argument.
    """
    for name, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        check_tensor(name, cu, ndim=1, dtypes=(torch.int32,), device=query.device)
        if cu.shape[0] < 1:
            raise ValueError(f"{name} must hold B + 1 boundaries, got none")
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"cu_seqlens_k must bound as many sequences as cu_seqlens_q, {cu_seqlens_q.shape[0] - 1}, "
            f"got {cu_seqlens_k.shape[0] - 1}"
        )
    for name, longest in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if isinstance(longest, Tensor) or longest < 0:
            raise ValueError(f"{name} must be an int >= 0, got {longest!r}")
    return cu_seqlens_q.shape[0] - 1


def values_at_hand(tensor: Tensor) -> bool:
    """Whether reading a tensor's values waits for no device: on the CPU, in eager mode."""
    return tensor.device.type == "cpu" and type(tensor) is Tensor and not torch.compiler.is_compiling()


def check_boundary_values(
    query: Tensor, key: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int
) -> None:
    """Check the boundaries' values where they are at hand.

    Raises:
        ValueError: they do not fit the tensors or the longest lengths.
    """
    if not values_at_hand(cu_seqlens_q):
        return
    for which, cu, longest, tokens in (
        ("q", cu_seqlens_q, max_seqlen_q, query.shape[0]),
        ("k", cu_seqlens_k, max_seqlen_k, key.shape[0]),
    ):
        if which == "k" and cu is cu_seqlens_q and (longest, tokens) == (max_seqlen_q, query.shape[0]):
            return
        bounds = cu.tolist()
        lengths = [b - a for a, b in itertools.pairwise(bounds)]
        if bounds[0] != 0 or bounds[-1] > tokens or min(lengths, default=0) < 0:
            raise ValueError(
                f"cu_seqlens_{which} must start at 0, never fall, and end within {tokens} tokens, got {bounds}"
            )
        if max(lengths, default=0) > longest:
            raise ValueError(f"max_seqlen_{which} must be at least the longest sequence, {max(lengths)}, got {longest}")
