"""Models whose attention goes through transformers' AttentionInterface, whatever else they are made of.

- `RoutedAttention`: an attention module that finds "fastformer" where its configuration names an implementation. The
  configuration itself, which other models may share, stays untouched.
- `PackedModel`: the stock forward of a base model, run on packed tokens. Its masks, rotary embeddings and captured
  outputs are stock's; only what goes in is packed and what comes out padded.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastformer.integrations import attention
from fastformer.integrations.families import batch
from fastformer.integrations.plan import Plan, PlanMask, packing_from_positions
from fastformer.nn.counters import count_fallback, count_fused

_STATES = ("last_hidden_state", "hidden_states")


class RoutedAttention:
    """An attention module whose `config` says attn_implementation="fastformer"."""

    _prepare = staticmethod(attention.register)

    @property
    def config(self) -> Any:
        return _view(self.__dict__["config"])

    @config.setter
    def config(self, value: Any) -> None:
        self.__dict__["config"] = value

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)  # type: ignore[misc]


def _view(config: Any) -> Any:
    """The same configuration, attributes shared both ways, but for the attention implementation."""
    cls: Any = type(config)
    view: Any = object.__new__(_view_class(cls))
    object.__setattr__(view, "__dict__", config.__dict__)
    return view


@functools.cache
def _view_class(cls: Any) -> Any:
    return type(cls.__name__, (cls,), {"_attn_implementation": attention.NAME, "__module__": cls.__module__})


def uses_interface(module: torch.nn.Module) -> bool:
    """Whether a module's forward looks its attention function up in transformers' interface."""
    forward = inspect.unwrap(type(module).forward)
    names = getattr(getattr(forward, "__code__", None), "co_names", ())
    return "ALL_ATTENTION_FUNCTIONS" in names and hasattr(
        module.__dict__.get("config"), "_attn_implementation_internal"
    )


class PackedModel:
    """Forward of an encoder's base model on packed tokens."""

    fastformer_unpad: str | bool
    _pools_first: ClassVar[bool] = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        label = type(self).__name__
        call = self._own_call(batch.named_arguments(self, args, kwargs))
        # The masks that carry a plan are no tensors that a graph could hold.
        reason = "export" if torch.compiler.is_exporting() else self._why_stock(call)
        if reason:
            batch.refuse_packed(call, reason)
            count_fallback(label, reason)
            asked = batch.wants(self, call, "attentions")
            return attention.WANTS_WEIGHTS.during(asked, super().forward, *args, **kwargs)  # type: ignore[misc]
        count_fused(label)
        accepted = batch.parameter_names(self)
        inputs = {name: call.get(name) for name in batch.PER_TOKEN if name in accepted}
        plan, pads = batch.plan_of(call, inputs, self.fastformer_unpad, self._has_windows(), self._pools_first)
        if plan.packing is not None:
            packed = batch.pack_inputs(inputs, plan.packing)
            inputs = {name: value for name, value in packed.items() if name in accepted}
        call = {name: value for name, value in call.items() if name not in batch.LENGTHS}
        source = inputs["input_ids"] if inputs["input_ids"] is not None else inputs["inputs_embeds"]
        assert source is not None
        call.update(inputs)
        call.update(self._call_with(PlanMask.carrying(plan, source.device)))
        return_dict = call.pop("return_dict", None)
        out = self._run(call, plan)
        if pads:
            self._pad_back(out, plan)
        return batch.answer(self, out, return_dict)

    def _own_call(self, call: dict[str, Any]) -> dict[str, Any]:
        """The call, in which lengths are this model's."""
        return call

    def _pad_back(self, out: Any, plan: Plan) -> None:
        _pad_back(out, plan)

    def _run(self, call: dict[str, Any], plan: Plan) -> Any:
        return super().forward(**call, return_dict=True)  # type: ignore[misc]

    def _call_with(self, mask: PlanMask) -> dict[str, Any]:
        """Arguments that bring the plan to the attention modules."""
        return {"attention_mask": mask}

    def _why_stock(self, call: dict[str, Any]) -> str:
        return batch.why_stock(self, call)

    def _has_windows(self) -> bool:
        config: Any = self.config  # type: ignore[attr-defined]
        return getattr(config, "sliding_window", None) is not None


class UnpackingHead:
    """Forward of a head that reads ids or mask itself: a batch that came packed reaches it padded."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = batch.named_arguments(self, args, kwargs)
        if call.get("cu_seq_lens_q") is not None:
            count_fused(type(self).__name__)
            call = batch.unpack_call(self, call)
        return super().forward(**call)  # type: ignore[misc]


def _pad_back(out: Any, plan: Plan) -> None:
    padded: dict[int, Tensor] = {}  # the last of hidden_states is last_hidden_state itself

    def pad(packed: Tensor) -> Tensor:
        if id(packed) not in padded:
            padded[id(packed)] = plan.pad(packed)
        return padded[id(packed)]

    for name in _STATES:
        value = out.get(name)
        if isinstance(value, Tensor):
            out[name] = pad(value)
        elif value is not None:
            out[name] = tuple(pad(v) for v in value)


class PackedModernBert(PackedModel):
    def _call_with(self, mask: PlanMask) -> dict[str, Any]:
        return {"attention_mask": {"full_attention": mask, "sliding_attention": mask}}


class PackedDecoder(PackedModel):
    """A decoder's base model: packed wherever no cache is to be filled, which is to say in training."""

    _pools_first = False

    def _why_stock(self, call: dict[str, Any]) -> str:
        if call.get("past_key_values") is not None:
            return "past_key_values"
        use_cache = call.get("use_cache")
        if use_cache is None:
            use_cache = getattr(self.config, "use_cache", False) and not self.training  # type: ignore[attr-defined]
        # Packed sequences share no cache; without the packed path, stock would look across them.
        if use_cache and call.get("cu_seq_lens_q") is None and packing_from_positions(call.get("position_ids")) is None:
            return "use_cache"
        return batch.why_stock(self, call)

    def _call_with(self, mask: PlanMask) -> dict[str, Any]:
        return {"attention_mask": mask, "use_cache": False}
