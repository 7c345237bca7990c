"""Packed attention on the CPU: one sequence at a time, softmax recomputed in the backward pass.

- fp32 without dropout and bias takes PyTorch's own flash attention (`packed_flash`), two calls a sequence.
- Everything else is batched matrix products over one sequence's heads, whose scores stay in the cache.
- Nothing of size S² outlives the call: dropout masks are drawn again from their seed. Scores are made for so many
  heads at a time that they fit `_SCRATCH_BYTES`.
- Half precision computes in fp32 and rounds once, at the end.
"""

from __future__ import annotations

import contextlib
import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastformer.ops.attention import packed_flash
from fastformer.ops.attention.options import Options
from fastformer.ops.operator import Kernel, Operator, differentiate
from fastformer.ops.random import draw_seed

_SCRATCH_BYTES = 32 << 20
# Dropout draws 16 bits an element: four from every 64-bit number of PyTorch's generator.
_DRAW_BITS = 16


class _Piece(NamedTuple):
    """Sequence `number`, with as many queries and keys, and its key heads from `first` up to `last`."""

    number: int
    q_len: int
    k_len: int
    first: int
    last: int


def _pieces(query: Tensor, key: Tensor, lengths_q: list[int], lengths_k: list[int]) -> tuple[list[_Piece], int]:
    """The pieces of work of a call, and how many query heads share a key head."""
    heads, groups = key.shape[1], query.shape[1] // max(1, key.shape[1])
    most = _SCRATCH_BYTES // (groups * query.element_size())
    pieces = []
    for number, (q_len, k_len) in enumerate(zip(lengths_q[:-1], lengths_k[:-1], strict=True)):
        if q_len and k_len:
            step = max(1, most // (q_len * k_len))
            pieces += [_Piece(number, q_len, k_len, first, min(heads, first + step)) for first in range(0, heads, step)]
    return pieces, groups


def _lengths(bounds: Tensor, tokens: int) -> list[int]:
    """Lengths of the sequences, and of what comes after the last."""
    ends = [*bounds.tolist(), tokens]
    return [b - a for a, b in itertools.pairwise(ends)]


def _both_lengths(bounds_q: Tensor, bounds_k: Tensor, tokens_q: int, tokens_k: int) -> tuple[list[int], list[int]]:
    lengths = _lengths(bounds_q, tokens_q)
    same = bounds_k is bounds_q and tokens_k == tokens_q
    return lengths, lengths if same else _lengths(bounds_k, tokens_k)


def _sequences(x: Tensor, lengths: list[int]) -> tuple[Tensor, ...]:
    """(heads, tokens, D) views of the sequences of a packed tensor, all in one call."""
    return x.transpose(0, 1).split(lengths, 1)


def _heads(sequence: Tensor, first: int, last: int, groups: int) -> Tensor:
    """(heads, groups * tokens, D): the query heads that share a key head lie below each other."""
    part = sequence
    if (last - first) * groups != part.shape[0]:
        part = part[first * groups : last * groups]
    if part.dtype != torch.float64 and part.dtype != torch.float32:
        part = part.float()
    return part if groups == 1 else part.reshape(last - first, -1, part.shape[-1])


def _put(sequence: Tensor, part: Tensor, first: int, last: int, groups: int) -> None:
    if (last - first) * groups != sequence.shape[0]:
        sequence = sequence[first * groups : last * groups]
    sequence.copy_(part.view(sequence.shape) if groups > 1 else part)


def _weights(
    q: Tensor, k: Tensor, bad: Tensor | None, bias: Tensor | None, piece: _Piece, options: tuple[float, bool, bool]
) -> Tensor:
    """Probabilities (heads, groups * Sq, Sk) before dropout."""
    _, q_len, k_len, first, last = piece
    scale, is_causal, bottom_right = options
    scores = torch.baddbmm(q.new_empty(()), q, k.mT, beta=0, alpha=scale)
    if bad is not None:
        scores.masked_fill_(bad[first:last].mT, torch.nan)
    if bias is not None:
        by_head = scores.view(-1, q_len, k_len)
        by_head += _of_piece(bias, by_head, piece)
    if is_causal:
        offset = k_len - q_len if bottom_right else 0
        hidden = torch.ones(q_len, k_len, dtype=torch.bool).triu_(1 + offset)
        scores.view(-1, q_len, k_len).masked_fill_(hidden, -torch.inf)
    weights = torch.softmax(scores, -1)
    if is_causal and offset < 0:
        empty = torch.arange(q_len).view(-1, 1) < -offset
        weights = weights.view(-1, q_len, k_len).masked_fill(empty, 0.0).view(weights.shape)
    return weights


def _of_piece(bias: Tensor, by_head: Tensor, piece: _Piece) -> Tensor:
    """The part of a (heads, longest, longest) bias that the scores (heads, Sq, Sk) of a piece take."""
    heads = by_head.shape[0]
    first = piece.first * (heads // (piece.last - piece.first))
    return bias[first : first + heads, : piece.q_len, : piece.k_len]


class _Drops:
    """The dropout masks of a call's pieces, in their order; the same ones for the same seed."""

    def __init__(self, seed: Tensor | None, p: float) -> None:
        self.threshold = round(p * (1 << _DRAW_BITS))
        kept = (1 << _DRAW_BITS) - self.threshold
        # What is kept is multiplied by this.
        self.factor = (1 << _DRAW_BITS) / kept if kept else 0.0
        self.generator = None if seed is None else torch.Generator().manual_seed(int(seed))

    def mask(self, shape: torch.Size) -> Tensor | None:
        """Bool, True where a weight is kept; None if nothing is dropped."""
        if self.generator is None:
            return None
        count = shape.numel()
        draws = torch.empty((count * _DRAW_BITS + 63) // 64, dtype=torch.int64)
        draws.random_(-(2**63), None, generator=self.generator)
        return (draws.view(torch.int16)[:count] >= self.threshold - (1 << (_DRAW_BITS - 1))).view(shape)


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    bias: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    bottom_right: bool,
    scale: float,
    dropout_seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output (T, H, Dv), and log-sum-exp of the scores (T, H), of meaning where `packed_flash` made them."""
    lengths_q, lengths_k = _both_lengths(cu_seqlens_q, cu_seqlens_k, query.shape[0], key.shape[0])
    key, value, bad = _cleaned(key, value, is_causal)
    plain = bias is None and dropout_seed is None and bad is None
    # A second derivative is taken through what follows.
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    if plain and not recorded and packed_flash.takes(query, key, value, is_causal, lengths_q, lengths_k):
        return packed_flash.forward(query, key, value, lengths_q, lengths_k, is_causal, scale)
    pieces, groups = _pieces(query, key, lengths_q, lengths_k)
    out = query.new_zeros((*query.shape[:2], value.shape[2]))
    queries, keys, values = _sequences(query, lengths_q), _sequences(key, lengths_k), _sequences(value, lengths_k)
    starts = cu_seqlens_q.tolist()
    bads = None if bad is None else _sequences(bad, lengths_k)
    bias = _wide(bias)
    drops = _Drops(dropout_seed, dropout_p)
    none = out.new_empty((), dtype=torch.promote_types(out.dtype, torch.float32))
    for piece in pieces:
        i, q_len, _, first, last = piece
        q = _heads(queries[i], first, last, groups)
        k, v = (_heads(x[i], first, last, 1) for x in (keys, values))
        bad_keys = None if bads is None else bads[i]
        weights = _weights(q, k, bad_keys, bias, piece, (scale, is_causal, bottom_right))
        mask = drops.mask(weights.shape)
        if mask is not None:
            # A second derivative goes through here, and needs the weights as they were.
            weights = weights * mask if torch.is_grad_enabled() else weights.mul_(mask)
        # A view of its own: where a second derivative is taken, what `split` gives may not be written to.
        target = out.narrow(0, starts[i], q_len).transpose(0, 1)
        _put(target, torch.baddbmm(none, weights, v, beta=0, alpha=drops.factor), first, last, groups)
    return out, none.new_zeros(query.shape[:2])


def _wide(bias: Tensor | None) -> Tensor | None:
    return bias if bias is None or bias.dtype == torch.float64 else bias.float()


def _cleaned(key: Tensor, value: Tensor, is_causal: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values without NaN and Inf, and where they had some; untouched where every row sees every key."""
    if not is_causal or bool(torch.isfinite(key.sum() + value.sum())):
        return key, value, None
    bad = ~(torch.isfinite(key).all(-1, keepdim=True) & torch.isfinite(value).all(-1, keepdim=True))
    return torch.where(torch.isfinite(key), key, 0.0), torch.where(torch.isfinite(value), value, 0.0), bad


def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    bias: Tensor | None,
    dropout_seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dropout_p: float,
    is_causal: bool,
    bottom_right: bool,
    scale: float,
    of_bias: bool,
) -> list[Tensor]:
    """Gradients of query, key and value, and, if `of_bias`, of the bias."""
    lengths_q, lengths_k = _both_lengths(cu_seqlens_q, cu_seqlens_k, query.shape[0], key.shape[0])
    key, value, bad = _cleaned(key, value, is_causal)
    plain = bias is None and dropout_seed is None and bad is None
    if plain and packed_flash.takes(query, key, value, is_causal, lengths_q, lengths_k):
        return packed_flash.backward(grad, query, key, value, out, lse, lengths_q, lengths_k, is_causal, scale)
    pieces, groups = _pieces(query, key, lengths_q, lengths_k)
    grads = [torch.zeros(x.shape, dtype=x.dtype) for x in (query, key, value)]
    grad_q, grad_k, grad_v = grads
    queries, sent, grads_q = (_sequences(x, lengths_q) for x in (query, grad, grad_q))
    keys, values, grads_k, grads_v = (_sequences(x, lengths_k) for x in (key, value, grad_k, grad_v))
    bads = None if bad is None else _sequences(bad, lengths_k)
    wide = _wide(bias)
    grad_bias = torch.zeros(wide.shape, dtype=wide.dtype) if wide is not None and of_bias else None
    drops = _Drops(dropout_seed, dropout_p)
    none = grad_q.new_empty((), dtype=torch.promote_types(grad_q.dtype, torch.float32))
    for piece in pieces:
        i, q_len, k_len, first, last = piece
        q, g = (_heads(x[i], first, last, groups) for x in (queries, sent))
        k, v = (_heads(x[i], first, last, 1) for x in (keys, values))
        bad_keys = None if bads is None else bads[i]
        weights = _weights(q, k, bad_keys, wide, piece, (scale, is_causal, bottom_right))
        grad_weights = torch.baddbmm(none, g, v.mT, beta=0, alpha=drops.factor)
        kept, mask = weights, drops.mask(weights.shape)
        if mask is not None:
            grad_weights.mul_(mask)
            kept = weights * mask
        _put(grads_v[i], torch.baddbmm(none, kept.mT, g, beta=0, alpha=drops.factor), first, last, 1)
        grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
        if grad_bias is not None:
            by_head = grad_scores.view(-1, q_len, k_len)
            _of_piece(grad_bias, by_head, piece).add_(by_head)
        _put(grads_q[i], torch.baddbmm(none, grad_scores, k, beta=0, alpha=scale), first, last, groups)
        _put(grads_k[i], torch.baddbmm(none, grad_scores.mT, q, beta=0, alpha=scale), first, last, 1)
    if grad_bias is None or bias is None:
        return grads
    return [*grads, grad_bias.to(bias.dtype)]


def _fake(query: Tensor, key: Tensor, value: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    lse = query.new_empty(query.shape[:2], dtype=torch.promote_types(query.dtype, torch.float32))
    return query.new_empty((*query.shape[:2], value.shape[2])), lse


def _fake_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor, cu_k: Tensor, bias: Tensor, *rest: Any
) -> list[Tensor]:
    shaped = (query, key, value, bias) if rest[-1] else (query, key, value)
    return [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in shaped]


_backward_kernel = Kernel("attention_packed_cpu_backward", _backward, _fake_backward)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, p, is_causal, bottom_right, scale, seed = inputs
    ctx.save_for_backward(*tensors, seed, *output)
    ctx.numbers = p, is_causal, bottom_right, scale


def _run_backward(ctx: Any, grad: Tensor, _: Tensor | None = None) -> tuple[Tensor | None, ...]:
    found = _backward_kernel(grad, *ctx.saved_tensors, *ctx.numbers, ctx.needs_input_grad[5])
    return *found[:3], None, None, *(found[3:] or [None]), *[None] * 5


def _second(ctx: Any, grad: Tensor, _: Tensor | None = None) -> tuple[Tensor | None, ...]:
    *tensors, cu_q, cu_k, bias, seed, _, _ = ctx.saved_tensors
    p, is_causal, bottom_right, scale = ctx.numbers

    def again(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        return _forward(query, key, value, cu_q, cu_k, bias, p, is_causal, bottom_right, scale, seed)[0]

    *found, grad_bias = differentiate("attention_packed_cpu", again, (*tensors, bias), (grad,))
    return *found, None, None, grad_bias, *[None] * 5


packed_cpu = Operator("attention_packed_cpu", _forward, _fake, _setup, _run_backward, _second, visible=1)


def takes(options: Options, attn_mask: Tensor | None) -> bool:
    """Whether a call on the CPU, without LSE, ALiBi, sinks or a seed of the caller's, may come here.

    A mask must be a bias that all sequences share and that hides nothing, as T5's; its values are looked at.
    """
    if options.softcap or (options.banded and (options.left >= 0 or options.right >= 0)):
        return False
    if attn_mask is None:
        return True
    if attn_mask.dtype == torch.bool or (attn_mask.ndim == 4 and attn_mask.shape[0] != 1):
        return False
    if torch.compiler.is_compiling() or type(attn_mask.detach()) is not Tensor:
        return False
    return bool(torch.isfinite(attn_mask.detach().sum()))


def attend_on_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    options: Options,
    attn_mask: Tensor | None = None,
    longest: tuple[int, int] = (0, 0),
) -> Tensor:
    """(T, H, D) to (T, H, Dv); `takes` must have agreed.

    Args:
        longest: the numbers of places that attn_mask is for.
    """
    seed = draw_seed(query.device) if options.dropout_p else None
    bias = None
    if attn_mask is not None:
        bias = attn_mask[(None,) * (4 - attn_mask.ndim)][0].expand(query.shape[1], *longest)
    # Under autocast PyTorch would round the fp32 scores inside to half precision.
    with torch.autocast("cpu", enabled=False) if torch.is_autocast_enabled("cpu") else contextlib.nullcontext():
        return packed_cpu(
            query, key, value, cu_seqlens_q, cu_seqlens_k, bias,
            options.dropout_p, options.is_causal, options.bottom_right, options.scale, seed,
        )  # fmt: skip
