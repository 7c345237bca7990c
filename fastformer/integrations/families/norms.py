"""Norm modules and pre-norm layers of Hugging Face models.

- `RmsNorm`: T5's, Llama's and their kin's RMSNorm; `GemmaNorm`: the same with weight + 1.
- `PreNormLayer`: the residual addition in the middle of a layer runs with the norm after it. The one at a layer's end
  has its norm in another module and stays.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

import fastformer.nn as fnn
from fastformer import ops
from fastformer.integrations.families import batch
from fastformer.integrations.families.rule import Rule
from fastformer.integrations.swap import class_path, original_class
from fastformer.nn.counters import count_fallback, count_fused
from fastformer.nn.norm import has_hooks


class RmsNorm:
    _offset: ClassVar[float] = 0.0

    def forward(self, hidden_states: Tensor) -> Tensor:
        count_fused(type(self).__name__)
        return ops.rms_norm(hidden_states, self.weight, _eps(self), offset=self._offset)  # type: ignore[attr-defined]


class GemmaNorm(RmsNorm):
    _offset = 1.0


def _eps(norm: Any) -> float:
    return norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps


@dataclass(frozen=True)
class LayerTable:
    """Names of a pre-norm layer's parts; `after_attention` and `after_mlp` are norms of the branches (Gemma)."""

    attention: str = "self_attn"
    mlp: str = "mlp"
    first: str = "input_layernorm"
    second: str = "post_attention_layernorm"
    after_attention: str | None = None
    after_mlp: str | None = None


class PreNormLayer:
    _table: ClassVar[LayerTable] = LayerTable()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        table = self._table
        norm: Any = getattr(self, table.second)
        call = batch.named_arguments(self, args, kwargs)
        reason = "" if is_readable(norm) else f"{table.second} is hooked or replaced"
        if call.get("encoder_hidden_states") is not None:
            reason = "cross-attention"
        if reason:
            count_fallback(type(self).__name__, reason)
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        count_fused(type(self).__name__)
        residual = call.pop("hidden_states")
        hidden = getattr(self, table.attention)(getattr(self, table.first)(residual), **call)[0]
        if table.after_attention:
            hidden = getattr(self, table.after_attention)(hidden)
        hidden, residual = add_norm(hidden, residual, norm)
        hidden = getattr(self, table.mlp)(hidden)
        if table.after_mlp:
            hidden = getattr(self, table.after_mlp)(hidden)
        return residual + (hidden[0] if isinstance(hidden, tuple) else hidden)


class GemmaLayer(PreNormLayer):
    _table = LayerTable(
        second="pre_feedforward_layernorm",
        after_attention="post_attention_layernorm",
        after_mlp="post_feedforward_layernorm",
    )


class Gpt2Layer(PreNormLayer):
    _table = LayerTable(attention="attn", first="ln_1", second="ln_2")


def is_readable(norm: torch.nn.Module) -> bool:
    """Whether a norm may be read (weight, eps) instead of called: of a known class, no hook, no wrapper."""
    if has_hooks(norm):
        return False
    plain = original_class(norm) is torch.nn.LayerNorm and len(norm.normalized_shape) == 1  # type: ignore[arg-type]
    return plain or class_path(norm) in RULES


def add_norm(branch: Tensor, residual: Tensor, norm: Any) -> tuple[Tensor, Tensor]:
    """(norm(residual + branch), residual + branch) in one pass."""
    rule = RULES.get(class_path(norm))
    if rule is None:
        out = ops.add_layer_norm(branch, residual, norm.weight, norm.bias, norm.eps, return_residual=True)
    else:
        offset = rule.behaviour._offset  # type: ignore[attr-defined]
        out = ops.add_rms_norm(branch, residual, norm.weight, _eps(norm), offset=offset, return_residual=True)
    assert isinstance(out, tuple)
    return out


def _paths(behaviour: type, *classes: str) -> dict[str, Rule]:
    rule = Rule(behaviour, "fused RMSNorm")
    return {f"transformers.models.{path}": rule for path in classes}


RULES = {
    **_paths(
        RmsNorm,
        "llama.modeling_llama.LlamaRMSNorm",
        "mistral.modeling_mistral.MistralRMSNorm",
        "qwen2.modeling_qwen2.Qwen2RMSNorm",
        "qwen3.modeling_qwen3.Qwen3RMSNorm",
        "gpt_oss.modeling_gpt_oss.GptOssRMSNorm",
        "t5.modeling_t5.T5LayerNorm",
    ),
    **_paths(GemmaNorm, "gemma2.modeling_gemma2.Gemma2RMSNorm", "gemma3.modeling_gemma3.Gemma3RMSNorm"),
}

LAYER_NORM = Rule(fnn.LayerNorm, "fused LayerNorm")


def recognise(module: torch.nn.Module) -> Rule | None:
    """The rule for a norm of a class no table names, found out by what it computes."""
    if class_path(module) == "torch.nn.modules.normalization.LayerNorm":
        return LAYER_NORM if len(module.normalized_shape) == 1 else None  # type: ignore[arg-type]
    if not type(module).__name__.endswith("RMSNorm") or not _looks_like_rms(module):
        return None
    twin: Any = copy.deepcopy(module).to("cpu", torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        twin.weight.copy_(torch.rand(twin.weight.shape, generator=generator))
        x = torch.randn(3, *twin.weight.shape, generator=generator)
        try:
            out = twin(x)
        except Exception:
            return None  # it takes more than the hidden states
        for behaviour in (RmsNorm, GemmaNorm):
            want = ops.rms_norm(x, twin.weight, _eps(twin), offset=behaviour._offset)
            if isinstance(out, Tensor) and out.shape == want.shape and torch.allclose(out, want, rtol=1e-5, atol=1e-6):
                return Rule(behaviour, "fused RMSNorm")
    return None


def _looks_like_rms(module: torch.nn.Module) -> bool:
    weight = dict(module.named_parameters()).get("weight")
    parts = len(list(module.parameters())) + len(list(module.buffers())) + len(list(module.children()))
    has_eps = hasattr(module, "variance_epsilon") or hasattr(module, "eps")
    return weight is not None and weight.ndim == 1 and parts == 1 and has_eps and weight.device.type != "meta"
