"""Modules with torch.nn's signatures, parameters and state_dict keys, computed by fastformer's operators.

A call that the fused path cannot do takes the stock arithmetic and is counted: `count()` tells how many and why.
"""

from fastformer.nn.attention import MultiheadAttention
from fastformer.nn.counters import count, reset_count
from fastformer.nn.norm import AddLayerNorm, LayerNorm
from fastformer.nn.transformer import TransformerEncoderLayer

__all__ = ["AddLayerNorm", "LayerNorm", "MultiheadAttention", "TransformerEncoderLayer", "count", "reset_count"]
