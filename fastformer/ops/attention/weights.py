"""Attention maps on request: recomputed from the LSE, one head at a time, so that B·H·S² is never held unless asked."""

from __future__ import annotations

from typing import Any

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
    read_options,
)
from fastformer.ops.attention.weights_reference import Places, weights_gradients, weights_reference
from fastformer.ops.backend import backend_for
from fastformer.ops.operator import Kernel, Operator, differentiate, kernels
from fastformer.ops.validate import FLOATS, check_tensor


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
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
) -> Tensor:
    """The probabilities exp(score - lse) of `scaled_dot_product_attention` or, with cu_seqlens, `attention_varlen`.

    Differentiable in query, key, lse, a float attn_mask and the slopes; with the LSE's own derivative that is the
    derivative of the softmax. The backward pass recomputes one head at a time in PyTorch operations.

    Args:
        query: (B, H, Sq, D), or packed (T, H, D); key: (B, Hk, Sk, D), or (Tk, Hk, D); the options as in the call that
            returned the LSE.
        lse: (B, H, Sq), or packed (T, H), fp32, from return_lse=True; with sinks in it, the weights sum to less than 1.
        average_heads: average over the heads (memory B·Sq·Sk), or keep them.
        rows: int64 (R,), the query rows wanted, or None for all; one outside a sequence gives 0.
        dropout_p: with the dropout_seed of that call: what dropout left of the probabilities, as they met the values.
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k: of packed sequences, all or none.

    Returns:
        fp32 (B, R, Sk), or (B, H, R, Sk) with average_heads=False; R is Sq without `rows`. Rows with nothing to attend
        to are 0. Packed: Sq and Sk are the longest lengths, and what lies behind a sequence's end is 0.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """
    check_tensor("query", query, ndim=4 if cu_seqlens_q is None else 3)
    check_heads(query, key, key, 1, enable_gqa)
    heads, head_dim = query.shape[1], query.shape[-1]
    if (cu_seqlens_q is None) != (cu_seqlens_k is None):
        raise ValueError("cu_seqlens_q and cu_seqlens_k must both be given or both be None")
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        batch = check_boundaries(query, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        check_boundary_values(query, key, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        lengths = (max_seqlen_q, max_seqlen_k)
        shape: tuple[int, ...] = (query.shape[0], heads)
    else:
        batch, lengths = query.shape[0], (query.shape[2], key.shape[2])
        shape = (batch, heads, lengths[0])
        if key.shape[0] != batch:
            raise ValueError(f"key must have query's batch size {batch}, got {key.shape[0]}")
    check_tensor("lse", lse, dtypes=(torch.float32, torch.float64), shape=shape, device=query.device)
    check_extras(query, heads, batch, alibi_slopes, None, dropout_seed)
    check_mask(attn_mask, query, (batch, heads, *lengths))
    options = read_options(head_dim, dropout_p, is_causal, scale, causal_alignment, window, softcap)
    if rows is not None:
        check_tensor("rows", rows, ndim=1, dtypes=(torch.int64,), device=query.device)
    if options.dropout_p and dropout_seed is None:
        raise ValueError("dropout_seed must be the one of the call that returned the LSE, got None")
    if attn_mask is not None:
        attn_mask = attn_mask[(None,) * (4 - attn_mask.ndim)]
    arguments = (
        query, key, lse, cu_seqlens_q, cu_seqlens_k, *lengths, attn_mask, alibi_slopes, dropout_seed, rows,
        average_heads, options.dropout_p, options.is_causal, options.scale, options.bottom_right, options.left,
        options.right, options.softcap,
    )  # fmt: skip
    if kernel.has_tangent(query, key, lse, attn_mask, alibi_slopes):
        kernel.say_once("a forward-mode derivative")
        return _composed(*arguments)
    return _weights(*arguments)


def _composed(
    query: Tensor, key: Tensor, lse: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, max_q: int, max_k: int,
    mask: Tensor | None, slopes: Tensor | None, seed: Tensor | None, rows: Tensor | None, average: bool, *numbers: Any,
) -> Tensor:  # fmt: skip
    places = Places(cu_q, cu_k, max_q, max_k, rows, seed, Options(*numbers))
    return weights_reference(query, key, lse, mask, slopes, average, places)


def _forward(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    max_q: int,
    max_k: int,
    mask: Tensor | None,
    slopes: Tensor | None,
    seed: Tensor | None,
    rows: Tensor | None,
    average: bool,
    dropout_p: float,
    causal: bool,
    scale: float,
    bottom_right: bool,
    left: int,
    right: int,
    softcap: float,
) -> Tensor:
    numbers = (dropout_p, causal, scale, bottom_right, left, right, softcap)
    if backend_for(query.device) != "triton" or query.dtype not in FLOATS or query.shape[-1] == 0:
        with torch.no_grad():
            return _composed(query, key, lse, cu_q, cu_k, max_q, max_k, mask, slopes, seed, rows, average, *numbers)
    query, key = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key))
    slopes = None if slopes is None else slopes.contiguous()
    rows = None if rows is None else rows.contiguous()
    lse = (lse if cu_q is None else lse.t()).contiguous().float()
    call = kernel.make_call((query, key, key, cu_q, cu_k, mask, slopes, None, seed), (max_q, max_k, *numbers))
    return kernels("attention.weights").attention_weights(call, lse, rows, average)


def _fake(
    query: Tensor, key: Tensor, lse: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, max_q: int, max_k: int,
    mask: Tensor | None, slopes: Tensor | None, seed: Tensor | None, rows: Tensor | None, average: bool, *numbers: Any,
) -> Tensor:  # fmt: skip
    batch = query.shape[0] if cu_q is None else cu_q.shape[0] - 1
    q_len, k_len = (query.shape[2], key.shape[2]) if cu_q is None else (max_q, max_k)
    count = q_len if rows is None else rows.shape[0]
    shape = (batch, count, k_len) if average else (batch, query.shape[1], count, k_len)
    return query.new_empty(shape, dtype=torch.float64 if query.dtype == torch.float64 else torch.float32)


def _backward(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    mask: Tensor | None,
    slopes: Tensor | None,
    seed: Tensor | None,
    rows: Tensor | None,
    grad: Tensor,
    of_mask: bool,
    of_slopes: bool,
    max_q: int,
    max_k: int,
    average: bool,
    dropout_p: float,
    causal: bool,
    scale: float,
    bottom_right: bool,
    left: int,
    right: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, lse, mask and slopes, the last two empty unless asked for."""
    numbers = (dropout_p, causal, scale, bottom_right, left, right, softcap)
    places = Places(cu_q, cu_k, max_q, max_k, rows, seed, Options(*numbers))
    found = weights_gradients(query, key, lse, mask, slopes, grad, average, of_mask, of_slopes, places)
    dq, dk, dlse, dmask, dslopes = (query.new_empty(0) if x is None else x for x in found)
    return dq, dk, dlse, dmask, dslopes


def _fake_backward(
    query: Tensor, key: Tensor, lse: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, mask: Tensor | None,
    slopes: Tensor | None, seed: Tensor | None, rows: Tensor | None, grad: Tensor, of_mask: bool, of_slopes: bool,
    *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    extras = (x if w else None for x, w in ((mask, of_mask), (slopes, of_slopes)))
    made = (query.new_empty(0) if x is None else x.new_empty(x.shape) for x in extras)
    return *(x.new_empty(x.shape) for x in (query, key, lse)), *made


_backward_kernel = Kernel("attention_weights_backward", _backward, _fake_backward)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, lse, cu_q, cu_k, max_q, max_k, mask, slopes, seed, rows, *numbers = inputs
    ctx.save_for_backward(query, key, lse, cu_q, cu_k, mask, slopes, seed, rows)
    ctx.numbers = max_q, max_k, *numbers


def _run_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    of_mask, of_slopes = ctx.needs_input_grad[7], ctx.needs_input_grad[8]
    dq, dk, dlse, dmask, dslopes = _backward_kernel(*ctx.saved_tensors, grad, of_mask, of_slopes, *ctx.numbers)
    extras = (dmask if of_mask else None, dslopes if of_slopes else None)
    return dq, dk, dlse, *[None] * 4, *extras, *[None] * 10


def _second(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    query, key, lse, cu_q, cu_k, mask, slopes, seed, rows = ctx.saved_tensors
    max_q, max_k, average, *numbers = ctx.numbers
    places = Places(cu_q, cu_k, max_q, max_k, rows, seed, Options(*numbers))

    def reference(query: Tensor, key: Tensor, lse: Tensor, mask: Tensor | None, slopes: Tensor | None) -> Tensor:
        return weights_reference(query, key, lse, mask, slopes, average, places)

    tensors = (query, key, lse, mask, slopes)
    dq, dk, dlse, dmask, dslopes = differentiate("attention_weights", reference, tensors, (grad,))
    return dq, dk, dlse, *[None] * 4, dmask, dslopes, *[None] * 10


_weights = Operator("attention_weights", _forward, _fake, _setup, _run_backward, _second)
