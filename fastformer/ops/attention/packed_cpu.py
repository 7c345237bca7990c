"""Packed attention on the CPU: one sequence at a time, softmax recomputed in the backward pass.

- At encoder lengths (10–256 tokens) plain batched matrix products over one sequence's heads beat the padded and the
  flash formulation two to three times in fp32, since a sequence's scores stay in the cache.
- Nothing of size S² outlives the call but the dropout mask, one byte an element. Scores are made for so many heads at
  a time that they fit `_SCRATCH_BYTES`.
- Half precision computes in fp32 and rounds once, at the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastformer.ops.attention.options import OPEN, Options
from fastformer.ops.attention.packed_reference import varlen_reference
from fastformer.ops.operator import Kernel, Operator, differentiate

_SCRATCH_BYTES = 32 << 20
# Dropout draws 16 bits an element: four from every 64-bit number of PyTorch's generator.
_DRAW_BITS = 16


def _pieces(query: Tensor, key: Tensor, cu_q: Tensor, cu_k: Tensor) -> Iterator[tuple[int, int, int, int, int, int]]:
    """(query start, query end, key start, key end, first key head, last) of every piece of work."""
    bounds_q, bounds_k = cu_q.tolist(), cu_k.tolist()
    heads, groups = key.shape[1], query.shape[1] // max(1, key.shape[1])
    for i in range(len(bounds_q) - 1):
        a, b, c, d = bounds_q[i], bounds_q[i + 1], bounds_k[i], bounds_k[i + 1]
        if b == a or d == c:
            continue
        step = max(1, _SCRATCH_BYTES // ((b - a) * (d - c) * groups * query.element_size()))
        for first in range(0, heads, step):
            yield a, b, c, d, first, min(heads, first + step)


def _heads(x: Tensor, start: int, end: int, first: int, last: int, groups: int) -> Tensor:
    """(heads, groups * tokens, D) of a packed tensor: the query heads that share a key head lie below each other."""
    part = x[start:end, first * groups : last * groups].transpose(0, 1)
    if part.dtype != torch.float64:
        part = part.float()
    return part if groups == 1 else part.reshape(last - first, -1, x.shape[-1])


def _scores(
    q: Tensor, k: Tensor, bad: Tensor | None, places: tuple[int, int], options: tuple[float, bool, bool]
) -> Tensor:
    """Probabilities (heads, groups * Sq, Sk) before dropout."""
    q_len, k_len = places
    scale, is_causal, bottom_right = options
    scores = torch.baddbmm(q.new_empty(()), q, k.transpose(1, 2), beta=0, alpha=scale)
    if bad is not None:
        scores.masked_fill_(bad, torch.nan)
    if is_causal:
        offset = k_len - q_len if bottom_right else 0
        hidden = torch.ones(q_len, k_len, dtype=torch.bool).triu_(1 + offset)
        scores.view(-1, q_len, k_len).masked_fill_(hidden, -torch.inf)
    weights = torch.softmax(scores, -1)
    if is_causal and offset < 0:
        weights.view(-1, q_len, k_len)[:, :-offset] = 0.0
    return weights


def _masks(seed: Tensor, count: int, threshold: int) -> Tensor:
    generator = torch.Generator().manual_seed(int(seed))
    draws = torch.empty((count * _DRAW_BITS + 63) // 64, dtype=torch.int64).random_(-(2**63), None, generator=generator)
    return draws.view(torch.int16)[:count] >= threshold - (1 << (_DRAW_BITS - 1))


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    dropout_p: float,
    is_causal: bool,
    bottom_right: bool,
    scale: float,
    dropout_seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output (T, H, Dv) and the dropout masks of all pieces, flat."""
    out = query.new_zeros((*query.shape[:2], value.shape[2]))
    groups = query.shape[1] // max(1, key.shape[1])
    pieces = list(_pieces(query, key, cu_seqlens_q, cu_seqlens_k))
    key, value, bad = _cleaned(key, value, is_causal)
    threshold, factor = _dropping(dropout_p)
    sizes = [(b - a) * (d - c) * (last - first) * groups for a, b, c, d, first, last in pieces]
    masks = (
        query.new_zeros(0, dtype=torch.bool) if dropout_seed is None else _masks(dropout_seed, sum(sizes), threshold)
    )
    done = 0
    for (a, b, c, d, first, last), size in zip(pieces, sizes, strict=True):
        q = _heads(query, a, b, first, last, groups)
        k = _heads(key, c, d, first, last, 1)
        poison = None if bad is None else bad[c:d, first:last].t().unsqueeze(1)
        weights = _scores(q, k, poison, (b - a, d - c), (scale, is_causal, bottom_right))
        if dropout_p:
            weights.mul_(masks[done : done + size].view(weights.shape))
            done += size
        part = torch.baddbmm(weights.new_empty(()), weights, _heads(value, c, d, first, last, 1), beta=0, alpha=factor)
        _put(out, part, a, b, first, last, groups)
    return out, masks


def _put(out: Tensor, part: Tensor, start: int, end: int, first: int, last: int, groups: int) -> None:
    target = out[start:end, first * groups : last * groups].transpose(0, 1)
    target.copy_(part.view(target.shape) if groups > 1 else part)


def _dropping(p: float) -> tuple[int, float]:
    """(16-bit threshold, factor of what is kept)."""
    threshold = round(p * (1 << _DRAW_BITS))
    kept = (1 << _DRAW_BITS) - threshold
    return threshold, (1 << _DRAW_BITS) / kept if kept else 0.0


def _cleaned(key: Tensor, value: Tensor, is_causal: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values without NaN and Inf, and where they had some; untouched where every row sees every key."""
    if not is_causal or bool(torch.isfinite(key.sum() + value.sum())):
        return key, value, None
    bad = ~(torch.isfinite(key).all(-1) & torch.isfinite(value).all(-1))
    return torch.where(torch.isfinite(key), key, 0.0), torch.where(torch.isfinite(value), value, 0.0), bad


def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    masks: Tensor,
    dropout_p: float,
    is_causal: bool,
    bottom_right: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    grad_q, grad_k, grad_v = (torch.zeros(x.shape, dtype=x.dtype) for x in (query, key, value))
    groups = query.shape[1] // max(1, key.shape[1])
    key, value, bad = _cleaned(key, value, is_causal)
    _, factor = _dropping(dropout_p)
    done = 0
    for a, b, c, d, first, last in _pieces(query, key, cu_seqlens_q, cu_seqlens_k):
        q, g = (_heads(x, a, b, first, last, groups) for x in (query, grad))
        none = q.new_empty(())
        k, v = (_heads(x, c, d, first, last, 1) for x in (key, value))
        poison = None if bad is None else bad[c:d, first:last].t().unsqueeze(1)
        weights = _scores(q, k, poison, (b - a, d - c), (scale, is_causal, bottom_right))
        grad_weights = torch.baddbmm(none, g, v.transpose(1, 2), beta=0, alpha=factor)
        kept = weights
        if dropout_p:
            mask = masks[done : done + weights.numel()].view(weights.shape)
            done += weights.numel()
            grad_weights.mul_(mask)
            kept = weights * mask
        _put(grad_v, torch.baddbmm(none, kept.transpose(1, 2), g, beta=0, alpha=factor), c, d, first, last, 1)
        grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
        _put(grad_q, torch.baddbmm(none, grad_scores, k, beta=0, alpha=scale), a, b, first, last, groups)
        _put(grad_k, torch.baddbmm(none, grad_scores.transpose(1, 2), q, beta=0, alpha=scale), c, d, first, last, 1)
    return grad_q, grad_k, grad_v


def _fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    dropout_p: float,
    is_causal: bool,
    bottom_right: bool,
    scale: float,
    dropout_seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    count = torch.library.get_ctx().new_dynamic_size() if dropout_p else 0
    return query.new_empty((*query.shape[:2], value.shape[2])), query.new_empty((count,), dtype=torch.bool)


def _fake_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: object) -> tuple[Tensor, ...]:
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value))


_backward_kernel = Kernel("attention_packed_cpu_backward", _backward, _fake_backward)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, p, is_causal, bottom_right, scale, seed = inputs
    ctx.save_for_backward(*tensors, output[1], seed)
    ctx.numbers = p, is_causal, bottom_right, scale


def _run_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, masks, _seed = ctx.saved_tensors
    return *_backward_kernel(grad, *tensors, masks, *ctx.numbers), *[None] * 7


def _second(ctx: Any, grad: Tensor, _: Tensor | None = None) -> tuple[Tensor | None, ...]:
    query, key, value, cu_q, cu_k, _masks, _seed = ctx.saved_tensors
    p, is_causal, bottom_right, scale = ctx.numbers
    if p:
        raise RuntimeError(
            "packed attention with dropout has a second derivative (create_graph=True) only with a dropout_seed, "
            "got None"
        )
    longest = (int(cu.diff().max()) if len(cu) > 1 else 0 for cu in (cu_q, cu_k))
    arguments = (cu_q, cu_k, *longest, Options(0.0, is_causal, scale, bottom_right, OPEN, OPEN, 0.0))

    def reference(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return varlen_reference(query, key, value, *arguments)[0]

    found = differentiate("attention_packed_cpu", reference, (query, key, value), (grad,))
    return *found, *[None] * 7


packed_cpu = Operator("attention_packed_cpu", _forward, _fake, _setup, _run_backward, _second)
