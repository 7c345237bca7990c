"""The attention operators as models call them: under autocast, queries, keys and values arrive in several dtypes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastformer import ops
from fastformer.nn.counters import count_fallback
from fastformer.nn.recording import record
from fastformer.ops.attention.options import read_options
from fastformer.ops.attention.reference import attention_scores


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


def attend_with_weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    sinks: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Attention and its weights [batch, heads, seqlen_q, seqlen_k], those after dropout.

    Without gradients the weights are recomputed, in the memory they take themselves. With gradients the output is made
    from them in plain PyTorch, as stock makes it: somebody may ask for the gradient of the result by its weights.
    """
    device, dtype = query.device.type, query.dtype
    if torch.is_autocast_enabled(device):
        query, key, value = _cast(query, key, value)
        dtype = query.dtype
    given = (t for t in (query, key, value, attn_mask, sinks) if t is not None)
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    with torch.autocast(device, enabled=False):
        if dropout_p == 0.0 and not needs_grad:
            both = ops.scaled_dot_product_attention(
                query, key, value, attn_mask=attn_mask, sinks=sinks, return_lse=True, **options
            )
            assert isinstance(both, tuple)
            weights = ops.attention_weights(query, key, both[1], attn_mask, average_heads=False, **options)
            return both[0], weights.to(dtype)
        count_fallback("attention", "weights with a gradient or dropout")
        weights = F.dropout(_weights(query, key, attn_mask, sinks, **options), dropout_p).to(dtype)
        groups = query.shape[1] // value.shape[1]
        return weights @ value.repeat_interleave(groups, 1), weights


def _weights(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    sinks: Tensor | None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    causal_alignment: str = "top-left",
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
) -> Tensor:
    """softmax of the scores in fp32, or in fp64; rows with nothing to attend to are 0."""
    rules = read_options(query.shape[-1], 0.0, is_causal, scale, causal_alignment, window, softcap)
    dtype = torch.promote_types(query.dtype, torch.float32)
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = attention_scores(query.to(dtype), key.to(dtype), rules, attn_mask, None)
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    if sinks is not None:
        sink = sinks.to(dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        return torch.cat((scores.masked_fill(empty, 0.0), sink), -1).softmax(-1)[..., :-1].masked_fill(empty, 0.0)
    return scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)


def _cast(*tensors: Tensor) -> tuple[Tensor, ...]:
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def _tensor(out: Any) -> Tensor:
    assert isinstance(out, Tensor)
    return out
