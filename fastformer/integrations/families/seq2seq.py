"""Hugging Face encoder-decoders: T5, BART, mBART (transformers 5.x).

Both sides run without padding: the encoder always, the decoder in training and where it is given a mask.
Cross-attention sees the encoder's real tokens only, whether the decoder is packed or not.

A batch that comes packed (`PackedSeq2SeqCollator`) gives the decoder's lengths as those of queries and the encoder's as
those of keys, which is what they are in cross-attention. Both sides get all of them, and each takes its own.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from fastformer import ops
from fastformer.integrations.families import batch
from fastformer.integrations.families.interface import PackedDecoder, PackedModel, RoutedAttention
from fastformer.integrations.families.norms import is_readable
from fastformer.integrations.families.rule import Rule
from fastformer.integrations.plan import Plan, PlanMask, packing_of, plan_in
from fastformer.integrations.scoped import Scoped
from fastformer.nn.counters import count_fallback, count_fused
from fastformer.ops.packing import Packing

# Positions of the packed tokens, [rows], while a base model runs: BART's layers of them are told none.
_PLACES: Scoped[Tensor | None] = Scoped("fastformer_places", None)


def _encoders_call(call: dict[str, Any]) -> dict[str, Any]:
    if call.get("cu_seq_lens_q") is None:
        return call
    if call.get("cu_seq_lens_k") is None:
        raise ValueError("a packed batch of an encoder-decoder needs cu_seq_lens_k, the encoder's lengths; got none")
    own = {"cu_seq_lens_q": call["cu_seq_lens_k"], "max_length_q": call.get("max_length_k")}
    return {**{name: value for name, value in call.items() if name not in batch.LENGTHS}, **own}


def _note_rows(out: Any, plan: Plan) -> None:
    """For the decoder, which is told lengths but not, on the host, how many tokens there are."""
    out["last_hidden_state"].fastformer_rows = plan.packing


class PackedEncoderSide(PackedModel):
    def _own_call(self, call: dict[str, Any]) -> dict[str, Any]:
        return _encoders_call(call)

    def _pad_back(self, out: Any, plan: Plan) -> None:
        super()._pad_back(out, plan)
        _note_rows(out, plan)

    def _run(self, call: dict[str, Any], plan: Plan) -> Any:
        return _placed(super()._run, call, plan)


class PackedDecoderSide(PackedDecoder):
    def _own_call(self, call: dict[str, Any]) -> dict[str, Any]:
        if call.get("cu_seq_lens_k") is None or call.get("encoder_hidden_states") is None:
            return call
        if call.get("encoder_attention_mask") is not None:
            raise ValueError("got both cu_seq_lens_k and attention_mask; pass only cu_seq_lens_k for a packed batch")
        rows = getattr(call["encoder_hidden_states"], "fastformer_rows", None)
        if rows is None:
            raise ValueError("a packed batch needs encoder_hidden_states as the patched encoder gave them for it")
        return {**call, "encoder_attention_mask": rows}

    def _why_stock(self, call: dict[str, Any]) -> str:
        mask = call.get("encoder_attention_mask")
        if isinstance(mask, Tensor) and mask.ndim != 2:
            return f"encoder_attention_mask with {mask.ndim} dimensions"
        own = {k: v for k, v in call.items() if k not in ("encoder_hidden_states", "encoder_attention_mask")}
        return super()._why_stock(own)

    def _run(self, call: dict[str, Any], plan: Plan) -> Any:
        mask, states = call.get("encoder_attention_mask"), call.get("encoder_hidden_states")
        keys: Packing | None = None
        if states is not None:
            if isinstance(mask, Packing):
                keys = mask
            elif self.fastformer_unpad is not False:
                keys = (
                    Packing.whole(states.shape[0], states.shape[1], states.device) if mask is None else packing_of(mask)
                )
            if keys is not None:
                call["encoder_hidden_states"] = keys.pack(states)[None]
            key_mask = None if mask is None or keys is not None else mask != 0
            cross = Plan(plan.packing, key_mask, causal=False, keys=keys)
            call["encoder_attention_mask"] = PlanMask.carrying(cross, states.device)
        return _placed(super()._run, call, plan)


class PackedT5(PackedDecoderSide):
    """T5Stack, which is both sides."""

    def _own_call(self, call: dict[str, Any]) -> dict[str, Any]:
        return super()._own_call(call) if self.is_decoder else _encoders_call(call)  # type: ignore[attr-defined]

    def _pad_back(self, out: Any, plan: Plan) -> None:
        super()._pad_back(out, plan)
        if not self.is_decoder:  # type: ignore[attr-defined]
            _note_rows(out, plan)

    def _why_stock(self, call: dict[str, Any]) -> str:
        if self.is_decoder:  # type: ignore[attr-defined]
            return super()._why_stock(call)
        return PackedModel._why_stock(self, call)

    def _call_with(self, mask: PlanMask) -> dict[str, Any]:
        if mask.plan.packing is not None:
            narrow = dataclasses.replace(mask.plan, packing=_narrowed(mask.plan.packing))
            mask = PlanMask.carrying(narrow, mask.device)
        return {"attention_mask": mask, "use_cache": False}


def _narrowed(packing: Packing) -> Packing:
    """The same tokens in a padded batch no wider than its longest sequence; T5's bias knows distances only."""
    if not packing.contiguous or packing.max_seqlen == packing.seqlen:
        return packing
    device = packing.indices.device
    lengths = packing.cu_seqlens.diff().long()
    rows = torch.repeat_interleave(torch.arange(packing.batch, device=device), lengths, output_size=packing.tokens)
    places = torch.arange(packing.tokens, device=device) - packing.cu_seqlens[rows]
    return dataclasses.replace(
        packing,
        indices=rows * packing.max_seqlen + places,
        seqlen=packing.max_seqlen,
        inverse=None,
        place=None,
    )


class T5Attention(RoutedAttention):
    """T5's attention; its bias between two places is computed for the padded batch, whose rows all share it."""

    def forward(self, hidden_states: Tensor, mask: Any = None, *args: Any, **kwargs: Any) -> Any:
        call = batch.named_arguments(self, (hidden_states, mask, *args), kwargs)
        plan = plan_in(mask)
        if (
            call.get("position_bias") is None
            and plan is not None
            and (plan.packing is not None or plan.keys is not None)
        ):
            call["position_bias"] = self._bias(plan)
        return super().forward(**call)

    def _bias(self, plan: Plan) -> Tensor:
        me: Any = self
        if plan.keys is None and plan.packing is not None and me.has_relative_attention_bias:
            length = plan.packing.seqlen
            return me.compute_bias(length, length, device=me.q.weight.device)
        return me.q.weight.new_zeros(1, 1, 1, 1)


class PlacedEmbedding:
    """Learned positions, at the places of the packed tokens."""

    def forward(self, input_ids: Tensor, past_key_values_length: int = 0, position_ids: Tensor | None = None) -> Tensor:
        places = _PLACES.get()
        return super().forward(  # type: ignore[misc]
            input_ids, past_key_values_length, position_ids=position_ids if places is None else places
        )


def _placed(run: Any, call: dict[str, Any], plan: Plan) -> Any:
    places = None if plan.packing is None else plan.packing.positions().squeeze(0)
    return _PLACES.during(places, run, call, plan)


class BartEncoderLayer:
    """BART's post-norm layer: dropout, residual and LayerNorm in one pass each."""

    def forward(self, hidden_states: Tensor, attention_mask: Any, *args: Any, **kwargs: Any) -> Any:
        me: Any = self
        if args or not (is_readable(me.self_attn_layer_norm) and is_readable(me.final_layer_norm)):
            count_fallback("BartEncoderLayer", "a LayerNorm is hooked or replaced")
            return super().forward(hidden_states, attention_mask, *args, **kwargs)  # type: ignore[misc]
        count_fused("BartEncoderLayer")
        attended = me.self_attn(hidden_states, attention_mask=attention_mask, **kwargs)[0]
        hidden = _post_norm(me, attended, hidden_states, me.self_attn_layer_norm)
        hidden = _feed_forward(me, hidden)
        return _finite(hidden)


class BartDecoderLayer:
    """The same with cross-attention."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        me: Any = self
        norms = (me.self_attn_layer_norm, me.encoder_attn_layer_norm, me.final_layer_norm)
        if not all(is_readable(norm) for norm in norms):
            count_fallback("BartDecoderLayer", "a LayerNorm is hooked or replaced")
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        count_fused("BartDecoderLayer")
        call = batch.named_arguments(self, args, kwargs)
        hidden, states = call.pop("hidden_states"), call.pop("encoder_hidden_states", None)
        mask, cross = call.pop("attention_mask", None), call.pop("encoder_attention_mask", None)
        call.pop("use_cache", None)
        hidden = _post_norm(me, me.self_attn(hidden, attention_mask=mask, **call)[0], hidden, norms[0])
        if states is not None:
            attended = me.encoder_attn(hidden, key_value_states=states, attention_mask=cross, **call)[0]
            hidden = _post_norm(me, attended, hidden, norms[1])
        return _feed_forward(me, hidden)


def _feed_forward(layer: Any, hidden: Tensor) -> Tensor:
    inner = layer.activation_fn(layer.fc1(hidden))
    inner = torch.nn.functional.dropout(inner, p=layer.activation_dropout, training=layer.training)
    return _post_norm(layer, layer.fc2(inner), hidden, layer.final_layer_norm)


def _finite(hidden: Tensor) -> Tensor:
    """Stock's guard of fp16: once anything is not finite, all is clamped. Decided on the device: nothing waits."""
    if hidden.dtype != torch.float16:
        return hidden
    largest = torch.finfo(hidden.dtype).max
    limit = torch.where(torch.isfinite(hidden).all(), largest, largest - 1000).to(hidden.dtype)
    return torch.clamp(hidden, min=-limit, max=limit)


def _post_norm(layer: Any, branch: Tensor, residual: Tensor, norm: Any) -> Tensor:
    out = ops.add_layer_norm(
        branch, residual, norm.weight, norm.bias, norm.eps, dropout_p=layer.dropout, training=layer.training
    )
    assert isinstance(out, Tensor)
    return out


def _bart(family: str, prefix: str) -> dict[str, Rule]:
    path = f"transformers.models.{family}.modeling_{family}.{prefix}"
    return {
        f"{path}Encoder": Rule(
            PackedEncoderSide, "encoder without padding", batch.needs_5, removes_padding=True, routed=True
        ),
        f"{path}Decoder": Rule(
            PackedDecoderSide, "decoder without padding in training", batch.needs_5, removes_padding=True, routed=True
        ),
        f"{path}LearnedPositionalEmbedding": Rule(PlacedEmbedding, "positions of packed tokens", batch.needs_5),
    }


_T5 = "transformers.models.t5.modeling_t5"
_BART = "transformers.models.bart.modeling_bart"

RULES = {
    **_bart("bart", "Bart"),
    **_bart("mbart", "MBart"),
    f"{_BART}.BartEncoderLayer": Rule(BartEncoderLayer, "fused dropout + residual + LayerNorm", batch.needs_5),
    f"{_BART}.BartDecoderLayer": Rule(BartDecoderLayer, "fused dropout + residual + LayerNorm", batch.needs_5),
    f"{_T5}.T5Stack": Rule(
        PackedT5, "stack without padding (decoder: in training)", batch.needs_5, removes_padding=True, routed=True
    ),
    f"{_T5}.T5Attention": Rule(T5Attention, "fused attention", batch.needs_5, routed=True),
}
