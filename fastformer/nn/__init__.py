"""Modules with torch.nn's signatures, parameters and state_dict keys, computed by fastformer's operators.

A call that the fused path cannot do takes the stock arithmetic and is counted: `count()` tells how many and why.
"""

from fastformer.nn.attention import MultiheadAttention
from fastformer.nn.cache import AttentionCache, KVCache
from fastformer.nn.counters import count, reset_count
from fastformer.nn.layers import TransformerDecoderLayer, TransformerEncoderLayer
from fastformer.nn.masks import generate_square_subsequent_mask
from fastformer.nn.norm import AddLayerNorm, AddRMSNorm, LayerNorm, RMSNorm
from fastformer.nn.transformer import Transformer, TransformerDecoder, TransformerEncoder

__all__ = [
    "AddLayerNorm",
    "AddRMSNorm",
    "AttentionCache",
    "KVCache",
    "LayerNorm",
    "MultiheadAttention",
    "RMSNorm",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "count",
    "generate_square_subsequent_mask",
    "reset_count",
]
