"""Attention: dense, packed, and what goes with it.

- `options`: the arguments, their checks, and the rules of the scores.
- `reference`: all of it in differentiable PyTorch.
- `dense`, `varlen`: the public functions; `packed_cpu`: packed sequences on the CPU.
"""

from fastformer.ops.attention.dense import scaled_dot_product_attention
from fastformer.ops.attention.reference import attention_reference
from fastformer.ops.attention.varlen import attention_varlen, varlen_reference

__all__ = ["attention_reference", "attention_varlen", "scaled_dot_product_attention", "varlen_reference"]
