"""The mask function behind `attn_implementation="fastformer"`.

transformers describes which keys a query may see as a function of indices, put together from few parts. Where all parts
are known (causal, bidirectional, sliding window, packed sequences) the description itself is handed to the attention
function, in a `PlanMask`; no [queries, keys] tensor is written. Any other part (blocks of an image, chunks, a user's
own) is written out in four dimensions by transformers' own function, which is slower and as right.

DistilBERT and ModernBERT hand their position_ids neither to their attention nor to their masks, so a row packed by
positions alone would look like one long sequence. They are read off the model's running forward instead.
"""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastformer.integrations.plan import (
    Plan,
    PlanMask,
    packing_from_lengths,
    packing_from_mask,
    packing_from_positions,
)
from fastformer.ops.packing import Packing


@dataclass
class _Pattern:
    causal: bool = False
    left: int | None = None
    right: int | None = None
    packed: Tensor | None = None


def mask_forward(**call: Any) -> Tensor | None:
    """A `PlanMask`, or a bool [batch, 1, queries, keys] mask.

    Args:
        call: as transformers.masking_utils.sdpa_mask, of the installed version.
    """
    from transformers.masking_utils import sdpa_mask

    pattern = _Pattern()
    understood = _read(call["mask_function"], pattern) and not call.get("use_vmap") and _fits(call, pattern)
    if understood and not torch.compiler.is_exporting():
        return PlanMask.carrying(_plan(call, pattern), _device(call))
    return sdpa_mask(**{**call, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


def _read(function: Any, found: _Pattern) -> bool:
    """Collect the parts of a mask function; False if one of them is unknown."""
    from transformers import masking_utils

    if function is masking_utils.causal_mask_function:
        found.causal = True
        return True
    if function is getattr(masking_utils, "bidirectional_mask_function", None):
        return True
    parts = _closure(function)
    match getattr(function, "__qualname__", "").split(".")[0]:
        case "and_masks":
            return all(_read(part, found) for part in parts["mask_functions"])
        case "sliding_window_overlay":
            found.left = parts["sliding_window"] - 1
        case "sliding_window_bidirectional_overlay":
            found.left = found.right = parts["sliding_window"]
        case "packed_sequence_mask_function":
            found.packed = parts["packed_sequence_mask"]
        case "remap_positions_for_packed_sequence":
            # Distances within a sequence are the same in its own positions as in the packed batch's.
            return _read(parts["mask_function"], found)
        case _:
            return False
    return True


def _closure(function: Any) -> dict[str, Any]:
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    return dict(zip(names, (cell.cell_contents for cell in function.__closure__ or ()), strict=True)) if names else {}


def _fits(call: dict[str, Any], pattern: _Pattern) -> bool:
    """Whether a plan can say it: keys that end where queries do, and one packed row."""
    queries, keys = _query_length(call), call["kv_length"]
    if queries != keys and pattern.causal:
        # transformers 4.57 gives the place of the first query as a tensor, which reading would wait for.
        offset = call.get("q_offset")
        if not isinstance(offset, int) or offset + queries != keys + call.get("kv_offset", 0):
            return False
    if pattern.packed is not None and (call["batch_size"] != 1 or call.get("attention_mask") is not None):
        return False
    mask = call.get("attention_mask")
    return mask is None or mask.shape[1] >= keys + call.get("kv_offset", 0)


def _plan(call: dict[str, Any], pattern: _Pattern) -> Plan:
    window = None
    if pattern.left is not None:
        window = (pattern.left, 0 if pattern.right is None else pattern.right)
    packing = None
    if pattern.packed is not None:
        row = pattern.packed[0]
        starts = torch.nn.functional.pad((row.diff() != 0).nonzero().squeeze(1) + 1, (1, 0)).tolist()
        bounds = [*starts, len(row)]
        longest = max(b - a for a, b in itertools.pairwise(bounds))
        packing = packing_from_lengths(torch.tensor(bounds, device=row.device), longest, len(row))
    mask, offset = call.get("attention_mask"), call.get("kv_offset", 0)
    if mask is not None:
        mask = mask[:, offset : offset + call["kv_length"]] != 0
    if packing is None and not pattern.causal and call["batch_size"] == 1:
        packing = _packing_by_positions(call, mask)
        mask = mask if packing is None else None
    return Plan(packing, mask, causal=pattern.causal, window=window)


def _packing_by_positions(call: dict[str, Any], mask: Tensor | None) -> Packing | None:
    """How a row of an encoder is packed, if the position_ids of the model that asks for this mask start again."""
    config = call.get("config")
    # Of a decoder this may be cross-attention, whose keys are others.
    if config is None or getattr(config, "is_decoder", False) or getattr(config, "is_encoder_decoder", False):
        return None
    if torch.compiler.is_compiling() or call["kv_length"] != _query_length(call):
        return None
    frame: Any = sys._getframe(1)
    while frame is not None and not isinstance(frame.f_locals.get("self"), torch.nn.Module):
        frame = frame.f_back
    positions = None if frame is None else frame.f_locals.get("position_ids")
    if not isinstance(positions, Tensor) or positions.shape[-1] != call["kv_length"]:
        return None
    if not hasattr(positions, "fastformer_packing"):  # of several masks, the first asks
        positions.fastformer_packing = packing_from_positions(positions)  # type: ignore[attr-defined]
    packing: Packing | None = positions.fastformer_packing  # type: ignore[attr-defined]
    return packing if mask is None or packing_from_mask(mask) is None else None


def _query_length(call: dict[str, Any]) -> int:
    return call["q_length"] if "q_length" in call else call["cache_position"].shape[0]


def _device(call: dict[str, Any]) -> torch.device:
    if call.get("attention_mask") is not None:
        return call["attention_mask"].device
    return torch.device(call["device"]) if "device" in call else call["cache_position"].device
