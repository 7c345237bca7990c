"""Hugging Face DistilBERT (transformers 5.x)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastformer.integrations.families import batch
from fastformer.integrations.families.encoder import (
    AttentionTable,
    EncoderTable,
    PackedEncoder,
    SelfAttention,
    add_norm,
    fusable,
)
from fastformer.integrations.families.encoder_layer import EncoderLayer, LayerTable
from fastformer.integrations.families.rule import Rule
from fastformer.nn.counters import count_fallback, count_fused


class DistilBertPacked(PackedEncoder):
    _table = EncoderTable("DistilBertModel", encoder="transformer", output="BaseModelOutput")

    def _token_inputs(self, call: dict[str, Any]) -> dict[str, Tensor | None]:
        return {name: call.get(name) for name in batch.PER_TOKEN if name != "token_type_ids"}

    def _layers(self) -> Iterator[torch.nn.Module]:
        return iter(self.transformer.layer)  # type: ignore[attr-defined]


class DistilBertAttention(SelfAttention):
    _table = AttentionTable("DistilBertSelfAttention", ("q_lin", "k_lin", "v_lin"), heads="n_heads")

    def _finish(self, attended: Tensor, hidden_states: Tensor) -> Tensor:
        return self.out_lin(attended)  # type: ignore[attr-defined]


class DistilBertBlock:
    """Forward of TransformerBlock: both residual additions run with their LayerNorm, the second with its dropout."""

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, **kwargs: Any) -> Tensor:
        me: Any = self
        ffn, norm1, norm2 = me.ffn, me.sa_layer_norm, me.output_layer_norm
        if not (fusable(norm1) and fusable(norm2, ffn.dropout)):
            count_fallback("TransformerBlock", "LayerNorm or dropout is hooked or replaced")
            return super().forward(hidden_states, attention_mask, **kwargs)  # type: ignore[misc]
        count_fused("TransformerBlock")
        attended = me.attention(hidden_states, attention_mask=attention_mask, **kwargs)[0]
        attended = add_norm(attended, hidden_states, norm1)
        if ffn.chunk_size_feed_forward or batch.is_changed(ffn):
            return add_norm(ffn(attended), attended, norm2)
        return add_norm(ffn.lin2(ffn.activation(ffn.lin1(attended))), attended, norm2, ffn.dropout)


class DistilBertLayer(EncoderLayer, DistilBertBlock):
    _table = LayerTable(
        attention="attention",
        out="attention.out_lin",
        norm="sa_layer_norm",
        dropout=None,
        up="ffn.lin1",
        activation="ffn.activation",
        down="ffn.lin2",
        last_norm="output_layer_norm",
        last_dropout="ffn.dropout",
        inside=("attention", "ffn"),
        counted=("TransformerBlock", "DistilBertSelfAttention"),
    )


_PATH = "transformers.models.distilbert.modeling_distilbert"
_ATTENTION = f"{_PATH}.DistilBertSelfAttention"


RULES = {
    f"{_PATH}.DistilBertModel": Rule(
        DistilBertPacked, "encoder without padding", removes_padding=True, owns_norms=True, needs=(_ATTENTION,)
    ),
    _ATTENTION: Rule(DistilBertAttention, "fused attention"),
    f"{_PATH}.TransformerBlock": Rule(
        DistilBertLayer, "layer as one operation where its parts are plain, else its norms fused", needs=(_ATTENTION,)
    ),
}
