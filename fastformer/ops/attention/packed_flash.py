"""Packed attention on the CPU through PyTorch's flash attention, sequence by sequence, for `packed_cpu`.

- Sequences are views, and one call if all are of one length; results are joined by one copy each. So a call costs two
  operators a sequence, forward and backward, where matrix products and a softmax cost five and eight: at 26 tokens and
  two heads the calls are most of the time.
- What backward needs is the output, which the layer after attention keeps as well, and a number a row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_forward = torch._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def takes(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, lengths_q: list[int], lengths_k: list[int]
) -> bool:
    """Whether sequences of these lengths may come here; they have no bias and no dropout, and what is masked is finite.

    Half precision may not: PyTorch rounds the weights to it. Causal sequences must have as many keys as queries.
    """
    if query.dtype not in (torch.float32, torch.float64) or query.shape[1] != key.shape[1]:
        return False
    if not query.numel() or not key.numel() or len(lengths_q) < 2:
        return False
    return query.shape[2] == value.shape[2] and (not is_causal or lengths_q[:-1] == lengths_k[:-1])


def forward(
    query: Tensor, key: Tensor, value: Tensor, lengths_q: list[int], lengths_k: list[int], is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Output (T, H, D), whose rows without keys are zero, and log-sum-exp of the scores (T, H).

    Lengths are the sequences', then what comes after the last.
    """
    sizes = _sizes(lengths_q, lengths_k)
    outs, sums = [], []
    for some, q, k, v in zip(sizes, _cut(query, sizes, 1), _cut(key, sizes, 2), _cut(value, sizes, 2), strict=True):
        if some[1] and some[2]:
            out, lse = _forward(q, k, v, 0.0, is_causal, scale=scale)
        else:
            out, lse = torch.zeros_like(q), q.new_zeros(q.shape[:3])
        outs.append(out.transpose(1, 2))
        sums.append(lse.transpose(1, 2))
    return _join(outs, sizes), _join(sums, sizes)


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    lengths_q: list[int],
    lengths_k: list[int],
    is_causal: bool,
    scale: float,
) -> list[Tensor]:
    """Gradients of query, key and value, from what `forward` gave and the gradient (T, H, D) of its output."""
    sizes = _sizes(lengths_q, lengths_k)
    cuts = [_cut(x, sizes, side) for x, side in ((grad, 1), (query, 1), (key, 2), (value, 2), (out, 1), (lse, 1))]
    grads_q, grads_k, grads_v = [], [], []
    for some, g, q, k, v, o, total in zip(sizes, *cuts, strict=True):
        if some[1] and some[2]:
            grad_q, grad_k, grad_v = _backward(g, q, k, v, o, total, 0.0, is_causal, scale=scale)
        else:
            grad_q, grad_k, grad_v = map(torch.zeros_like, (q, k, v))
        grads_q.append(grad_q.transpose(1, 2))
        grads_k.append(grad_k.transpose(1, 2))
        grads_v.append(grad_v.transpose(1, 2))
    return [_join(parts, sizes) for parts in (grads_q, grads_k, grads_v)]


def _sizes(lengths_q: list[int], lengths_k: list[int]) -> list[tuple[int, int, int]]:
    """(sequences, queries and keys of each) of the calls: one for all where all are alike, else one a sequence."""
    pairs = list(zip(lengths_q[:-1], lengths_k[:-1], strict=True))
    alike = len(pairs) > 1 and pairs.count(pairs[0]) == len(pairs)
    sizes = [(len(pairs), *pairs[0])] if alike else [(1, *pair) for pair in pairs]
    # What belongs to no sequence sees nothing, and nothing sees it.
    if lengths_q[-1]:
        sizes.append((1, lengths_q[-1], 0))
    if lengths_k[-1]:
        sizes.append((1, 0, lengths_k[-1]))
    return sizes


def _cut(x: Tensor, sizes: list[tuple[int, int, int]], side: int) -> Sequence[Tensor]:
    """(sequences, heads, tokens, ...) of every call, of a packed (T, heads, ...); nothing is copied."""
    if x.ndim == 3 and x.stride(2) != 1:
        x = x.contiguous()
    parts = x.transpose(0, 1)[None].split([some[0] * some[side] for some in sizes], 2)
    if all(some[0] == 1 for some in sizes):
        return parts
    return [
        part[0].unflatten(1, (some[0], some[side])).transpose(0, 1) for part, some in zip(parts, sizes, strict=True)
    ]


def _join(parts: list[Tensor], sizes: list[tuple[int, int, int]]) -> Tensor:
    """(T, heads, ...) of what calls made, (sequences, tokens, heads, ...) each."""
    if len(parts) == 1:
        return parts[0].flatten(0, 1)
    return torch.cat(
        [part.flatten(0, 1)[None] if some[0] > 1 else part for part, some in zip(parts, sizes, strict=True)], 1
    )[0]
