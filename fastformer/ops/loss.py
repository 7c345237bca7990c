"""Cross-entropy of logits.

The loss of a row is given in `fastformer.kernels.loss`; with the options PyTorch has it is
`torch.nn.functional.cross_entropy`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastformer.ops.backend import autocasts, backend_for
from fastformer.ops.operator import Kernel, Kind, Kinds, Operator, differentiate, is_plain, kernels
from fastformer.ops.validate import FLOATS, check_tensor

DTYPES = (*FLOATS, torch.float64)
_REDUCTIONS = ("mean", "sum", "none")
_kinds = Kinds()


class Options(NamedTuple):
    """What shapes a row's loss, in the order the registered operators take it."""

    ignore_index: int
    label_smoothing: float
    z_loss: float
    softcap: float


class _Numbers(NamedTuple):
    """What backward needs to know beside tensors; reduction is "mean" or "sum"."""

    options: Options
    reduction: str
    out_dtype: torch.dtype


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """Cross-entropy over the last dimension.

    Args:
        logits: (..., V), any strides.
        target: (...) int64 class indices, or `ignore_index`. On a GPU a target out of range makes the loss NaN.
        weight: (V,) weight of each class, or None. It takes no gradient.
        reduction: "mean" (weighted, over targets that are not ignored), "sum" or "none".
        label_smoothing: in [0, 1].
        z_loss: factor of log(sum exp)^2, weighted like the target.
        softcap: c > 0 replaces logits by c * tanh(logits / c); None for none.

    Returns:
        a scalar, or (...) for "none", in logits' dtype, or float32 under autocast.

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape, device or value.
    """
    numbers = (ignore_index, reduction, label_smoothing, z_loss, softcap)
    key, known = _kinds.find(numbers, logits, target, weight)
    if known is not None:
        return known(logits, target, weight)
    options = checked(weight, ignore_index, reduction, label_smoothing, z_loss, softcap, "logits", logits, target)
    if weight is not None:
        check_tensor("weight", weight, dtypes=DTYPES, shape=logits.shape[-1:], device=logits.device)
    autocast = autocasts(logits.device)
    out_dtype = torch.float32 if autocast and logits.dtype != torch.float64 else logits.dtype
    rows, goal = logits.reshape(-1, logits.shape[-1]), target.reshape(-1)
    if backend_for(logits.device) == "torch" or logits.dtype == torch.float64 or logits.shape[-1] == 0:
        return compose(rows, goal, weight, reduction, options, target.shape)
    given, goal = (logits, target, weight), goal.contiguous()
    weight = None if weight is None else weight.contiguous()
    if reduction == "none":
        return _rows_op(rows, goal, weight, *options).reshape(target.shape).to(out_dtype)
    if key is not None and weight is given[2] and target.is_contiguous() and is_plain(given):
        run = kernels("loss").bind_forward(*given, *options)
        if run is not None:
            kind = Kind(
                _reduced_op, _reducing(run, reduction, out_dtype), given, _Numbers(options, reduction, out_dtype), 1
            )
            return _kinds.keep(key, kind)(*given)
    return _reduced_op(rows, goal, weight, *options, reduction, out_dtype)


def _reducing(run: Callable[..., Any], reduction: str, out_dtype: torch.dtype) -> Callable[..., Any]:
    return lambda *tensors: _reduce(run(*tensors), reduction, out_dtype)


def _reduce(
    found: tuple[Tensor, Tensor, Tensor], reduction: str, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, row weights, lse, sum of row weights); the last is empty for "sum"."""
    losses, row_weight, lse = found
    loss = losses.sum()
    if reduction == "sum":
        return loss.to(out_dtype), row_weight, lse, losses.new_empty(0)
    count = row_weight.sum()
    return (loss / count).to(out_dtype), row_weight, lse, count


def checked(
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    name: str,
    value: Tensor,
    target: Tensor,
) -> Options:
    """Validate what the two losses share."""
    check_tensor(name, value, dtypes=DTYPES)
    if value.ndim == 0:
        raise ValueError(f"{name} must have at least one dimension, got shape ()")
    check_tensor("target", target, dtypes=(torch.int64,), shape=value.shape[:-1], device=value.device)
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(_REDUCTIONS)}, got {reduction!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be between 0 and 1, got {label_smoothing}")
    if z_loss < 0.0:
        raise ValueError(f"z_loss must not be negative, got {z_loss}")
    if softcap is not None and not softcap > 0.0:
        raise ValueError(f"softcap must be positive or None, got {softcap}")
    if weight is not None and weight.requires_grad:
        raise ValueError("the class weights take no gradient; detach them, got requires_grad=True")
    return Options(ignore_index, label_smoothing, z_loss, softcap or 0.0)


def compose(
    logits: Tensor, goal: Tensor, weight: Tensor | None, reduction: str, options: Options, shape: torch.Size
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
    _, row_weight, lse = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, goal, weight, row_weight, lse)
    ctx.options = options


def _rows_backward(ctx: Any, dloss: Tensor | None, *_: None) -> tuple[Any, ...]:
    gradient = None if dloss is None else _rows_gradient(dloss, *ctx.saved_tensors, *ctx.options)
    return gradient, None, None, None, None, None, None


def _rows_second(ctx: Any, dloss: Tensor | None, *_: None) -> tuple[Any, ...]:
    logits, goal, weight, _weights, _lse = ctx.saved_tensors
    options = Options(*ctx.options)

    def reference(logits: Tensor) -> Tensor:
        return compose(logits.float(), goal, weight, "none", options, goal.shape)

    return *differentiate("cross_entropy", reference, (logits,), (dloss,)), None, None, None, None, None, None


# Their sum or mean: an operator from logits to the loss.


def _reduced_forward(
    logits: Tensor,
    goal: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
    cap: float,
    reduction: str,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options = (ignore_index, smoothing, z_loss, cap)
    return _reduce(kernels("loss").cross_entropy_forward(logits, goal, weight, *options), reduction, out_dtype)


def _reduced_fake(logits, goal, weight, ignore_index, smoothing, z_loss, cap, reduction, out_dtype):
    rows = logits.shape[0]
    shapes = ((), rows, (rows, 2), 0 if reduction == "sum" else ())
    dtypes = (out_dtype, *(torch.float32,) * 3)
    return tuple(logits.new_empty(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True))


def _reduced_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *_, reduction, out_dtype = inputs
    ctx.set_materialize_grads(False)
    ctx.numbers = _Numbers(Options(*inputs[3:7]), reduction, out_dtype)
    ctx.save_for_backward(*_saved(ctx.numbers, inputs, output))


def _saved(numbers: _Numbers, tensors: tuple[Any, ...], results: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    """logits, targets, class weights, row weights, lse, sum of row weights."""
    logits, goal, weight, *_ = tensors
    return logits, goal, weight, *results[1:]


def _reduced_backward(ctx: Any, dloss: Tensor | None, *_: None) -> tuple[Any, ...]:
    if dloss is None:
        return _NOTHING
    *saved, count = ctx.saved_tensors
    each = dloss if ctx.numbers.reduction == "sum" else dloss / count
    return _rows_gradient(each, *saved, *ctx.numbers.options), *_NOTHING[1:]


def _bind(
    numbers: _Numbers, needs: Sequence[bool], grads: tuple[Tensor | None, ...], saved: tuple[Any, ...]
) -> Callable[..., tuple[Tensor | None, ...]] | None:
    dloss, count = grads[0], saved[-1]
    mean = numbers.reduction == "mean"
    if dloss is None:
        return None
    each = dloss / count if mean else dloss
    run = kernels("loss").bind_backward(each, *saved[:3], *numbers.options, False)
    if run is None:
        return None

    def back(grads: tuple[Tensor, ...], saved: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
        (dloss,), (logits, goal, weight, row_weight, lse, count) = grads, saved
        return run(dloss / count if mean else dloss, logits, goal, weight, row_weight, lse), None, None

    return back


_NOTHING = (None,) * 9


def _reduced_second(ctx: Any, dloss: Tensor | None, *_: None) -> tuple[Any, ...]:
    logits, goal, weight, *_saved = ctx.saved_tensors
    options, reduction, out_dtype = ctx.numbers

    def reference(logits: Tensor) -> Tensor:
        rows = logits.float().reshape(-1, logits.shape[-1])
        return compose(rows, goal.reshape(-1), weight, reduction, options, goal.shape).to(out_dtype)

    return *differentiate("cross_entropy", reference, (logits,), (dloss,)), *_NOTHING[1:]


_reduced_op = Operator(
    "cross_entropy_reduced", _reduced_forward, _reduced_fake, _reduced_setup, _reduced_backward, _reduced_second,
    visible=1, saved=_saved, bind=_bind,
)  # fmt: skip


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


_rows_op = Operator("cross_entropy", _rows_forward, _rows_fake, _rows_setup, _rows_backward, _rows_second, visible=1)
_rows_gradient = Kernel(
    "cross_entropy_backward", _run_rows_gradient, lambda dloss, logits, *_: logits.new_empty(logits.shape)
)
