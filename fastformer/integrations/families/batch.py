"""Reading a call of a base model: its arguments by name, which tokens are real, and what is asked for."""

from __future__ import annotations

import functools
import inspect
import sys
from typing import Any

import torch
from torch import Tensor

from fastformer.integrations.plan import (
    Plan,
    packing_from_lengths,
    packing_from_mask,
    packing_from_positions,
    remember,
)
from fastformer.integrations.scoped import Scoped
from fastformer.integrations.swap import original_class
from fastformer.nn.norm import has_hooks
from fastformer.ops.packing import Packing

PER_TOKEN = ("input_ids", "token_type_ids", "position_ids", "inputs_embeds")
# Set around a head that reads the first place of every row only.
FIRST_PLACE: Scoped[bool] = Scoped("fastformer_first_place", False)
LENGTHS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
_UNDERSTOOD = (
    *PER_TOKEN,
    *LENGTHS,
    "attention_mask",
    "return_dict",
    "output_attentions",
    "output_hidden_states",
    "use_cache",
    "num_items_in_batch",  # of the loss
)


def named_arguments(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, as the stock forward of this version of transformers names them."""
    return {**dict(zip(parameter_names(module), args, strict=False)), **kwargs}


def parameter_names(module: Any) -> tuple[str, ...]:
    """Names of the stock forward's parameters, in order."""
    return _parameter_names(original_class(module))


@functools.cache
def _parameter_names(cls: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(cls.forward).parameters)[1:]


def takes_lengths(module: Any) -> bool:
    """Whether the stock forward hands cu_seq_lens_q on; before transformers 5 many heads do not."""
    return _takes_any(original_class(module))


@functools.cache
def _takes_any(cls: Any) -> bool:
    kinds = [parameter.kind for parameter in inspect.signature(cls.forward).parameters.values()]
    return inspect.Parameter.VAR_KEYWORD in kinds


def wants(module: Any, call: dict[str, Any], what: str) -> bool:
    """Whether the call or the configuration asks for "attentions" or "hidden_states"."""
    asked = call.get(f"output_{what}")
    return bool(getattr(module.config, f"output_{what}", False) if asked is None else asked)


def why_stock(module: Any, call: dict[str, Any], gives_weights: bool = False) -> str:
    """Reason why a call takes the stock forward, or ""; `gives_weights`: attention weights are none."""
    if (call.get("input_ids") is None) == (call.get("inputs_embeds") is None):
        return "needs exactly one of input_ids and inputs_embeds"
    mask = call.get("attention_mask")
    if mask is not None and not isinstance(mask, Tensor):
        return f"attention_mask of type {type(mask).__name__}"
    if mask is not None and mask.ndim != 2:
        return f"attention_mask with {mask.ndim} dimensions"
    if wants(module, call, "attentions") and not gives_weights:
        return "output_attentions"
    if not isinstance(call.get("output_hidden_states"), bool | None):
        return "output_hidden_states by index"
    for name, value in call.items():
        if value is not None and value is not False and name not in _UNDERSTOOD:
            return f"argument {name}"
    return ""


def refuse_packed(call: dict[str, Any], reason: str) -> None:
    """A batch that came packed cannot take the stock forward.

    Raises:
        ValueError: cu_seq_lens_q is among the arguments.
    """
    if call.get("cu_seq_lens_q") is not None:
        raise ValueError(
            f"a packed batch (cu_seq_lens_q) needs the fused path, which this call cannot take ({reason}); "
            "stock attention would look across sequences"
        )


def plan_of(
    call: dict[str, Any],
    inputs: dict[str, Tensor | None],
    unpad: str | bool,
    windowed: bool = False,
    pools_first: bool = False,
) -> tuple[Plan, bool]:
    """What to hand down to the layers, and whether the result is to be padded back.

    Args:
        inputs: the per-token inputs among the arguments.
        unpad: whether padding may be removed; "auto": if nobody can notice.
        windowed: whether some layer measures distances, so that a mask with holes must keep its padding.
        pools_first: whether heads may read the first place of a row, even if it is padding.

    Raises:
        ValueError: packed and padded at once, or lengths without max_length_q.
    """
    mask, cu_seqlens = call.get("attention_mask"), call.get("cu_seq_lens_q")
    ids = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
    assert ids is not None
    if cu_seqlens is not None:
        if mask is not None:
            raise ValueError("got both cu_seq_lens_q and attention_mask; pass only cu_seq_lens_q for a packed batch")
        if ids.shape[0] != 1 or call.get("max_length_q") is None:
            raise ValueError(
                f"cu_seq_lens_q needs one packed row and max_length_q, got {ids.shape[0]} rows and "
                f"max_length_q={call.get('max_length_q')}"
            )
        return Plan(packing_from_lengths(cu_seqlens, int(call["max_length_q"]), ids.shape[1])), True
    if mask is None:
        return Plan(packing_from_positions(call.get("position_ids"))), False
    if mask.shape != ids.shape[:2]:
        raise ValueError(f"attention_mask must have shape {tuple(ids.shape[:2])}, got {tuple(mask.shape)}")
    if torch.compiler.is_exporting() or (unpad is False and torch.compiler.is_compiling()):
        return Plan(mask=mask != 0), False  # one graph for any mask
    packing = packing_from_mask(mask)
    if packing is None:
        return Plan(packing_from_positions(call.get("position_ids"))), False
    # A head that pools the first place reads what stock computes there, padding or not.
    keeps = unpad is False or (windowed and not packing.contiguous)
    if keeps or (unpad == "auto" and pools_first and not packing.starts_real):
        return Plan(mask=mask != 0), False
    return Plan(packing), True


def pack_inputs(
    inputs: dict[str, Tensor | None], packing: Packing, first_position: int = 0
) -> dict[str, Tensor | None]:
    """Per-token inputs [batch, seqlen, ...] (or None, or packed already) as [1, rows, ...]; positions always given."""
    packed = {}
    for name, value in inputs.items():
        if value is not None and value.shape[:2] != (1, packing.rows):
            shape = (packing.batch, packing.seqlen)
            value = packing.pack(value.expand(shape + value.shape[2:]))[None]
        packed[name] = value
    # Stock counts places in the padded batch, which is gone.
    if packed.get("position_ids") is None:
        places = packing.positions()
        packed["position_ids"] = places + first_position if first_position else places
    return packed


def unpack_call(module: Any, call: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a packed call as those of a padded one: [batch, seqlen] ids and mask. Waits for nothing.

    The mask remembers the packing, so the base model need not compute it.

    Raises:
        ValueError: as `plan_of`.
    """
    inputs = {name: call[name] for name in PER_TOKEN if call.get(name) is not None}
    plan, _ = plan_of(call, {"input_ids": None, "inputs_embeds": None, **inputs}, True)
    packing = plan.packing
    assert packing is not None
    out = {name: value for name, value in call.items() if name not in LENGTHS}
    for name, value in inputs.items():
        out[name] = packing.pad(value.squeeze(0))
    mask = packing.pad(torch.ones(packing.rows, dtype=torch.long, device=packing.indices.device))
    pad_token_id = getattr(module.config, "pad_token_id", None)
    if "input_ids" in inputs and pad_token_id is not None:
        out["input_ids"] = torch.where(mask != 0, out["input_ids"], pad_token_id)
    out["attention_mask"] = remember(mask, packing)
    return out


def answer(module: Any, out: Any, return_dict: bool | None) -> Any:
    """A model's output as the caller wants it: as it is, or a tuple."""
    if return_dict is None:
        return_dict = getattr(module.config, "return_dict", True)
    return out if return_dict else out.to_tuple()


def is_changed(module: torch.nn.Module) -> bool:
    """Whether a child must be called rather than read: hooked, or no longer of a class of transformers."""
    return has_hooks(module) or not type(module).__module__.startswith("transformers.")


def needs_5(module: torch.nn.Module) -> str:
    """Reason against a class whose forward is another one before transformers 5, or ""."""
    return "needs transformers 5" if returns_tuples() else ""


def returns_tuples() -> bool:
    """Whether layers of the installed transformers return tuples (before version 5) or their hidden states."""
    return int(sys.modules["transformers"].__version__.split(".")[0]) < 5
