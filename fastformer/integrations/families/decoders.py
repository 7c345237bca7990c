"""Hugging Face decoders, ModernBERT, and whatever else transformers routes through its attention interface."""

from __future__ import annotations

from typing import Any

import torch

from fastformer.integrations.families import batch
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


def _why_not_5(module: torch.nn.Module) -> str:
    return batch.needs_5(module) or _why_not(module)


def _rules(
    family: str, prefix: str, layer: type, model: str = "Model", block: str = "DecoderLayer", since_5: bool = False
) -> dict[str, Rule]:
    path = f"transformers.models.{family}.modeling_{family}.{prefix}"
    why_not = _why_not_5 if since_5 else _why_not
    return {
        f"{path}{model}": Rule(PackedDecoder, _PACKED, why_not, removes_padding=True, routed=True),
        f"{path}{block}": Rule(layer, _ADDED, batch.needs_5) if since_5 else Rule(layer, _ADDED),
    }


RULES: dict[str, Rule] = {
    "transformers.models.modernbert.modeling_modernbert.ModernBertModel": Rule(
        PackedModernBert, "encoder without padding", removes_padding=True, routed=True
    ),
    **_rules("gpt2", "GPT2", Gpt2Layer, block="Block", since_5=True),
    **_rules("llama", "Llama", PreNormLayer),
    **_rules("mistral", "Mistral", PreNormLayer),
    **_rules("qwen2", "Qwen2", PreNormLayer),
    **_rules("qwen3", "Qwen3", PreNormLayer),
    **_rules("gemma2", "Gemma2", GemmaLayer, since_5=True),
    **_rules("gemma3", "Gemma3", GemmaLayer, model="TextModel", since_5=True),
    **_rules("gpt_oss", "GptOss", PreNormLayer),
}

ATTENTION = Rule(RoutedAttention, "fused attention")
