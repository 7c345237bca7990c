"""Cross-entropy of logits.

The loss of a row is given in `fastformer.kernels.loss`; with the options PyTorch has it is
`torch.nn.functional.cross_entropy`'s.
"""

from __future__ import annotations

import numbers

import torch
from torch import Tensor

from fastformer.ops.backend import autocasts, backend_for
from fastformer.ops.loss_rows import LossOptions, Reduction, bind_reduced, compose, reduced_op, rows_op
from fastformer.ops.operator import Kind, Kinds, is_plain
from fastformer.ops.validate import FLOATS, check_number, check_tensor

DTYPES = (*FLOATS, torch.float64)
_REDUCTIONS = ("mean", "sum", "none")
_kinds = Kinds()


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
    if logits.shape[-1] == 0:
        raise ValueError(f"logits must have at least one class, got shape {tuple(logits.shape)}")
    if weight is not None:
        check_tensor("weight", weight, dtypes=DTYPES, shape=logits.shape[-1:], device=logits.device)
    autocast = autocasts(logits.device)
    out_dtype = torch.float32 if autocast and logits.dtype != torch.float64 else logits.dtype
    rows, goal = logits.reshape(-1, logits.shape[-1]), target.reshape(-1)
    if backend_for(logits.device) == "torch" or logits.dtype == torch.float64:
        return compose(rows, goal, weight, reduction, options, target.shape)
    given, goal = (logits, target, weight), goal.contiguous()
    weight = None if weight is None else weight.contiguous()
    if reduction == "none":
        return rows_op(rows, goal, weight, *options).reshape(target.shape).to(out_dtype)
    mean = reduction == "mean"
    if key is not None and weight is given[2] and target.is_contiguous() and is_plain(given):
        reduced = Reduction(options, mean, out_dtype)
        run = bind_reduced(*given, reduced)
        if run is not None:
            return _kinds.keep(key, Kind(reduced_op, run, given, reduced, 1))(*given)
    return reduced_op(rows, goal, weight, *options, mean, out_dtype)


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
) -> LossOptions:
    """Validate what the two losses share."""
    check_tensor(name, value, dtypes=DTYPES)
    if value.ndim == 0:
        raise ValueError(f"{name} must have at least one dimension, got shape ()")
    check_tensor("target", target, dtypes=(torch.int64,), shape=value.shape[:-1], device=value.device)
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(_REDUCTIONS)}, got {reduction!r}")
    if not isinstance(ignore_index, numbers.Integral | torch.SymInt):
        raise TypeError(f"ignore_index must be an integer, got {type(ignore_index).__name__}")
    check_number("label_smoothing", label_smoothing, 0.0, 1.0)
    check_number("z_loss", z_loss, 0.0)
    if softcap is not None:
        check_number("softcap", softcap)
    if softcap is not None and not softcap > 0.0:
        raise ValueError(f"softcap must be positive or None, got {softcap}")
    if weight is not None and weight.requires_grad:
        raise ValueError("the class weights take no gradient; detach them, got requires_grad=True")
    return LossOptions(ignore_index, label_smoothing, z_loss, softcap or 0.0)
