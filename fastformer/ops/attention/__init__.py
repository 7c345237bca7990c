"""Attention: dense, packed, over a cache, and what goes with it.

- `options`: the arguments, their checks, and the rules of the scores.
- `reference`: all of it in differentiable PyTorch; `kernel`: the Triton kernels as an operator.
- `dense`, `varlen`, `cache`, `weights`, `merge`: the public functions; `packed_cpu`: packed sequences on the CPU.
"""

from fastformer.ops.attention.cache import attention_kv_cache
from fastformer.ops.attention.dense import scaled_dot_product_attention
from fastformer.ops.attention.merge import merge_attention
from fastformer.ops.attention.packed_reference import varlen_reference
from fastformer.ops.attention.reference import attention_reference
from fastformer.ops.attention.varlen import attention_varlen
from fastformer.ops.attention.weights import attention_weights

__all__ = [
    "attention_kv_cache",
    "attention_reference",
    "attention_varlen",
    "attention_weights",
    "merge_attention",
    "scaled_dot_product_attention",
    "varlen_reference",
]
