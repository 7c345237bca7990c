"""Multi-head attention with torch.nn's interface (Vaswani et al. 2017, arXiv 1706.03762)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastformer import ops
from fastformer.nn.counters import count_fallback, count_fused


class MultiheadAttention(torch.nn.MultiheadAttention):
    """torch.nn.MultiheadAttention: same arguments, initialisation, state_dict and results.

    Runs fused with need_weights=False, in training as in inference, with any combination of masks. A row that may
    attend to nothing gives zero (plus the output bias) instead of NaN. Calls with need_weights=True, kdim/vdim,
    add_bias_kv, add_zero_attn or nested tensors take the stock arithmetic and are counted.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        reason = self._why_not_fused(query, key, value, need_weights)
        if reason:
            count_fallback("MultiheadAttention", reason)
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        batched = F._mha_shape_check(query, key, value, key_padding_mask, attn_mask, self.num_heads)
        count_fused("MultiheadAttention")
        if not batched:
            mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
            out = self._attend(query[None], key[None], value[None], mask, attn_mask, is_causal)
            return out.squeeze(0), None
        if self.batch_first:
            return self._attend(query, key, value, key_padding_mask, attn_mask, is_causal), None
        shared_kv, shared_q = key is value, query is key
        query = query.transpose(0, 1)
        key = query if shared_q else key.transpose(0, 1)
        value = key if shared_kv else value.transpose(0, 1)
        return self._attend(query, key, value, key_padding_mask, attn_mask, is_causal).transpose(0, 1), None

    def _why_not_fused(self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool) -> str:
        if need_weights:
            return "need_weights=True"
        if not self._qkv_same_embed_dim:
            return "kdim or vdim differ from embed_dim"
        if self.bias_k is not None or self.bias_v is not None:
            return "add_bias_kv"
        if self.add_zero_attn:
            return "add_zero_attn"
        if query.is_nested or key.is_nested or value.is_nested:
            return "nested tensor"
        return ""

    def _attend(
        self,
        query: Tensor,  # [batch, seqlen_q, embed]
        key: Tensor,  # [batch, seqlen_k, embed]
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> Tensor:
        q, k, v = F._in_projection_packed(query, key, value, self.in_proj_weight, self.in_proj_bias)
        q, k, v = (t.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for t in (q, k, v))
        mask = attention_mask(key_padding_mask, None if is_causal else attn_mask, query, self.num_heads)
        out = ops.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=self.dropout if self.training else 0.0, is_causal=is_causal
        )
        return self.out_proj(out.transpose(1, 2).flatten(2))


def attention_mask(
    key_padding_mask: Tensor | None, attn_mask: Tensor | None, query: Tensor, num_heads: int
) -> Tensor | None:
    """torch.nn's two masks as the one that scaled_dot_product_attention takes.

    Args:
        key_padding_mask: [batch, seqlen_k]; bool (True: ignore) or float (added).
        attn_mask: [seqlen_q, seqlen_k] or [batch * heads, seqlen_q, seqlen_k]; bool (True: ignore) or float (added).
        query: [batch, seqlen_q, embed], for its batch size and dtype.

    Returns:
        None, a bool mask (True: attend) or a float mask, broadcastable to [batch, heads, seqlen_q, seqlen_k]. It stays
        bool as long as both are, and [batch, 1, 1, seqlen_k] when only keys are padded.
    """
    padding = None if key_padding_mask is None else key_padding_mask[:, None, None, :]
    if attn_mask is not None and attn_mask.ndim == 3:
        attn_mask = attn_mask.unflatten(0, (query.shape[0], num_heads))
    masks = [m for m in (padding, attn_mask) if m is not None]
    if not masks:
        return None
    for m in masks:
        if m.dtype != torch.bool and not m.is_floating_point():
            raise TypeError(f"masks must be bool or floating point, got {str(m.dtype).removeprefix('torch.')}")
    if all(m.dtype == torch.bool for m in masks):
        ignore = masks[0] if len(masks) == 1 else masks[0] | masks[1]
        return ~ignore
    added = [
        torch.zeros_like(m, dtype=query.dtype).masked_fill_(m, float("-inf")) if m.dtype == torch.bool else m
        for m in masks
    ]
    return added[0] if len(added) == 1 else added[0] + added[1]
