"""Attention maps on request: recomputed from the LSE, one head at a time, so that B·H·S² is never held unless asked."""

from __future__ import annotations

import torch
from torch import Tensor

from fastformer.ops.attention.options import check_extras, check_heads, check_mask, read_options
from fastformer.ops.attention.reference import attention_scores
from fastformer.ops.validate import check_tensor


def attention_weights(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    causal_alignment: str = "top-left",
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    average_heads: bool = True,
    rows: Tensor | None = None,
) -> Tensor:
    """The probabilities exp(score - lse) of `scaled_dot_product_attention`, before dropout.

    Not differentiable: maps are for looking at.

    Args:
        query: (B, H, Sq, D); key: (B, Hk, Sk, D); the options as in the call that returned the LSE.
        lse: (B, H, Sq) fp32, from return_lse=True; with sinks in it, the weights sum to less than 1.
        average_heads: average over the heads (memory B·Sq·Sk), or keep them.
        rows: int64 (R,), the query rows wanted, or None for all.

    Returns:
        fp32 (B, R, Sk), or (B, H, R, Sk) with average_heads=False; R is Sq without `rows`. Rows with nothing to attend
        to are 0.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """
    check_tensor("query", query, ndim=4)
    check_heads(query, key, key, 1, enable_gqa)
    batch, heads, q_len, head_dim = query.shape
    check_tensor("lse", lse, dtypes=(torch.float32, torch.float64), shape=(batch, heads, q_len), device=query.device)
    check_extras(query, heads, batch, alibi_slopes, None, None)
    check_mask(attn_mask, query, (batch, heads, q_len, key.shape[2]))
    options = read_options(head_dim, 0.0, is_causal, scale, causal_alignment, window, softcap)
    if rows is not None:
        check_tensor("rows", rows, ndim=1, dtypes=(torch.int64,), device=query.device)
    wanted = torch.arange(q_len, device=query.device) if rows is None else rows
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    groups = heads // max(1, key.shape[1])
    count = wanted.numel()
    shape = (batch, count, key.shape[2]) if average_heads else (batch, heads, count, key.shape[2])
    result = torch.zeros(shape, dtype=dtype, device=query.device)
    if attn_mask is not None:
        attn_mask = attn_mask.expand(batch, heads, q_len, key.shape[2])
    with torch.no_grad():
        for head in range(heads):
            one = slice(head, head + 1)
            slopes = None if alibi_slopes is None else alibi_slopes[..., one]
            mask = None if attn_mask is None else attn_mask[:, one].index_select(2, wanted)
            scores = attention_scores(
                query[:, one].index_select(2, wanted).to(dtype),
                key[:, head // groups : head // groups + 1].to(dtype),
                options,
                mask,
                slopes,
                rows=wanted,
                length=q_len,
            )
            norm = lse[:, one].index_select(2, wanted).to(dtype).unsqueeze(-1)
            part = torch.where((scores == -torch.inf) | (norm == -torch.inf), 0.0, torch.exp(scores - norm))
            if average_heads:
                result += part.squeeze(1)
            else:
                result[:, one] = part
    return result / heads if average_heads and heads else result
