"""Attention over packed sequences: tokens of all sequences in one row, no padding."""

from __future__ import annotations

import torch
from torch import Tensor

from fastformer.ops.attention import kernel
from fastformer.ops.attention.options import (
    Options,
    check_boundaries,
    check_boundary_values,
    check_extras,
    check_heads,
    check_mask,
    once,
    read_options,
)
from fastformer.ops.attention.packed_cpu import attend_on_cpu, takes
from fastformer.ops.attention.packed_reference import varlen_reference
from fastformer.ops.backend import autocast_dtype, backend_for
from fastformer.ops.validate import check_tensor


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    attn_mask: Tensor | None = None,
    causal_alignment: str = "top-left",
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    dropout_seed: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of every packed sequence to itself (or to the packed sequence of the same number in key).

    Sequence i has queries `query[cu_seqlens_q[i]:cu_seqlens_q[i + 1]]` and keys
    `key[cu_seqlens_k[i]:cu_seqlens_k[i + 1]]`; either may be empty. Tokens after the last boundary, if the tensors are
    longer, get output 0 and gradient 0. Options mean what they mean in `scaled_dot_product_attention`, within each
    sequence.

    Args:
        query: (T, H, D) in fp32, fp16, bf16 (or fp64 on the CPU); key: (Tk, Hk, D); value: (Tk, Hk, Dv). Any strides
            with a last one of 1 are read in place.
        cu_seqlens_q, cu_seqlens_k: int32 (B + 1,), on query's device, from 0, never falling, within the tensor.
        max_seqlen_q, max_seqlen_k: length of the longest sequence, or more; plain ints, so that nothing waits for the
            device. Smaller than a sequence is undefined on a GPU and an error on the CPU.
        attn_mask: bool or float, 2-D to 4-D, broadcasts to (B, H, max_seqlen_q, max_seqlen_k): row i and column j are
            places within a sequence, as T5's relative position bias needs them. Float: added, and gets a gradient.
        alibi_slopes: (H,) or (B, H); get a gradient.
        dropout_seed: int64 of one element; None draws one from PyTorch's generator.

    Returns:
        output (T, H, Dv); with return_lse also the log-sum-exp of every row, (T, H) in fp32, -inf where a row has
        nothing to attend to.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """

    longest = (max_seqlen_q, max_seqlen_k)
    numbers = (longest, dropout_p, is_causal, scale, enable_gqa, causal_alignment, window, softcap, return_lse)
    bounds = (cu_seqlens_q, cu_seqlens_k)
    given = (query, key, value, *bounds, attn_mask, alibi_slopes, sinks, dropout_seed)
    mark, known = kernel.find(numbers, *given)
    if known is not None:
        check_boundary_values(query, key, *bounds, *longest)
        return kernel.repeat(known, dropout_p, *given)

    def check() -> Options:
        check_tensor("query", query, ndim=3)
        check_heads(query, key, value, 1, enable_gqa)
        options = read_options(query.shape[-1], dropout_p, is_causal, scale, causal_alignment, window, softcap)
        batch = check_boundaries(query, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        check_extras(query, query.shape[1], batch, alibi_slopes, sinks, dropout_seed)
        check_mask(attn_mask, query, (batch, query.shape[1], max_seqlen_q, max_seqlen_k))
        return options

    options = once(check, given, ("packed", *numbers))
    check_boundary_values(query, key, *bounds, *longest)
    lower = autocast_dtype(query.device)
    if lower not in (None, query.dtype) and query.dtype != torch.float64:
        query, key, value, mark = query.to(lower), key.to(lower), value.to(lower), None
    extras = (attn_mask, alibi_slopes, sinks, dropout_seed)
    if backend_for(query.device) == "triton":
        reason = kernel.why_not(query, value, key, attn_mask, alibi_slopes, sinks)
        if reason is None:
            return kernel.attend(mark, (query, key, value, *bounds, *extras), longest, options, return_lse)
        kernel.say_once(reason)
    short = query.device.type == "cpu" and not return_lse and all(x is None for x in extras[1:])
    if short and not kernel.has_tangent(query, key, value, attn_mask) and takes(options, attn_mask):
        return attend_on_cpu(query, key, value, *bounds, options, attn_mask, longest)
    out, lse = varlen_reference(query, key, value, *bounds, *longest, options, *extras)
    return (out, lse) if return_lse else out
