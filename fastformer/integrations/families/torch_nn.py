"""torch.nn's own attention, layers, stacks and norms."""

from __future__ import annotations

import fastformer.nn as fnn
from fastformer.integrations.families.rule import Rule

_ATTENTION, _LAYERS = "torch.nn.modules.activation", "torch.nn.modules.transformer"

# fastformer.nn's classes serve as behaviours too: both bases are the stock class, so super().forward is stock's.
RULES = {
    f"{_ATTENTION}.MultiheadAttention": Rule(fnn.MultiheadAttention, "fused attention"),
    f"{_LAYERS}.TransformerEncoderLayer": Rule(
        fnn.TransformerEncoderLayer, "encoder layer with fused residual + dropout + LayerNorm"
    ),
    f"{_LAYERS}.TransformerDecoderLayer": Rule(
        fnn.TransformerDecoderLayer, "decoder layer with fused residual + dropout + LayerNorm"
    ),
    f"{_LAYERS}.TransformerEncoder": Rule(fnn.TransformerEncoder, "encoder without padding", removes_padding=True),
    f"{_LAYERS}.TransformerDecoder": Rule(fnn.TransformerDecoder, "decoder without padding", removes_padding=True),
    f"{_LAYERS}.Transformer": Rule(fnn.Transformer, "encoder-decoder without padding", removes_padding=True),
}

# Replaced where no Hugging Face model is around them: a family's own table says what becomes of its norms.
_NORMS = "torch.nn.modules.normalization"
NORMS = {
    f"{_NORMS}.LayerNorm": Rule(fnn.LayerNorm, "fused LayerNorm"),
    f"{_NORMS}.RMSNorm": Rule(fnn.RMSNorm, "fused RMSNorm"),
}
