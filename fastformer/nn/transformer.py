"""Transformer layers with torch.nn's interface."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastformer import ops
from fastformer.nn.attention import MultiheadAttention
from fastformer.nn.counters import count_fallback, count_fused
from fastformer.nn.norm import is_plain_dropout, is_plain_norm


class TransformerEncoderLayer(torch.nn.TransformerEncoderLayer):
    """torch.nn.TransformerEncoderLayer: same arguments, initialisation, state_dict and results.

    Dropout, residual addition and LayerNorm run in one pass each, post-norm (Vaswani et al. 2017) and pre-norm
    (Xiong et al. 2020, arXiv 2002.04745).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.self_attn.__class__ = MultiheadAttention

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        reason = self._why_not_fused(src)
        if reason:
            count_fallback("TransformerEncoderLayer", reason)
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        count_fused("TransformerEncoderLayer")
        x = self.norm1(src) if self.norm_first else src
        attended = self.self_attn(
            x,
            x,
            x,
            key_padding_mask=src_key_padding_mask,
            need_weights=False,
            attn_mask=src_mask,
            is_causal=is_causal,
        )[0]
        if self.norm_first:
            normed, residual = self._add_norm(attended, src, self.norm2, self.dropout1, return_residual=True)
            return residual + self._ff_block(normed)
        normed = self._add_norm(attended, src, self.norm1, self.dropout1)
        hidden = self.linear2(self.dropout(self.activation(self.linear1(normed))))
        return self._add_norm(hidden, normed, self.norm2, self.dropout2)

    def _add_norm(self, input: Tensor, residual: Tensor, norm: Any, dropout: Any, return_residual: bool = False) -> Any:
        return ops.add_layer_norm(
            input,
            residual,
            norm.weight,
            norm.bias,
            norm.eps,
            dropout_p=dropout.p,
            training=dropout.training,
            return_residual=return_residual,
        )

    def _why_not_fused(self, src: Tensor) -> str:
        if src.is_nested:
            return "nested tensor"
        if not (is_plain_norm(self.norm1) and is_plain_norm(self.norm2)):
            return "norm1 or norm2 is hooked or replaced"
        if not (is_plain_dropout(self.dropout1) and is_plain_dropout(self.dropout2)):
            return "dropout1 or dropout2 is hooked or replaced"
        return ""
