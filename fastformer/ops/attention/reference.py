"""Attention in differentiable PyTorch operations: the reference of every kernel, and the torch backend's general path.

- Computes in fp32, or in fp64 for fp64 inputs; every derivative of every order comes from autograd.
- A row with nothing to attend to gives output 0, LSE -inf and gradient 0.
- NaN and Inf in a masked-out position reach neither output nor gradient: such elements take no part in a matrix
  product (0 * NaN is NaN), and the rows that do attend to them turn NaN in the scores instead.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastformer.ops.attention.options import OPEN, Options
from fastformer.ops.random import keep_scale, philox_keep


def attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    options: Options,
    attn_mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_seed: Tensor | None = None,
    query_lengths: Tensor | None = None,
    key_lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(rules(scale * Q K^T)) V; the rules are in `fastformer.ops.attention.options`.

    Args:
        query: (B, H, Sq, D); key: (B, Hk, Sk, D), Hk divides H; value: (B, Hk, Sk, Dv).
        attn_mask: bool (True: attend) or float (added), broadcasts to (B, H, Sq, Sk).
        alibi_slopes: (H,) or (B, H); sinks: (H,).
        dropout_seed: int64, one element: the mask is `philox_keep(seed, key, query, batch * H + head, draws=4)`. None
            draws it from PyTorch's generator.
        query_lengths, key_lengths: (B,) integers, for sequences that fill their row only in part.

    Returns:
        output (B, H, Sq, Dv) in query's dtype; LSE (B, H, Sq) in the dtype of the computation.
    """
    batch, heads, q_len, _ = query.shape
    k_len = key.shape[2]
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    q, k, v = query.to(dtype), key.to(dtype), value.to(dtype)
    if key.shape[1] != heads:
        groups = heads // key.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    q, bad_q = finite(q)
    k, bad_k = finite(k)
    v, bad_v = finite(v)

    scores = attention_scores(
        q, k, options, attn_mask, alibi_slopes, query_lengths, key_lengths, poison=(bad_q, bad_k | bad_v)
    )

    peak = scores.detach().amax(-1, keepdim=True) if k_len else scores.new_full((batch, heads, q_len, 1), -torch.inf)
    sink = None if sinks is None else sinks.to(dtype).view(heads, 1, 1)
    if sink is not None:
        peak = torch.maximum(peak, sink.detach())
    peak = torch.where(peak == -torch.inf, 0.0, peak)
    weights = torch.exp(scores - peak)
    total = weights.sum(-1, keepdim=True)
    if sink is not None:
        total = total + torch.exp(sink - peak)
    empty = total == 0
    total = torch.where(empty, 1.0, total)
    lse = torch.where(empty, -torch.inf, torch.log(total) + peak).squeeze(-1)
    weights = weights / total
    if options.dropout_p:
        weights = _drop(weights, options.dropout_p, dropout_seed)
    return (weights @ v).to(query.dtype), lse


def attention_scores(
    query: Tensor,
    key: Tensor,
    options: Options,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    query_lengths: Tensor | None = None,
    key_lengths: Tensor | None = None,
    poison: tuple[Tensor, Tensor] | None = None,
    rows: Tensor | None = None,
    length: int | None = None,
) -> Tensor:
    """Scores (B, H, Sq, Sk) by the rules, -inf where hidden.

    Args:
        query: (B, H, Sq, D); key: (B, H, Sk, D), in the dtype of the computation.
        poison: (B, H, Sq, 1) and (B, H, Sk, 1) bool: queries and keys whose scores are NaN.
        rows: (Sq,) positions of the queries in a sequence of `length`, if they are a selection.
    """
    dtype = query.dtype
    q_len, k_len, heads = query.shape[2] if length is None else length, key.shape[2], query.shape[1]
    row = (torch.arange(q_len, device=query.device) if rows is None else rows).view(-1, 1)
    column = torch.arange(k_len, device=query.device)
    kl: Tensor | int = k_len if key_lengths is None else key_lengths.view(-1, 1, 1, 1)
    ql: Tensor | int = q_len if query_lengths is None else query_lengths.view(-1, 1, 1, 1)
    place = row + (kl - ql) if options.bottom_right else row

    scores = (query @ key.transpose(-1, -2)) * options.scale
    if options.softcap:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        scores = scores + attn_mask.to(dtype)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(dtype).view(-1, heads, 1, 1) * (place - column).abs()
    if poison is not None:
        scores = torch.where(poison[0] | poison[1].transpose(-1, -2), torch.nan, scores)
    hidden = hidden_places(options, place, column, row, query_lengths, key_lengths)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        hidden = ~attn_mask if hidden is None else hidden | ~attn_mask
    return scores if hidden is None else scores.masked_fill(hidden, -torch.inf)


def hidden_places(
    options: Options,
    place: Tensor,
    column: Tensor,
    row: Tensor,
    query_lengths: Tensor | None,
    key_lengths: Tensor | None,
) -> Tensor | None:
    """True where (query place, key column) is out of reach, whatever the attn_mask says; None if nothing is."""
    parts = []
    if options.is_causal:
        parts.append(column > place)
    if options.left != OPEN:
        parts.append(column < place - options.left)
    if options.right != OPEN:
        parts.append(column > place + options.right)
    if key_lengths is not None:
        parts.append(column >= key_lengths.view(-1, 1, 1, 1))
    if query_lengths is not None:
        parts.append(row >= query_lengths.view(-1, 1, 1, 1))
    hidden = None
    for part in parts:
        hidden = part if hidden is None else hidden | part
    return hidden


def finite(x: Tensor) -> tuple[Tensor, Tensor]:
    """(x with 0 for what is not finite, which rows hold such elements)."""
    good = torch.isfinite(x)
    return torch.where(good, x, 0.0), ~good.all(-1, keepdim=True)


def _drop(weights: Tensor, p: float, seed: Tensor | None) -> Tensor:
    batch, heads, q_len, k_len = weights.shape
    if seed is None:
        return torch.nn.functional.dropout(weights, p)
    device = weights.device
    plane = torch.arange(batch * heads, device=device).view(batch, heads, 1, 1)
    row, column = torch.arange(q_len, device=device).view(-1, 1), torch.arange(k_len, device=device)
    keep = philox_keep(seed.reshape(()), column, row, plane, p, draws=4)
    return torch.where(keep, weights * keep_scale(p), 0.0)
