"""Hugging Face BERT and the families of its shape: RoBERTa, XLM-RoBERTa, ELECTRA (transformers 4.57 and 5.x)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastformer.integrations.families.encoder import (
    AddNorm,
    AttentionTable,
    EncoderTable,
    PackedEncoder,
    SelfAttention,
    why_not_absolute,
)
from fastformer.integrations.families.encoder_layer import EncoderLayer, LayerTable
from fastformer.integrations.families.rule import Rule
from fastformer.ops.embedding import number_tokens


def _layer(family: str) -> LayerTable:
    return LayerTable(
        attention="attention.self",
        out="attention.output.dense",
        norm="attention.output.LayerNorm",
        dropout="attention.output.dropout",
        up="intermediate.dense",
        activation="intermediate.intermediate_act_fn",
        down="output.dense",
        last_norm="output.LayerNorm",
        last_dropout="output.dropout",
        inside=("attention", "attention.self", "attention.output", "intermediate", "output"),
        counted=(f"{family}Layer", f"{family}SelfAttention", f"{family}Output", f"{family}Output"),
    )


class BertPacked(PackedEncoder):
    _table = EncoderTable("BertModel")


class BertAttention(SelfAttention):
    _table = AttentionTable("BertSelfAttention")


class BertAddNorm(AddNorm):
    _label = "BertOutput"


class BertLayer(EncoderLayer):
    _table = _layer("Bert")


class RobertaPacked(PackedEncoder):
    """Positions count real tokens from padding_idx + 1 and depend on the ids, so they are made before packing."""

    _table = EncoderTable("RobertaModel")

    def _token_inputs(self, call: dict[str, Any]) -> dict[str, Tensor | None]:
        inputs = super()._token_inputs(call)
        if inputs["position_ids"] is None and call.get("cu_seq_lens_q") is None:
            inputs["position_ids"] = self._positions(inputs["input_ids"], inputs["inputs_embeds"])
        return inputs

    def _positions(self, ids: Tensor | None, embeds: Tensor | None) -> Tensor:
        padding = self._first_position() - 1
        if ids is None:
            assert embeds is not None
            places = torch.arange(embeds.shape[1], device=embeds.device) + padding + 1
            return places.expand(embeds.shape[:2])
        return number_tokens(ids, padding)

    def _first_position(self) -> int:
        return self.embeddings.padding_idx + 1  # type: ignore[attr-defined]


class RobertaAttention(SelfAttention):
    _table = AttentionTable("RobertaSelfAttention")


class RobertaAddNorm(AddNorm):
    _label = "RobertaOutput"


class RobertaLayer(EncoderLayer):
    _table = _layer("Roberta")


class ElectraPacked(PackedEncoder):
    _table = EncoderTable("ElectraModel", output="BaseModelOutputWithPastAndCrossAttentions")

    def _embed(self, inputs: dict[str, Tensor | None]) -> Tensor:
        hidden = super()._embed(inputs)
        project = getattr(self, "embeddings_project", None)
        return hidden if project is None else project(hidden)


class ElectraAttention(SelfAttention):
    _table = AttentionTable("ElectraSelfAttention")


class ElectraAddNorm(AddNorm):
    _label = "ElectraOutput"


class ElectraLayer(EncoderLayer):
    _table = _layer("Electra")


def _rules(family: str, prefix: str, model: type, attention: type, output: type, layer: type) -> dict[str, Rule]:
    path = f"transformers.models.{family}.modeling_{family}.{prefix}"
    names = (f"{path}SelfAttention", f"{path}SdpaSelfAttention")  # the latter in transformers 4.57
    attends = Rule(attention, "fused attention", why_not_absolute)
    adds = Rule(output, "fused dropout + residual + LayerNorm")
    return {
        f"{path}Model": Rule(
            model, "encoder without padding", why_not_absolute, removes_padding=True, owns_norms=True, needs=names
        ),
        **dict.fromkeys(names, attends),
        f"{path}Layer": Rule(layer, "layer as one operation where its parts are plain, seeds drawn together"),
        f"{path}SelfOutput": adds,
        f"{path}Output": adds,
    }


RULES = {
    **_rules("bert", "Bert", BertPacked, BertAttention, BertAddNorm, BertLayer),
    **_rules("roberta", "Roberta", RobertaPacked, RobertaAttention, RobertaAddNorm, RobertaLayer),
    **_rules("xlm_roberta", "XLMRoberta", RobertaPacked, RobertaAttention, RobertaAddNorm, RobertaLayer),
    **_rules("electra", "Electra", ElectraPacked, ElectraAttention, ElectraAddNorm, ElectraLayer),
}
