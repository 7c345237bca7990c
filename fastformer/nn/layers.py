"""Encoder and decoder layer with torch.nn's interface."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastformer import ops
from fastformer.nn.attention import MultiheadAttention
from fastformer.nn.cache import AttentionCache
from fastformer.nn.counters import count_fallback, count_fused
from fastformer.nn.norm import is_plain_dropout, is_plain_norm
from fastformer.nn.packed import PackedKeys, rebuild_nested, unbind_nested
from fastformer.nn.parts import has_hooks, runs_ours, stands_for, use_our_parts
from fastformer.ops.activation import bias_dropout_add, bias_gelu
from fastformer.ops.backend import backend_for
from fastformer.ops.packing import Packing


@stands_for(torch.nn.TransformerEncoderLayer)
class TransformerEncoderLayer(torch.nn.TransformerEncoderLayer):
    """torch.nn.TransformerEncoderLayer: same arguments, initialisation, state_dict and results.

    Dropout, residual addition and LayerNorm run in one pass each, post-norm (Vaswani et al. 2017) and pre-norm
    (Xiong et al. 2020, arXiv 2002.04745), and so do bias and GELU. Nested tensors work in training as well.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        use_our_parts(self)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Any = None,
        is_causal: bool = False,
    ) -> Tensor:
        """As torch.nn's; a `Packing` for src_key_padding_mask says that src is packed, [rows, d_model]."""
        reason = why_not_fused(self)
        if not reason and src.is_nested and (src_mask is not None or src_key_padding_mask is not None):
            reason = "nested tensor with a mask"
        if reason:
            count_fallback("TransformerEncoderLayer", reason)
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        count_fused("TransformerEncoderLayer")
        if src.is_nested:
            (flat,), (place,) = unbind_nested((src,))
            return rebuild_nested(self._fused(flat, None, PackedKeys(place, place), is_causal), src)
        keys = src_key_padding_mask
        return self._fused(src, src_mask, PackedKeys(keys, keys) if isinstance(keys, Packing) else keys, is_causal)

    def _fused(self, src: Tensor, mask: Tensor | None, keys: Tensor | PackedKeys | None, is_causal: bool) -> Tensor:
        x = self.norm1(src) if self.norm_first else src
        attended = self.self_attn(
            x, x, x, key_padding_mask=keys, need_weights=False, attn_mask=mask, is_causal=is_causal
        )[0]
        if self.norm_first:
            normed, residual = add_norm(attended, src, self.norm2, self.dropout1, return_residual=True)
            return add_feed_forward(self, normed, residual, self.dropout2)
        normed = add_norm(attended, src, self.norm1, self.dropout1)
        return add_norm(feed_forward(self, normed), normed, self.norm2, self.dropout2)


@stands_for(torch.nn.TransformerDecoderLayer)
class TransformerDecoderLayer(torch.nn.TransformerDecoderLayer):
    """torch.nn.TransformerDecoderLayer: same arguments, initialisation, state_dict and results.

    Fused as the encoder layer is; the memory's keys and values come from one product.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        use_our_parts(self)

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Any = None,
        memory_key_padding_mask: Any = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
        *,
        cache: tuple[AttentionCache, AttentionCache] | None = None,
    ) -> Tensor:
        """As torch.nn's.

        Args:
            tgt_key_padding_mask, memory_key_padding_mask: two `Packing`s say that tgt and memory are packed.
            cache: of self-attention and of attention to the memory, from `KVCache.of_layer`: tgt then holds only the
                tokens that follow those of earlier calls, and is causal.

        Raises:
            ValueError: a cache comes with a mask it cannot honour, or to a layer that cannot use it.
        """
        reason = why_not_fused(self)
        if reason:
            if cache is not None:
                raise ValueError(f"this layer cannot decode with a cache: {reason}")
            count_fallback("TransformerDecoderLayer", reason)
            return super().forward(
                tgt,
                memory,
                tgt_mask,
                memory_mask,
                tgt_key_padding_mask,
                memory_key_padding_mask,
                tgt_is_causal,
                memory_is_causal,
            )
        count_fused("TransformerDecoderLayer")
        own: Any = tgt_key_padding_mask
        other: Any = memory_key_padding_mask
        if isinstance(own, Packing) and isinstance(other, Packing):
            own, other = PackedKeys(own, own), PackedKeys(own, other)
        own_cache, other_cache = ({}, {}) if cache is None else ({"cache": cache[0]}, {"cache": cache[1]})
        x = self.norm1(tgt) if self.norm_first else tgt
        attended = self.self_attn(
            x,
            x,
            x,
            key_padding_mask=own,
            need_weights=False,
            attn_mask=tgt_mask,
            is_causal=tgt_is_causal or cache is not None,
            **own_cache,
        )[0]
        attend_memory = functools.partial(
            self.multihead_attn,
            key=memory,
            value=memory,
            key_padding_mask=other,
            need_weights=False,
            attn_mask=memory_mask,
            is_causal=memory_is_causal,
            **other_cache,
        )
        if self.norm_first:
            x, residual = add_norm(attended, tgt, self.norm2, self.dropout1, return_residual=True)
            x, residual = add_norm(attend_memory(x)[0], residual, self.norm3, self.dropout2, return_residual=True)
            return add_feed_forward(self, x, residual, self.dropout3)
        x = add_norm(attended, tgt, self.norm1, self.dropout1)
        x = add_norm(attend_memory(x)[0], x, self.norm2, self.dropout2)
        return add_norm(feed_forward(self, x), x, self.norm3, self.dropout3)


def add_norm(input: Tensor, residual: Tensor, norm: Any, dropout: Any, return_residual: bool = False) -> Any:
    """norm(residual + dropout(input)), and the sum when asked for."""
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


def feed_forward(layer: Any, x: Tensor) -> Tensor:
    """linear2(dropout(activation(linear1(x)))), without the dropout behind it."""
    return layer.linear2(_inner(layer, x))


def add_feed_forward(layer: Any, x: Tensor, residual: Tensor, dropout: Any) -> Tensor:
    """residual + dropout(feed_forward(x)), the end of a pre-norm layer."""
    hidden, linear = _inner(layer, x), layer.linear2
    if not _reads_bias(linear, x):
        return residual + dropout(linear(hidden))
    out = F.linear(hidden, linear.weight)
    return bias_dropout_add(out, linear.bias, residual, dropout.p, dropout.training)


def _inner(layer: Any, x: Tensor) -> Tensor:
    linear, approximate = layer.linear1, _gelu(layer.activation)
    if approximate is None or not _reads_bias(linear, x):
        return layer.dropout(layer.activation(linear(x)))
    return layer.dropout(bias_gelu(F.linear(x, linear.weight), linear.bias, approximate))


def _reads_bias(linear: Any, x: Tensor) -> bool:
    """Whether a kernel may add this layer's bias: PyTorch's own operators add it in the product, for nothing."""
    return type(linear) is torch.nn.Linear and not has_hooks(linear) and backend_for(x.device) == "triton"


def _gelu(activation: Any) -> str | None:
    """The `approximate` of an activation that is GELU, else None."""
    if activation is F.gelu:
        return "none"
    return activation.approximate if type(activation) is torch.nn.GELU and not has_hooks(activation) else None


def why_not_fused(layer: Any) -> str:
    """Reason why an encoder or decoder layer has to run torch.nn's own forward, or ""."""
    stock: type = torch.nn.TransformerDecoderLayer
    if isinstance(layer, torch.nn.TransformerEncoderLayer):
        stock = torch.nn.TransformerEncoderLayer
    for name in ("_sa_block", "_mha_block", "_ff_block"):
        if getattr(type(layer), name, None) is not getattr(stock, name, None):
            return f"a subclass has its own {name}"
    for name in ("norm1", "norm2", "norm3"):
        if name in layer._modules and not is_plain_norm(layer._modules[name]):
            return f"{name} is hooked or replaced"
    for name in ("dropout1", "dropout2", "dropout3"):
        if name in layer._modules and not is_plain_dropout(layer._modules[name]):
            return f"{name} is hooked or replaced"
    return ""


def why_not_packed(layer: Any, ours: type) -> str:
    """Reason why a stack must not hand packed tensors to this layer, or ""."""
    if not runs_ours(layer, ours):
        return "a layer of another class"
    for name in ("self_attn", "multihead_attn"):
        attention = layer._modules.get(name)
        if attention is None:
            continue
        if not runs_ours(attention, MultiheadAttention):
            return f"{name} is of another class"
        if attention.bias_k is not None or attention.add_zero_attn:
            return f"{name} has add_bias_kv or add_zero_attn"
    return why_not_fused(layer)
