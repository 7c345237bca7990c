"""One vector a sequence out of packed tokens: the mean of those that count, or the first."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastformer.ops.backend import backend_for
from fastformer.ops.operator import Kernel, Operator, kernels, say_once
from fastformer.ops.validate import FLOATS, check_tensor

_DTYPES = (*FLOATS, torch.float64)


def pool_packed(input: Tensor, cu_seqlens: Tensor, mode: str = "mean", mask: Tensor | None = None) -> Tensor:
    """Pool each sequence of a packed batch.

    Args:
        input: (T, N); tokens from cu_seqlens[-1] on belong to no sequence.
        cu_seqlens: (B + 1,) int32 or int64, sequence b holds tokens cu_seqlens[b] to cu_seqlens[b + 1] - 1.
        mode: "mean", or "cls" for the first token.
        mask: (T,) bool, tokens that count for the mean; None: all. Not for "cls".

    Returns:
        (B, N) in input's dtype, summed in float32; 0 for an empty sequence and for one of which no token counts.

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape, device or value.
    """
    check_tensor("input", input, ndim=2, dtypes=_DTYPES)
    check_tensor("cu_seqlens", cu_seqlens, ndim=1, dtypes=(torch.int32, torch.int64), device=input.device)
    if cu_seqlens.shape[0] == 0:
        raise ValueError("cu_seqlens must have at least one element, got none")
    if mode not in ("mean", "cls"):
        raise ValueError(f'mode must be "mean" or "cls", got {mode!r}')
    if mask is not None:
        check_tensor("mask", mask, dtypes=(torch.bool,), shape=input.shape[:1], device=input.device)
    if mode == "cls":
        if mask is not None:
            raise ValueError('mask must be None for mode "cls"')
        # The first token of an empty sequence would be the next one's, or lie behind the last.
        padded = input if len(input) else F.pad(input, (0, 0, 0, 1))
        first = padded.index_select(0, cu_seqlens[:-1].clamp(max=len(padded) - 1))
        return first.where((cu_seqlens[1:] > cu_seqlens[:-1])[:, None], 0.0)
    if backend_for(input.device) == "torch" or input.dtype == torch.float64:
        return mean_reference(input, cu_seqlens, mask)
    return _mean_op(input, cu_seqlens.contiguous(), None if mask is None else mask.contiguous())


def mean_reference(input: Tensor, cu_seqlens: Tensor, mask: Tensor | None) -> Tensor:
    """The mean by PyTorch, in float32 at least; the last of B + 1 sums takes the tokens of no sequence."""
    sequences, home = cu_seqlens.shape[0] - 1, _sequence_of(input.shape[0], cu_seqlens, mask)
    wide = input.to(torch.promote_types(input.dtype, torch.float32))
    total = wide.new_zeros(sequences + 1, input.shape[1]).index_add(0, home, wide)
    count = wide.new_zeros(sequences + 1).index_add(0, home, wide.new_ones(()).expand(len(home)))
    return (total[:-1] / count[:-1].clamp(min=1)[:, None]).to(input.dtype)


def _sequence_of(tokens: int, cu_seqlens: Tensor, mask: Tensor | None) -> Tensor:
    """The sequence each token counts for, their number for none."""
    places = torch.arange(tokens, device=cu_seqlens.device)
    home = torch.bucketize(places, cu_seqlens[1:].long(), right=True)
    return home if mask is None else home.where(mask, cu_seqlens.shape[0] - 1)


def _forward(input: Tensor, cu_seqlens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    return kernels("pooling").mean_forward(input, cu_seqlens, mask)


def _forward_fake(input, cu_seqlens, mask):
    sequences = cu_seqlens.shape[0] - 1
    return input.new_empty((sequences, input.shape[1])), input.new_empty(sequences, dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    input, cu_seqlens, mask = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(cu_seqlens, mask, output[1])
    ctx.tokens = input.shape[0]


def _backward(ctx: Any, dy: Tensor | None, _: None = None) -> tuple[Any, ...]:
    return None if dy is None else _mean_backward(dy, *ctx.saved_tensors, ctx.tokens), None, None


def _second(ctx: Any, dy: Tensor | None, _: None = None) -> tuple[Any, ...]:
    if dy is None:
        return None, None, None
    say_once("pool_packed_mean")
    cu_seqlens, mask, count = ctx.saved_tensors
    # A last row of zeros for the tokens of no sequence.
    share = F.pad(dy / count[:, None].to(dy.dtype), (0, 0, 0, 1))
    return share.index_select(0, _sequence_of(ctx.tokens, cu_seqlens, mask)), None, None


def _run_backward(dy: Tensor, cu_seqlens: Tensor, mask: Tensor | None, count: Tensor, tokens: int) -> Tensor:
    return kernels("pooling").mean_backward(dy, cu_seqlens, mask, count, tokens)


_mean_op = Operator("pool_packed_mean", _forward, _forward_fake, _setup_context, _backward, _second, visible=1)
_mean_backward = Kernel(
    "pool_packed_mean_backward",
    _run_backward,
    lambda dy, cu_seqlens, mask, count, tokens: dy.new_empty((tokens, dy.shape[1])),
)
