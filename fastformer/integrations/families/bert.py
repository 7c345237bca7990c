"""Hugging Face BERT (transformers 4.57 and 5.x).

- `BertModel`: packs ids before the embeddings, runs embeddings and encoder on real tokens only, pads back once at the
  end. Layers receive the `Packing` in place of the attention mask, which every version hands through untouched, so
  activation checkpointing and its recomputation see it too.
- `BertSelfAttention`: attention over the packed (or dense) batch.
- `BertSelfOutput`, `BertOutput`: dropout + residual + LayerNorm in one pass.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastformer import ops
from fastformer.integrations.families.rule import Rule
from fastformer.integrations.swap import original_class
from fastformer.nn.counters import count_fallback, count_fused, count_host_read
from fastformer.nn.norm import is_plain_dropout, is_plain_norm
from fastformer.ops.packing import Packing

_PER_TOKEN = ("input_ids", "token_type_ids", "position_ids", "inputs_embeds")
_UNDERSTOOD = (
    *_PER_TOKEN,
    "attention_mask",
    "return_dict",
    "output_attentions",
    "output_hidden_states",
    "use_cache",  # an encoder has none
    "num_items_in_batch",  # of the loss
)


@dataclass(frozen=True, eq=False)
class Dense:
    """What layers receive in place of the attention mask when padding stays: bool [batch, 1, 1, seqlen], or None."""

    mask: Tensor | None


class PackedModel:
    """Forward of BertModel without its padding."""

    fastformer_unpad: bool

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        reason = self._why_stock(call := named_arguments(self, args, kwargs))
        if reason:
            count_fallback("BertModel", reason)
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        count_fused("BertModel")
        inputs = {name: call.get(name) for name in _PER_TOKEN}
        plan = self._plan(call.get("attention_mask"))
        if isinstance(plan, Packing):
            inputs = _pack_inputs(inputs, plan)
        hidden = self.embeddings(**inputs)  # type: ignore[attr-defined]
        hidden = self.encoder(hidden, attention_mask=plan)[0]  # type: ignore[attr-defined]
        if isinstance(plan, Packing):
            hidden = plan.pad(hidden.squeeze(0))
        pooler = self.pooler  # type: ignore[attr-defined]
        return self._output(hidden, None if pooler is None else pooler(hidden), call.get("return_dict"))

    def _plan(self, attention_mask: Tensor | None) -> Packing | Dense:
        if attention_mask is None:
            return Dense(None)
        if not self.fastformer_unpad:
            return Dense((attention_mask != 0)[:, None, None, :])
        if attention_mask.device.type != "cpu":
            count_host_read()
        packing = Packing.from_mask(attention_mask)
        return packing if packing.tokens < attention_mask.numel() else Dense(None)

    def _why_stock(self, call: dict[str, Any]) -> str:
        config = self.config  # type: ignore[attr-defined]
        if config.is_decoder:
            return "is_decoder=True"
        if config.chunk_size_feed_forward:
            return "chunk_size_feed_forward"
        if (call.get("input_ids") is None) == (call.get("inputs_embeds") is None):
            return "needs exactly one of input_ids and inputs_embeds"
        mask = call.get("attention_mask")
        if mask is not None and mask.ndim != 2:
            return f"attention_mask with {mask.ndim} dimensions"
        for name in ("output_attentions", "output_hidden_states"):
            asked = call.get(name)
            if asked or (asked is None and getattr(config, name, False)):
                return name
        for name, value in call.items():
            if value is not None and name not in _UNDERSTOOD:
                return f"argument {name}"
        return ""

    def _output(self, hidden: Tensor, pooled: Tensor | None, return_dict: bool | None) -> Any:
        from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions

        if return_dict is None:
            return_dict = getattr(self.config, "return_dict", True)  # type: ignore[attr-defined]
        if not return_dict:
            return hidden, pooled
        return BaseModelOutputWithPoolingAndCrossAttentions(last_hidden_state=hidden, pooler_output=pooled)


class SelfAttention:
    """Forward of BertSelfAttention over the batch that a patched BertModel hands down; stock for any other caller."""

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(attention_mask, Packing | Dense):
            count_fallback("BertSelfAttention", "called by stock code")
            return super().forward(hidden_states, attention_mask, *args, **kwargs)  # type: ignore[misc]
        count_fused("BertSelfAttention")
        heads, size = self.num_attention_heads, self.attention_head_size  # type: ignore[attr-defined]
        # [batch, seqlen, heads, head_dim] each; batch is 1 when packed
        q, k, v = (
            projection(hidden_states).unflatten(-1, (heads, size))
            for projection in (self.query, self.key, self.value)  # type: ignore[attr-defined]
        )
        dropout_p = self.dropout.p if self.training else 0.0  # type: ignore[attr-defined]
        if isinstance(attention_mask, Packing):
            lengths, longest = attention_mask.cu_seqlens, attention_mask.max_seqlen
            out = ops.attention_varlen(
                q.squeeze(0), k.squeeze(0), v.squeeze(0), lengths, lengths, longest, longest, dropout_p=dropout_p
            )[None]
        else:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            out = ops.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask.mask, dropout_p=dropout_p)
            out = out.transpose(1, 2)
        return out.flatten(2), None


class AddNorm:
    """Forward of BertSelfOutput and BertOutput: LayerNorm(residual + dropout(dense(x)))."""

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        norm, dropout = self.LayerNorm, self.dropout  # type: ignore[attr-defined]
        if not (is_plain_norm(norm) and is_plain_dropout(dropout)):
            count_fallback("BertOutput", "LayerNorm or dropout is hooked or replaced")
            return super().forward(hidden_states, input_tensor)  # type: ignore[misc]
        count_fused("BertOutput")
        return ops.add_layer_norm(
            self.dense(hidden_states),  # type: ignore[attr-defined]
            input_tensor,
            norm.weight,
            norm.bias,
            norm.eps,
            dropout_p=dropout.p,
            training=dropout.training,
        )


def named_arguments(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, as the stock forward of this version of transformers names them."""
    return {**dict(zip(_parameter_names(original_class(module)), args, strict=False)), **kwargs}


@functools.cache
def _parameter_names(cls: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(cls.forward).parameters)[1:]


def _pack_inputs(inputs: dict[str, Tensor | None], packing: Packing) -> dict[str, Tensor | None]:
    """Embedding inputs of shape [batch, seqlen, ...] (or None) as [1, rows, ...]."""
    shape = (packing.batch, packing.seqlen)
    packed = {
        name: None if value is None else packing.pack(value.expand(shape + value.shape[2:]))[None]
        for name, value in inputs.items()
    }
    # Stock derives both from the shape of the padded batch, which is gone.
    if packed["position_ids"] is None:
        packed["position_ids"] = packing.positions()
    if packed["token_type_ids"] is None:
        packed["token_type_ids"] = torch.zeros_like(packed["position_ids"])
    return packed


def _why_not_model(module: torch.nn.Module) -> str:
    config: Any = module.config
    if config.is_decoder:
        return "is_decoder=True: padding is removed for encoders only"
    if getattr(config, "position_embedding_type", "absolute") != "absolute":
        return f"position_embedding_type={config.position_embedding_type!r}"
    return ""


def _why_not_attention(module: torch.nn.Module) -> str:
    if getattr(module, "position_embedding_type", "absolute") != "absolute":
        return "relative position embeddings"
    return "is_decoder=True" if getattr(module, "is_decoder", False) else ""


_MODULE = "transformers.models.bert.modeling_bert"
_ATTENTION = Rule(SelfAttention, "fused attention", _why_not_attention)
_OUTPUT = Rule(AddNorm, "fused dropout + residual + LayerNorm")

RULES = {
    f"{_MODULE}.BertModel": Rule(PackedModel, "encoder without padding", _why_not_model, removes_padding=True),
    f"{_MODULE}.BertSelfAttention": _ATTENTION,
    f"{_MODULE}.BertSdpaSelfAttention": _ATTENTION,  # transformers 4.57
    f"{_MODULE}.BertSelfOutput": _OUTPUT,
    f"{_MODULE}.BertOutput": _OUTPUT,
}
