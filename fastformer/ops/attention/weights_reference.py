"""Attention maps from the LSE and their derivative in PyTorch operations, one head at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastformer.ops.attention.options import Options
from fastformer.ops.attention.packed_reference import pad_packed, unpad_packed
from fastformer.ops.attention.reference import attention_scores, finite
from fastformer.ops.random import keep_scale, philox_keep


@dataclass(frozen=True)
class Places:
    """What all heads of a call share: boundaries and longest lengths of packed sequences, the wanted rows, dropout's
    seed, the options."""

    cu_q: Tensor | None
    cu_k: Tensor | None
    max_q: int
    max_k: int
    rows: Tensor | None
    seed: Tensor | None
    options: Options

    def dense(self, query: Tensor, key: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, H, Sq, D), (B, Hk, Sk, D) and (B, H, Sq) of packed tensors, padded; dense ones as they are."""
        if self.cu_q is None or self.cu_k is None:
            return query, key, lse
        return (
            pad_packed(query, self.cu_q, self.max_q),
            pad_packed(key, self.cu_k, self.max_k),
            pad_packed(lse.unsqueeze(-1), self.cu_q, self.max_q).squeeze(-1),
        )


@dataclass(frozen=True)
class _Head:
    """One head: its map and what its derivative needs; R the wanted rows."""

    weights: Tensor  # [B, 1, R, Sk], before dropout
    kept: Tensor | None  # what dropout keeps
    hidden: Tensor
    query: Tensor  # [B, 1, R, D]
    key: Tensor  # [B, 1, Sk, D]
    row: Tensor  # [R], within the sequence


def weights_reference(
    query: Tensor, key: Tensor, lse: Tensor, mask: Tensor | None, slopes: Tensor | None, average: bool, places: Places
) -> Tensor:
    """The maps of `attention_weights`, differentiable by autograd; mask is 4-D."""
    query, key, lse = places.dense(query, key, lse)
    heads, options = query.shape[1], places.options
    shape = (query.shape[0], query.shape[2] if places.rows is None else places.rows.numel(), key.shape[2])
    parts: list[Tensor] = []
    for head in range(heads):
        found = _head(head, heads, _inputs(head, (query, key, lse, mask, slopes)), places)
        weights = found.weights
        if found.kept is not None:
            weights = torch.where(found.kept, weights * keep_scale(options.dropout_p), 0.0)
        if average and parts:
            parts[0] = parts[0] + weights
        else:
            parts.append(weights)
    if not parts:
        return query.new_zeros(shape if average else (shape[0], 0, *shape[1:]), dtype=_wide(query))
    return parts[0].squeeze(1) / heads if average else torch.cat(parts, 1)


def weights_gradients(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    slopes: Tensor | None,
    grad: Tensor,
    average: bool,
    of_mask: bool,
    of_slopes: bool,
    places: Places,
) -> list[Tensor | None]:
    """Gradients of query, key, lse and, where asked for, mask and slopes, else None.

    With P the map and G what is sent to it: dS = P * G, dLSE = -rowsum(dS).
    """
    whole: list[Any] = [*places.dense(query, key, lse), mask, slopes]
    wanted = [True, True, True, of_mask, of_slopes]
    sums: list[Any] = [
        torch.zeros(x.shape, dtype=_wide(query), device=x.device) if w else None
        for x, w in zip(whole, wanted, strict=True)
    ]
    options, heads, length = places.options, whole[0].shape[1], whole[0].shape[2]
    for head in range(heads if length else 0):
        one = _head(head, heads, _inputs(head, whole), places)
        dq, dk, dlse, dmask, dslopes = _inputs(head, sums)
        sent = grad.unsqueeze(1) / heads if average else grad[:, head : head + 1]
        if one.kept is not None:
            sent = torch.where(one.kept, sent * keep_scale(options.dropout_p), 0.0)
        scores = torch.where(one.hidden, 0.0, one.weights * sent)
        index = one.row.clamp(0, length - 1)
        dlse.index_add_(2, index, -scores.sum(-1))
        if dmask is not None:
            by_row = scores if dmask.shape[2] == 1 else torch.zeros_like(scores[:, :, :1]).expand(-1, -1, length, -1)
            if dmask.shape[2] > 1:
                by_row = by_row.contiguous().index_add_(2, index, scores)
            dmask += by_row.sum_to_size(dmask.shape)
        if dslopes is not None:
            shift: int | Tensor = 0
            if options.bottom_right:
                shift = whole[1].shape[2] - length
                if places.cu_q is not None and places.cu_k is not None:
                    shift = (places.cu_k.diff() - places.cu_q.diff()).view(-1, 1, 1, 1)
            column = torch.arange(scores.shape[-1], device=scores.device)
            distance = (one.row.view(-1, 1) + shift - column).abs()
            dslopes -= (scores * distance).sum((2, 3)).sum_to_size(dslopes.shape)
        if options.softcap:
            bent = torch.tanh(one.query @ one.key.mT * (options.scale / options.softcap))
            scores = scores * (1.0 - bent * bent)
        dq.index_add_(2, index, scores @ one.key * options.scale)
        dk += scores.mT @ one.query * options.scale
    if places.cu_q is not None and places.cu_k is not None:
        for i, cu, tokens in ((0, places.cu_q, len(query)), (1, places.cu_k, len(key)), (2, places.cu_q, len(lse))):
            padded = sums[i] if i < 2 else sums[i].unsqueeze(-1)
            flat = (
                unpad_packed(padded, cu, tokens, 0.0) if padded.numel() else padded.new_zeros(tokens, *query.shape[1:])
            )
            sums[i] = flat if i < 2 else flat[..., 0]
    given = (query, key, lse, mask, slopes)
    return [None if x is None or y is None else x.to(y.dtype) for x, y in zip(sums, given, strict=True)]


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


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


def _head(head: int, heads: int, inputs: Sequence[Any], places: Places) -> _Head:
    """One head from what `_inputs` returns."""
    query, key, lse, mask, slopes = inputs
    options, batch, length, dtype = places.options, query.shape[0], query.shape[2], _wide(query)
    row = torch.arange(length, device=query.device) if places.rows is None else places.rows
    there = ((row >= 0) & (row < length)).view(-1, 1)
    if places.rows is not None:
        # A row too many, so that there is one to select even from an empty sequence.
        index = torch.where(there.view(-1), row, length)
        query = torch.nn.functional.pad(query, (0, 0, 0, 1)).index_select(2, index)
        lse = torch.nn.functional.pad(lse, (0, 1)).index_select(2, index)
        if mask is not None and mask.shape[2] > 1:
            mask = torch.nn.functional.pad(mask, (0, 0, 0, 1)).index_select(2, index)
    q, bad_q = finite(query.to(dtype))
    k, bad_k = finite(key.to(dtype))
    ends_q, ends_k = (None if cu is None else cu.diff() for cu in (places.cu_q, places.cu_k))
    scores = attention_scores(q, k, options, mask, slopes, ends_q, ends_k, (bad_q, bad_k), row, length)
    norm = lse.to(dtype).unsqueeze(-1)
    hidden = (scores == -torch.inf) | (norm == -torch.inf) | ~there
    # Finite stand-ins: the derivative of what is selected away must be a number too.
    difference = torch.where(hidden, 0.0, scores) - torch.where(norm == -torch.inf, 0.0, norm)
    weights = torch.where(hidden, 0.0, torch.exp(torch.where(hidden, 0.0, difference)))
    kept = None
    if options.dropout_p and places.seed is not None:
        plane = (torch.arange(batch, device=query.device) * heads + head).view(-1, 1, 1, 1)
        column = torch.arange(key.shape[2], device=query.device)
        counted = row.clamp(min=0).view(-1, 1)
        kept = philox_keep(places.seed.reshape(()), column, counted, plane, options.dropout_p, draws=4)
    return _Head(weights, kept, hidden, q, k, row)
