"""torch.nn's own attention and encoder layer."""

from __future__ import annotations

import fastformer.nn as fnn
from fastformer.integrations.families.rule import Rule

# fastformer.nn's classes serve as behaviours too: both bases are the stock class, so super().forward is stock's.
RULES = {
    "torch.nn.modules.activation.MultiheadAttention": Rule(fnn.MultiheadAttention, "fused attention"),
    "torch.nn.modules.transformer.TransformerEncoderLayer": Rule(
        fnn.TransformerEncoderLayer, "encoder layer with fused residual + dropout + LayerNorm"
    ),
}
