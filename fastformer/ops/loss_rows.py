"""The loss of every row of logits, and their sum or mean, as operators; `fastformer.ops.loss` has what is called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastformer.ops.operator import Kernel, Operator, differentiate, kernels


class LossOptions(NamedTuple):
    """What shapes a row's loss, in the order the registered operators take it."""

    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float


class Reduction(NamedTuple):
    """What the reduced loss's backward needs to know beside tensors."""

    options: LossOptions
    mean: bool
    out_dtype: torch.dtype


def compose(
    logits: Tensor, goal: Tensor, weight: Tensor | None, reduction: str, options: LossOptions, shape: torch.Size
) -> Tensor:
    """PyTorch's own cross-entropy, with what it lacks around it; logits (R, V), goal (R,)."""
    ignore_index, smoothing, z_loss, softcap = options
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    weight = None if weight is None else weight.to(logits.dtype)
    loss = F.cross_entropy(
        logits, goal, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=smoothing
    )
    if z_loss:
        row_weight = row_weights(goal, weight, ignore_index)
        # Not 0 * lse^2: an ignored row may hold anything.
        lse = logits.to(torch.promote_types(logits.dtype, torch.float32)).logsumexp(-1).where(row_weight != 0, 0.0)
        extra = z_loss * row_weight * lse.square()
        if reduction != "none":
            extra = extra.sum() / (row_weight.sum() if reduction == "mean" else 1)
        loss = loss + extra.to(loss.dtype)
    return loss.reshape(shape) if reduction == "none" else loss


def row_weights(goal: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """Weight of each row's target, 0 where it is ignored: (R,) in weight's dtype, or fp32."""
    kept = goal != ignore_index
    if weight is None:
        return kept.float()
    # Clamped: an index out of range would end the process's use of the GPU; the loss of such a row is NaN anyway.
    return torch.where(kept, weight[goal.where(kept, 0).clamp(0, len(weight) - 1)], 0.0)


# The rows' losses: an operator from logits to fp32 losses.


def _rows_forward(
    logits: Tensor, goal: Tensor, weight: Tensor | None, ignore_index: int, smoothing: float, z_loss: float, cap: float
) -> tuple[Tensor, Tensor, Tensor]:
    return kernels("loss").cross_entropy_forward(logits, goal, weight, ignore_index, smoothing, z_loss, cap)


def _rows_fake(logits, goal, weight, ignore_index, smoothing, z_loss, cap):
    rows = logits.shape[0]
    return tuple(logits.new_empty(shape, dtype=torch.float32) for shape in (rows, rows, (rows, 2)))


def _rows_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, goal, weight, *options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, goal, weight, *output[1:])
    ctx.options = options


def _rows_backward(ctx: Any, dloss: Tensor | None, *_: None) -> tuple[Any, ...]:
    gradient = None if dloss is None else _rows_gradient(dloss, *ctx.saved_tensors, *ctx.options)
    return gradient, None, None, None, None, None, None


def _rows_second(ctx: Any, dloss: Tensor | None, *_: None) -> tuple[Any, ...]:
    logits, goal, weight, _weights, _lse = ctx.saved_tensors
    options = LossOptions(*ctx.options)

    def reference(logits: Tensor) -> Tensor:
        return compose(logits.float(), goal, weight, "none", options, goal.shape)

    return *differentiate("cross_entropy", reference, (logits,), (dloss,)), None, None, None, None, None, None


def _run_rows_gradient(
    dloss: Tensor,
    logits: Tensor,
    goal: Tensor,
    weight: Tensor | None,
    row_weight: Tensor,
    lse: Tensor,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
    cap: float,
) -> Tensor:
    options = (ignore_index, smoothing, z_loss, cap)
    return kernels("loss").cross_entropy_backward(dloss, logits, goal, weight, row_weight, lse, *options, False)


rows_op = Operator("cross_entropy", _rows_forward, _rows_fake, _rows_setup, _rows_backward, _rows_second, visible=1)
_rows_gradient = Kernel(
    "cross_entropy_backward", _run_rows_gradient, lambda dloss, logits, *_: logits.new_empty(logits.shape)
)


# Their sum or mean: an operator from logits to one number.


def bind_reduced(
    logits: Tensor, goal: Tensor, weight: Tensor | None, reduction: Reduction
) -> Callable[..., tuple[Tensor | None, ...]] | None:
    """The operator's function for tensors laid out like these, logits (..., V), None where it copies."""
    options, mean, out_dtype = reduction
    run = kernels("loss").bind_forward(logits, goal, weight, *options)
    if run is None:
        return None
    reduce = kernels("loss").bind_reduction(goal.reshape(-1), mean, out_dtype)

    def reduced(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        losses, row_weight, lse = run(*tensors)
        loss, total = reduce(losses, row_weight)
        return loss, row_weight, lse, total

    return reduced


def _reduced_forward(
    logits: Tensor,
    goal: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
    cap: float,
    mean: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, rows' weights, rows' lse, sum of weights)."""
    run = kernels("loss")
    losses, row_weight, lse = run.cross_entropy_forward(logits, goal, weight, ignore_index, smoothing, z_loss, cap)
    loss, total = run.reduce_losses(losses, row_weight, mean, out_dtype)
    return loss, row_weight, lse, logits.new_empty(0) if total is None else total


def _reduced_fake(logits, goal, weight, ignore_index, smoothing, z_loss, cap, mean, out_dtype):
    rows = logits.shape[0]
    row_weight, lse = (logits.new_empty(shape, dtype=torch.float32) for shape in (rows, (rows, 2)))
    total = logits.new_empty((), dtype=torch.float32) if mean else logits.new_empty(0)
    return logits.new_empty((), dtype=out_dtype), row_weight, lse, total


def _reduced_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *_, mean, out_dtype = inputs
    ctx.set_materialize_grads(False)
    ctx.numbers = Reduction(LossOptions(*inputs[3:7]), mean, out_dtype)
    ctx.save_for_backward(*_saved(ctx.numbers, inputs, output))


def _saved(numbers: Reduction, tensors: tuple[Any, ...], results: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
    """logits, targets, class weights; rows' weights and lse, sum of weights."""
    return *tensors[:3], *results[1:]


def _reduced_backward(ctx: Any, dloss: Tensor | None, *_: None) -> tuple[Any, ...]:
    *tensors, total = ctx.saved_tensors
    gradient = None
    if dloss is not None:
        options, mean, _ = ctx.numbers
        gradient = _reduced_gradient(dloss, *tensors, total if mean else None, *options)
    return gradient, *[None] * 8


def _bind(
    numbers: Reduction, needs: Sequence[bool], grads: tuple[Tensor | None, ...], saved: tuple[Any, ...]
) -> tuple[Callable[..., tuple[Tensor]], Sequence[int | None]] | None:
    run = None
    if grads[0] is not None:
        run = kernels("loss").bind_backward(grads[0], *saved[:3], numbers.mean, *numbers.options, False)
    return None if run is None else (lambda *tensors: (run(*tensors),), (0, None, None))


def _reduced_second(ctx: Any, dloss: Tensor | None, *_: None) -> tuple[Any, ...]:
    logits, goal, weight, *_rest = ctx.saved_tensors
    options, mean, out_dtype = ctx.numbers

    def reference(logits: Tensor) -> Tensor:
        rows = logits.float().reshape(-1, logits.shape[-1])
        loss = compose(rows, goal.reshape(-1), weight, "mean" if mean else "sum", options, goal.shape)
        return loss.to(out_dtype)

    return *differentiate("cross_entropy", reference, (logits,), (dloss,)), *[None] * 8


def _run_reduced_gradient(
    dloss: Tensor,
    logits: Tensor,
    goal: Tensor,
    weight: Tensor | None,
    row_weight: Tensor,
    lse: Tensor,
    total: Tensor | None,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
    cap: float,
) -> Tensor:
    options = (ignore_index, smoothing, z_loss, cap)
    return kernels("loss").cross_entropy_backward(dloss, logits, goal, weight, row_weight, lse, *options, False, total)


reduced_op = Operator(
    "cross_entropy_reduced",
    _reduced_forward,
    _reduced_fake,
    _reduced_setup,
    _reduced_backward,
    _reduced_second,
    visible=1,
    saved=_saved,
    bind=_bind,
)
_reduced_gradient = Kernel(
    "cross_entropy_reduced_backward", _run_reduced_gradient, lambda dloss, logits, *_: logits.new_empty(logits.shape)
)
