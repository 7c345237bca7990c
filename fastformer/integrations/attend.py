"""The attention operators as models call them: under autocast, queries, keys and values arrive in several dtypes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastformer import ops
from fastformer.nn.recording import record


def attend(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """`ops.scaled_dot_product_attention` in the dtype autocast asks for, if it does."""
    device = query.device.type
    if torch.is_autocast_enabled(device):
        query, key, value = _cast(query, key, value)
        with torch.autocast(device, enabled=False):
            out = _tensor(ops.scaled_dot_product_attention(query, key, value, **options))
    else:
        out = _tensor(ops.scaled_dot_product_attention(query, key, value, **options))
    return record(query, key, value, out, options)


def attend_packed(
    query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, **options: Any
) -> Tensor:
    """`ops.attention_varlen`, likewise."""
    device = query.device.type
    if torch.is_autocast_enabled(device):
        query, key, value = _cast(query, key, value)
        with torch.autocast(device, enabled=False):
            out = _tensor(ops.attention_varlen(query, key, value, cu_q, cu_k, max_q, max_k, **options))
    else:
        out = _tensor(ops.attention_varlen(query, key, value, cu_q, cu_k, max_q, max_k, **options))
    return record(query, key, value, out, options, cu_q, cu_k)


def _cast(*tensors: Tensor) -> tuple[Tensor, ...]:
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def _tensor(out: Any) -> Tensor:
    assert isinstance(out, Tensor)
    return out
