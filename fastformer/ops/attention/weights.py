"""Attention maps on request: recomputed from the LSE, one head at a time, so that B·H·S² is never held unless asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastformer.ops.attention import kernel
from fastformer.ops.attention.options import (
    Options,
    check_boundaries,
    check_extras,
    check_heads,
    check_mask,
    read_options,
)
from fastformer.ops.attention.packed_reference import pad_packed
from fastformer.ops.attention.reference import attention_scores, finite
from fastformer.ops.backend import backend_for
from fastformer.ops.operator import Kernel, Operator
from fastformer.ops.random import keep_scale, philox_keep
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
        batch = check_boundaries(query, key, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
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
    *numbers: Any,
) -> Tensor:
    """The maps in differentiable PyTorch operations."""
    places = _Places(cu_q, cu_k, max_q, max_k, rows, seed, Options(*numbers))
    query, key, lse = places.dense(query, key, lse)
    heads = query.shape[1]
    shape = (query.shape[0], query.shape[2] if rows is None else rows.numel(), key.shape[2])
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    parts = [_head(head, heads, _inputs(head, (query, key, lse, mask, slopes)), places) for head in range(heads)]
    if not parts:
        return query.new_zeros(shape if average else (shape[0], 0, *shape[1:]), dtype=dtype)
    if not average:
        return torch.cat(parts, 1)
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total.squeeze(1) / heads


class _Places:
    """What all heads of a call share."""

    def __init__(
        self,
        cu_q: Tensor | None,
        cu_k: Tensor | None,
        max_q: int,
        max_k: int,
        rows: Tensor | None,
        seed: Tensor | None,
        options: Options,
    ) -> None:
        self.cu_q, self.cu_k, self.max_q, self.max_k = cu_q, cu_k, max_q, max_k
        self.rows, self.seed, self.options = rows, seed, options

    def dense(self, query: Tensor, key: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, H, Sq, D), (B, Hk, Sk, D) and (B, H, Sq) of packed tensors, padded; dense ones as they are."""
        if self.cu_q is None or self.cu_k is None:
            return query, key, lse
        return (
            pad_packed(query, self.cu_q, self.max_q),
            pad_packed(key, self.cu_k, self.max_k),
            pad_packed(lse.unsqueeze(-1), self.cu_q, self.max_q).squeeze(-1),
        )


def _inputs(head: int, whole: Sequence[Any]) -> list[Any]:
    """One head's part of (query, key, lse, mask or None, slopes or None)."""
    query, key, lse, mask, slopes = whole
    one = slice(head, head + 1)
    shared = head // (query.shape[1] // max(1, key.shape[1]))
    return [
        query[:, one],
        key[:, shared : shared + 1],
        lse[:, one],
        mask if mask is None or mask.shape[1] == 1 else mask[:, one],
        None if slopes is None else slopes[..., one],
    ]


def _head(head: int, heads: int, inputs: Sequence[Any], places: _Places) -> Tensor:
    """The map (B, 1, R, Sk) of one head, from what `_inputs` returns."""
    query, key, lse, mask, slopes = inputs
    options, batch, length = places.options, query.shape[0], query.shape[2]
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    row = torch.arange(length, device=query.device) if places.rows is None else places.rows
    there = ((row >= 0) & (row < length)).view(-1, 1)
    if places.rows is not None and length:
        index = row.clamp(0, length - 1)
        query, lse = query.index_select(2, index), lse.index_select(2, index)
        if mask is not None and mask.shape[2] > 1:
            mask = mask.index_select(2, index)
    elif places.rows is not None:
        return query.new_zeros((batch, 1, row.numel(), key.shape[2]), dtype=dtype)
    q, bad_q = finite(query.to(dtype))
    k, bad_k = finite(key.to(dtype))
    ends_q, ends_k = (None if cu is None else cu.diff() for cu in (places.cu_q, places.cu_k))
    scores = attention_scores(q, k, options, mask, slopes, ends_q, ends_k, (bad_q, bad_k), row, length)
    norm = lse.to(dtype).unsqueeze(-1)
    hidden = (scores == -torch.inf) | (norm == -torch.inf) | ~there
    # Finite stand-ins: the derivative of what is selected away must be a number too.
    difference = torch.where(hidden, 0.0, scores) - torch.where(norm == -torch.inf, 0.0, norm)
    weights = torch.where(hidden, 0.0, torch.exp(torch.where(hidden, 0.0, difference)))
    if options.dropout_p and places.seed is not None:
        plane = (torch.arange(batch, device=query.device) * heads + head).view(-1, 1, 1, 1)
        column = torch.arange(key.shape[2], device=query.device)
        keep = philox_keep(
            places.seed.reshape(()), column, row.clamp(min=0).view(-1, 1), plane, options.dropout_p, draws=4
        )
        weights = torch.where(keep, weights * keep_scale(options.dropout_p), 0.0)
    return weights


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
            return _composed(
                query, key, lse, cu_q, cu_k, max_q, max_k, mask, slopes, seed, rows, average, *numbers
            )  # fmt: skip
    from fastformer.kernels.attention.weights import attention_weights as launch

    query, key = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key))
    slopes = None if slopes is None else slopes.contiguous()
    rows = None if rows is None else rows.contiguous()
    lse = (lse if cu_q is None else lse.t()).contiguous().float()
    call = kernel.make_call((query, key, key, cu_q, cu_k, max_q, max_k, mask, slopes, None, seed), numbers)
    return launch(call, lse, rows, average)


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
    options = Options(dropout_p, causal, scale, bottom_right, left, right, softcap)
    places = _Places(cu_q, cu_k, max_q, max_k, rows, seed, options)
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in (query, key, lse)]
        padded = places.dense(*leaves)
    whole: list[Any] = [*(x.detach() for x in padded), mask, slopes]
    wanted = [True, True, True, of_mask, of_slopes]
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    sums: list[Any] = [
        torch.zeros(x.shape, dtype=wide, device=x.device) if w else None for x, w in zip(whole, wanted, strict=True)
    ]
    heads = padded[0].shape[1]
    for head in range(heads):
        own = [x.detach().requires_grad_() if w else x for x, w in zip(_inputs(head, whole), wanted, strict=True)]
        asked = [x for x, w in zip(own, wanted, strict=True) if w]
        with torch.enable_grad():
            part = _head(head, heads, own, places)
        sent = grad.unsqueeze(1) / heads if average else grad[:, head : head + 1]
        found = torch.autograd.grad(part, asked, sent, allow_unused=True) if part.requires_grad else ()
        # The same part of the sums as of the tensors.
        for total, share in zip((x for x in _inputs(head, sums) if x is not None), found, strict=False):
            if share is not None:
                total += share
    sums = [x if x is None else x.to(y.dtype) for x, y in zip(sums, whole, strict=True)]
    if cu_q is not None:
        sums[:3] = torch.autograd.grad(padded, leaves, sums[:3])
    dq, dk, dlse, dmask, dslopes = (query.new_empty(0) if x is None else x for x in sums)
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
    kernel.say_once("a second derivative")
    query, key, lse, cu_q, cu_k, mask, slopes, seed, rows = ctx.saved_tensors
    max_q, max_k, *numbers = ctx.numbers
    out = _composed(query, key, lse, cu_q, cu_k, max_q, max_k, mask, slopes, seed, rows, *numbers)
    inputs = (query, key, lse, mask, slopes)
    wanted = [x for x in inputs if x is not None and x.requires_grad]
    found = iter(torch.autograd.grad(out, wanted, grad, create_graph=True, allow_unused=True))
    dq, dk, dlse, dmask, dslopes = (next(found) if x is not None and x.requires_grad else None for x in inputs)
    return dq, dk, dlse, *[None] * 4, dmask, dslopes, *[None] * 10


_weights = Operator("attention_weights", _forward, _fake, _setup, _run_backward, _second)
