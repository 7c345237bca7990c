"""Multi-head attention with torch.nn's interface (Vaswani et al. 2017, arXiv 1706.03762)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastformer import ops
from fastformer.nn.cache import AttentionCache
from fastformer.nn.counters import count_fallback, count_fused
from fastformer.nn.masks import is_mask, made_causal, merge_masks
from fastformer.nn.packed import PackedKeys, rebuild_nested, unbind_nested
from fastformer.nn.parts import stands_for
from fastformer.nn.recording import record
from fastformer.ops.attention import attention_weights
from fastformer.ops.backend import backend_for
from fastformer.ops.random import draw_seed


@stands_for(torch.nn.MultiheadAttention)
class MultiheadAttention(torch.nn.MultiheadAttention):
    """torch.nn.MultiheadAttention: same arguments, initialisation, state_dict, results and errors.

    Runs fused in training as in inference, with any combination of arguments and masks, and with nested tensors in
    training as well. A row that may attend to nothing gives zero (plus the output bias) instead of NaN. Weights
    (need_weights=True, the default) take the memory of the result alone, in training and after dropout too, where the
    Triton kernels run. What takes the stock arithmetic is counted: input that torch.nn refuses and, on the CPU,
    weights that need a gradient or were dropped from.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | PackedKeys | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        cache: AttentionCache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """As torch.nn.MultiheadAttention.forward.

        Args:
            key_padding_mask: a `PackedKeys` says that query, key and value are packed, [tokens, embed].
            cache: with one, query (and key and value) are the tokens that follow those of earlier calls; is_causal
                then needs no attn_mask and lets every query see all that came before it.
        """
        if isinstance(key_padding_mask, PackedKeys):
            count_fused("MultiheadAttention")
            return self._packed(query, key, value, key_padding_mask, is_causal), None
        if cache is not None:
            count_fused("MultiheadAttention")
            return self._cached(query, key, value, key_padding_mask, attn_mask, is_causal, cache), None
        nested = query.is_nested and key.is_nested and value.is_nested
        reason = (
            self._why_not_nested(key_padding_mask, need_weights, attn_mask, is_causal)
            if nested
            else self._why_not_fused(query, key, value, key_padding_mask, need_weights, attn_mask, is_causal)
        )
        if reason:
            if self.num_heads * self.head_dim != self.embed_dim:
                raise ValueError(f"attention with pruned heads has no stock forward to take for this call: {reason}")
            count_fallback("MultiheadAttention", reason)
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        count_fused("MultiheadAttention")
        if nested:
            return self._nested(query, key, value), None
        if query.ndim == 3:
            seq_first = not self.batch_first
            masks = key_padding_mask, attn_mask
            return self._dense(query, key, value, *masks, need_weights, average_attn_weights, is_causal, seq_first)
        padding = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        # The same tensor has to stay the same tensor: it is projected once.
        batch_q, batch_k, batch_v = _each_once(lambda t: t.unsqueeze(0), query, key, value)
        out, weights = self._dense(
            batch_q, batch_k, batch_v, padding, attn_mask, need_weights, average_attn_weights, is_causal, False
        )
        return out.squeeze(0), None if weights is None else weights.squeeze(0)

    def _why_not_fused(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> str:
        if need_weights and backend_for(query.device) == "torch":
            if self.dropout and self.training:
                return "weights after dropout"
            # Recomputing the maps saves memory, not time, and a host has memory.
            tensors = (query, key, attn_mask, *self.parameters())
            if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
                return "weights with a gradient"
        # Whatever torch.nn refuses goes to torch.nn, which says why in its own words.
        refused = "input that torch.nn refuses"
        if query.is_nested or key.is_nested or value.is_nested:
            return refused
        if query.ndim not in (2, 3) or key.ndim != query.ndim or value.ndim != query.ndim:
            return refused
        sizes = (query.shape[-1], key.shape[-1], value.shape[-1])
        if sizes != (self.embed_dim, self.kdim, self.vdim) or key.shape[:-1] != value.shape[:-1]:
            return refused
        batched = query.ndim == 3
        seq_axis, batch_axis = (1, 0) if self.batch_first or not batched else (0, 1)
        batch = query.shape[batch_axis] if batched else 1
        seqlen_q, seqlen_k = (query.shape[seq_axis], key.shape[seq_axis]) if batched else (query.shape[0], key.shape[0])
        if batched and key.shape[batch_axis] != batch:
            return refused
        if key_padding_mask is not None and (
            key_padding_mask.shape != ((batch, seqlen_k) if batched else (seqlen_k,)) or not is_mask(key_padding_mask)
        ):
            return refused
        if attn_mask is None:
            return refused if is_causal else ""
        shapes = ((seqlen_q, seqlen_k), (batch * self.num_heads, seqlen_q, seqlen_k))
        return "" if attn_mask.shape in shapes and is_mask(attn_mask) else refused

    def _why_not_nested(
        self, key_padding_mask: Tensor | None, need_weights: bool, attn_mask: Tensor | None, is_causal: bool
    ) -> str:
        if key_padding_mask is not None or attn_mask is not None or is_causal:
            return "nested tensor with a mask"
        if need_weights:
            return "weights of nested tensors"
        if self.bias_k is not None or self.add_zero_attn:
            return "nested tensor with add_bias_kv or add_zero_attn"
        return ""

    def _dense(
        self,
        query: Tensor,  # [batch, seqlen_q, embed], or [seqlen_q, batch, embed] with seq_first
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        need_weights: bool,
        average_attn_weights: bool,
        is_causal: bool,
        seq_first: bool,
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v = (_heads_first(t, seq_first) for t in self._project(query, key, value))
        if self.bias_k is not None or self.add_zero_attn:
            k, v, added = self._append_keys(k, v)
            # With keys that belong to no place, torch.nn takes the hint only where it needs no other mask.
            is_causal = is_causal and key_padding_mask is None and not need_weights
            key_padding_mask = None if key_padding_mask is None else F.pad(key_padding_mask, (0, added))
            attn_mask = None if attn_mask is None else F.pad(attn_mask, (0, added))
        elif attn_mask is not None and attn_mask.ndim == 2 and attn_mask.shape[0] == attn_mask.shape[1]:
            is_causal = is_causal or made_causal(attn_mask)
        if is_causal and key_padding_mask is not None and backend_for(q.device) == "torch":
            # PyTorch's operator takes a mask or is_causal, not both; the given mask says the same.
            is_causal = False
        batch = q.shape[0]
        mask = merge_masks(key_padding_mask, None if is_causal else attn_mask, batch, self.num_heads, query.dtype)
        dropout_p = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            # torch.nn returns what dropout left of the weights.
            seed = draw_seed(q.device) if dropout_p else None
            rules: dict[str, Any] = {
                "attn_mask": mask,
                "is_causal": is_causal,
                "dropout_p": dropout_p,
                "dropout_seed": seed,
            }
            out, lse = ops.scaled_dot_product_attention(q, k, v, return_lse=True, **rules)
            weights = attention_weights(q, k, lse, average_heads=average_attn_weights, **rules).to(out.dtype)
        else:
            out = ops.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p, is_causal=is_causal)
        record(q, k, v, out, {"attn_mask": mask, "is_causal": is_causal})
        return self._project_out(out, seq_first), weights

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, where: PackedKeys, is_causal: bool) -> Tensor:
        """[tokens_q, embed] and [tokens_k, embed] twice to [tokens_q, embed]."""
        q, k, v = self._project(query, key, value)
        out = ops.attention_varlen(
            q,
            k,
            v,
            where.query.cu_seqlens,
            where.key.cu_seqlens,
            where.query.max_seqlen,
            where.key.max_seqlen,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=is_causal,
        )
        record(q, k, v, out, {"is_causal": is_causal}, where.query.cu_seqlens, where.key.cu_seqlens)
        return F.linear(out.flatten(1), self.out_proj.weight, self.out_proj.bias)

    def _nested(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        (q, k, v), places = unbind_nested((query, key, value))
        return rebuild_nested(self._packed(q, k, v, PackedKeys(places[0], places[1]), False), query)

    def _cached(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,  # [batch, all keys so far]
        attn_mask: Tensor | None,
        is_causal: bool,
        cache: AttentionCache,
    ) -> Tensor:
        if query.ndim != 3:
            raise ValueError(f"query must be batched for decoding with a cache, got shape {tuple(query.shape)}")
        if attn_mask is not None:
            raise ValueError("attn_mask must be None for decoding with a cache, which is causal by itself")
        if self.bias_k is not None or self.add_zero_attn:
            raise ValueError("decoding with a cache takes neither add_bias_kv nor add_zero_attn")
        seq_first = not self.batch_first
        dropout_p = self.dropout if self.training else 0.0
        if cache.fixed:
            q = _heads_first(self._project_query(query), seq_first)
            if not cache.length:
                cache.append(*(_heads_first(t, seq_first) for t in self._project_keys(key, value)))
        else:
            q, k, v = (_heads_first(t, seq_first) for t in self._project(query, key, value))
            if key_padding_mask is None and not dropout_p and cache.attends(q, k, v):
                return self._project_out(cache.append_and_attend(q, k, v, is_causal), seq_first)
            cache.append(k, v)
        k, v = cache.read()
        if key_padding_mask is not None and key_padding_mask.shape != (q.shape[0], k.shape[2]):
            raise ValueError(
                f"key_padding_mask must have shape ({q.shape[0]}, {k.shape[2]}), all keys so far, "
                f"got {tuple(key_padding_mask.shape)}"
            )
        out = ops.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=merge_masks(key_padding_mask, None, q.shape[0], self.num_heads, query.dtype),
            dropout_p=dropout_p,
            is_causal=is_causal and q.shape[2] > 1,  # the last token sees everything
            causal_alignment="bottom-right",
        )
        return self._project_out(out, seq_first)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[..., embed] each to [..., heads, head_dim]: one product for self-attention, two if key is value."""
        if self._qkv_same_embed_dim and query is key and key is value:
            joint = F.linear(query, self.in_proj_weight, self.in_proj_bias)
            q, k, v = joint.unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
            return q, k, v
        return self._project_query(query), *self._project_keys(key, value)

    def _project_query(self, query: Tensor) -> Tensor:
        size = self.num_heads * self.head_dim  # less than embed_dim where heads were pruned
        weight = self.in_proj_weight[:size] if self._qkv_same_embed_dim else self.q_proj_weight
        bias = None if self.in_proj_bias is None else self.in_proj_bias[:size]
        return F.linear(query, weight, bias).unflatten(-1, (self.num_heads, self.head_dim))

    def _project_keys(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        size = self.num_heads * self.head_dim  # less than embed_dim where heads were pruned
        bias = None if self.in_proj_bias is None else self.in_proj_bias[size:]
        if self._qkv_same_embed_dim and key is value:
            joint = F.linear(key, self.in_proj_weight[size:], bias)
            k, v = joint.unflatten(-1, (2, self.num_heads, self.head_dim)).unbind(-3)
            return k, v
        if self._qkv_same_embed_dim:
            _, weight_k, weight_v = self.in_proj_weight.chunk(3)
        else:
            weight_k, weight_v = self.k_proj_weight, self.v_proj_weight
        bias_k, bias_v = (None, None) if bias is None else bias.chunk(2)
        k, v = F.linear(key, weight_k, bias_k), F.linear(value, weight_v, bias_v)
        return k.unflatten(-1, (self.num_heads, self.head_dim)), v.unflatten(-1, (self.num_heads, self.head_dim))

    def _append_keys(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
        """The keys and values of add_bias_kv and add_zero_attn behind [batch, heads, seqlen, head_dim]; how many."""
        extra_k, extra_v = [k], [v]
        shape = (k.shape[0], self.num_heads, 1, self.head_dim)
        if self.bias_k is not None and self.bias_v is not None:
            for parts, bias in ((extra_k, self.bias_k), (extra_v, self.bias_v)):
                parts.append(bias.view(1, self.num_heads, 1, self.head_dim).to(k.dtype).expand(shape))
        if self.add_zero_attn:
            extra_k.append(k.new_zeros(shape))
            extra_v.append(v.new_zeros(shape))
        return torch.cat(extra_k, 2), torch.cat(extra_v, 2), len(extra_k) - 1

    def _project_out(self, out: Tensor, seq_first: bool) -> Tensor:
        """[batch, heads, seqlen, head_dim] to [batch, seqlen, embed] or, with seq_first, [seqlen, batch, embed]."""
        joined = (out.permute(2, 0, 1, 3) if seq_first else out.transpose(1, 2)).flatten(2)
        # As in torch.nn the output projection's parameters are read, its forward is not called.
        return F.linear(joined, self.out_proj.weight, self.out_proj.bias)


def _heads_first(tensor: Tensor, seq_first: bool) -> Tensor:
    """[batch, seqlen, heads, head_dim] (or [seqlen, batch, ...]) to [batch, heads, seqlen, head_dim], a view."""
    return tensor.permute(1, 2, 0, 3) if seq_first else tensor.transpose(1, 2)


def _each_once(function: Callable[[Tensor], Tensor], *tensors: Tensor) -> list[Tensor]:
    """function of each, the same result for the same tensor."""
    results = {id(t): function(t) for t in tensors}
    return [results[id(t)] for t in tensors]
