"""Hugging Face decoders, ModernBERT, and whatever else transformers routes through its attention interface."""

from __future__ import annotations

from typing import Any

import torch

from fastformer.integrations.families.interface import PackedDecoder, PackedModernBert, RoutedAttention
from fastformer.integrations.families.norms import GemmaLayer, Gpt2Layer, PreNormLayer
from fastformer.integrations.families.rule import Rule

_PACKED = "decoder without padding in training"
_ADDED = "fused residual + norm"


def _why_not(module: torch.nn.Module) -> str:
    config: Any = module.config
    if getattr(config, "use_bidirectional_attention", False) or not getattr(config, "is_causal", True):
        return "its attention looks both ways"
    return "it attends to an encoder" if getattr(config, "add_cross_attention", False) else ""


def _rules(
    family: str, prefix: str, layer: type | None, model: str = "Model", block: str = "DecoderLayer"
) -> dict[str, Rule]:
    path = f"transformers.models.{family}.modeling_{family}.{prefix}"
    rules = {f"{path}{model}": Rule(PackedDecoder, _PACKED, _why_not, removes_padding=True, routed=True)}
    if layer is not None:
        rules[f"{path}{block}"] = Rule(layer, _ADDED)
    return rules


RULES: dict[str, Rule] = {
    "transformers.models.modernbert.modeling_modernbert.ModernBertModel": Rule(
        PackedModernBert, "encoder without padding", removes_padding=True, routed=True
    ),
    **_rules("gpt2", "GPT2", Gpt2Layer, block="Block"),
    **_rules("llama", "Llama", PreNormLayer),
    **_rules("mistral", "Mistral", PreNormLayer),
    **_rules("qwen2", "Qwen2", PreNormLayer),
    **_rules("qwen3", "Qwen3", PreNormLayer),
    **_rules("gemma2", "Gemma2", GemmaLayer),
    **_rules("gemma3", "Gemma3", GemmaLayer, model="TextModel"),
    **_rules("gpt_oss", "GptOss", PreNormLayer),
}

ATTENTION = Rule(RoutedAttention, "fused attention")
