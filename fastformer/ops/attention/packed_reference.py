"""The reference over packed sequences."""

from __future__ import annotations

import torch
from torch import Tensor

from fastformer.ops.attention.options import Options
from fastformer.ops.attention.reference import attention_reference


def varlen_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    options: Options,
    attn_mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`attention_reference` over packed sequences, by way of padded ones; no host read of the boundaries.

    Args:
        attn_mask: broadcasts to (B, H, max_seqlen_q, max_seqlen_k), by places within the sequences.

    Returns:
        output (T, H, Dv) and LSE (T, H).
    """
    tokens_q, heads = query.shape[:2]
    lengths_q, lengths_k = cu_seqlens_q.diff(), cu_seqlens_k.diff()
    if not (tokens_q and lengths_q.numel() and max_seqlen_q):
        # Selected rather than made, so that a gradient of zero flows back.
        nothing = torch.where(torch.zeros((), dtype=torch.bool, device=query.device), query[..., :1], 0.0)
        return nothing.expand(-1, -1, value.shape[2]), query.new_full(
            (tokens_q, heads), -torch.inf, dtype=torch.float32
        )
    padded_q = pad_packed(query, cu_seqlens_q, max_seqlen_q)
    padded_k, padded_v = pad_packed(key, cu_seqlens_k, max_seqlen_k), pad_packed(value, cu_seqlens_k, max_seqlen_k)
    out, lse = attention_reference(
        padded_q, padded_k, padded_v, options, attn_mask, alibi_slopes, sinks, dropout_seed, lengths_q, lengths_k
    )
    return (
        unpad_packed(out, cu_seqlens_q, tokens_q, 0.0),
        unpad_packed(lse.unsqueeze(-1), cu_seqlens_q, tokens_q, -torch.inf).squeeze(-1),
    )


def unpad_packed(x: Tensor, cu_seqlens: Tensor, tokens: int, behind: float) -> Tensor:
    """(B, H, longest, D) -> (T, H, D), `behind` for tokens after the last boundary; B and longest at least 1."""
    batch, _, longest, _ = x.shape
    token = torch.arange(tokens, device=x.device)
    sequence = torch.searchsorted(cu_seqlens[1:], token, right=True)
    inside = (sequence < batch).view(-1, 1, 1)
    sequence = sequence.clamp(max=batch - 1)
    place = (token - cu_seqlens[sequence]).clamp(max=longest - 1)
    return torch.where(inside, x[sequence, :, place], behind)


def pad_packed(x: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    """(T, H, D) -> (B, H, longest, D), zeros behind each sequence."""
    start, end = cu_seqlens[:-1, None], cu_seqlens[1:, None]
    index = start + torch.arange(longest, device=x.device)
    inside = index < end
    index = torch.where(inside, index, 0)
    if not x.shape[0]:
        return x.new_zeros(index.shape[0], x.shape[1], longest, x.shape[2])
    return torch.where(inside[..., None, None], x[index], 0.0).transpose(1, 2)
