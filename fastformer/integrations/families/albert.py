"""Hugging Face ALBERT (transformers 4.57 and 5.x): layers share parameters, the residual norms sit inside them."""

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
    why_not_absolute,
)
from fastformer.integrations.families.encoder_layer import EncoderLayer, LayerTable
from fastformer.integrations.families.rule import Rule
from fastformer.integrations.plan import Plan
from fastformer.nn.counters import count_fallback, count_fused


class AlbertPacked(PackedEncoder):
    _table = EncoderTable("AlbertModel", output="BaseModelOutputWithPooling")

    def _run_layers(self, hidden: Tensor, plan: Plan, pads: bool) -> Iterator[Tensor]:
        hidden = self.encoder.embedding_hidden_mapping_in(hidden)  # type: ignore[attr-defined]
        return super()._run_layers(hidden, plan, pads)

    def _layers(self) -> Iterator[torch.nn.Module]:
        config, groups = self.config, self.encoder.albert_layer_groups  # type: ignore[attr-defined]
        for i in range(config.num_hidden_layers):
            yield from groups[int(i / (config.num_hidden_layers / config.num_hidden_groups))].albert_layers

    def _pool(self, hidden: Tensor) -> Tensor | None:
        me: Any = self
        return None if me.pooler is None else me.pooler_activation(me.pooler(hidden[:, 0]))


class AlbertAttention(SelfAttention):
    _table = AttentionTable("AlbertAttention", dropout="attention_dropout")

    def _finish(self, attended: Tensor, hidden_states: Tensor) -> Tensor:
        me: Any = self
        branch = me.dense(attended)
        if fusable(me.LayerNorm, me.output_dropout):
            return add_norm(branch, hidden_states, me.LayerNorm, me.output_dropout)
        count_fallback("AlbertAttention", "LayerNorm or dropout is hooked or replaced")
        return me.LayerNorm(hidden_states + me.output_dropout(branch))


class AlbertBlock:
    """Forward of AlbertLayer: the second residual addition runs with its LayerNorm."""

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
        me: Any = self
        if not isinstance(attention_mask, Plan) or not fusable(me.full_layer_layer_norm) or me.chunk_size_feed_forward:
            count_fallback("AlbertLayer", "called by stock code, chunked, or its LayerNorm is hooked or replaced")
            return super().forward(hidden_states, attention_mask, *args, **kwargs)  # type: ignore[misc]
        count_fused("AlbertLayer")
        attended = me.attention(hidden_states, attention_mask)[0]
        out = add_norm(me.ff_chunk(attended), attended, me.full_layer_layer_norm)
        return (out,) if batch.returns_tuples() else out


class AlbertLayer(EncoderLayer, AlbertBlock):
    _table = LayerTable(
        attention="attention",
        out="attention.dense",
        norm="attention.LayerNorm",
        dropout="attention.output_dropout",
        up="ffn",
        activation="activation",
        down="ffn_output",
        last_norm="full_layer_layer_norm",
        last_dropout=None,
        inside=("attention",),
        counted=("AlbertLayer", "AlbertAttention"),
    )


_PATH = "transformers.models.albert.modeling_albert"
_ATTENTION = (f"{_PATH}.AlbertAttention", f"{_PATH}.AlbertSdpaAttention")

RULES = {
    f"{_PATH}.AlbertModel": Rule(
        AlbertPacked,
        "encoder without padding",
        why_not_absolute,
        removes_padding=True,
        owns_norms=True,
        needs=_ATTENTION,
    ),
    **dict.fromkeys(_ATTENTION, Rule(AlbertAttention, "fused attention and LayerNorm", why_not_absolute)),
    f"{_PATH}.AlbertLayer": Rule(
        AlbertLayer, "layer as one operation where its parts are plain, else its norms fused", needs=_ATTENTION
    ),
}
