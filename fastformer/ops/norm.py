"""LayerNorm and RMSNorm over the last dimension, alone or with the dropout and residual addition in front of them.

    z   = residual + row_scale * dropout(input)          (z = input without a residual)
    out = (z - mean) * rstd * (weight + offset) + bias    mean = 0 and rstd = 1 / rms(z) for RMSNorm

- Statistics and arithmetic are fp32 whatever the dtypes; z is rounded to its own dtype before the statistics, so the
  output does not depend on whether z is kept.
- Saved for backward: z (the input itself without a residual), two fp32 numbers a row and the dropout seed. No mask.
- Ba, Kiros, Hinton 2016, "Layer normalization"; Zhang, Sennrich 2019, "Root mean square layer normalization".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastformer.ops.random import philox_keep
from fastformer.ops.validate import FLOATS, check_probability, check_tensor

_REFERENCE_FLOATS = (*FLOATS, torch.float64)


def layer_norm(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """LayerNorm over the last dimension.

    Args:
        input: (..., N), any strides.
        weight, bias: (N,), or None for no scale or no shift. Their dtype may differ from input's.
        eps: added to the variance.
        out_dtype: dtype of the result; None: input's, or float32 under autocast (as stock on CUDA).

    Returns:
        (..., N).

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape or device.
    """
    return _norm(_Call(input, None, weight, bias, eps, out_dtype=out_dtype))[0]


def rms_norm(
    input: Tensor,
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    offset: float = 0.0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """RMSNorm over the last dimension: input / sqrt(mean(input^2) + eps) * (weight + offset).

    Args:
        input: (..., N), any strides.
        weight: (N,) or None.
        eps: None: the machine epsilon of input's dtype (as torch.nn.functional.rms_norm).
        offset: added to weight; 1.0 for Gemma.
        out_dtype: as in `layer_norm`.

    Returns:
        (..., N).

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape or device.
    """
    return _norm(_Call(input, None, weight, None, eps, rms=True, offset=offset, out_dtype=out_dtype))[0]


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    training: bool = True,
    *,
    return_residual: bool = False,
    row_scale: Tensor | None = None,
    residual_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    dropout_seed: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm(residual + row_scale * dropout(input)) in one pass.

    Post-norm layers use the normed result alone; pre-norm layers ask for the new residual as well.

    Args:
        input: (..., N), the branch's output.
        residual: shape of input; its dtype may differ.
        weight, bias: (N,) or None.
        eps: added to the variance.
        dropout_p: probability of dropping an element of input while `training`.
        return_residual: also return the sum.
        row_scale: shape of input without its last dimension: a factor a row (stochastic depth). It takes no gradient.
        residual_dtype: dtype the sum is rounded to and returned in; None: the promoted dtype of input and residual.
            float32 keeps the residual stream in full precision.
        out_dtype: dtype of the normed result; None: that of the sum, or float32 under autocast.
        dropout_seed: (1,) int64; None draws one. The same seed drops the same elements.

    Returns:
        normed, or (normed, sum), each (..., N).

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape, device or range.
    """
    call = _Call(
        input, residual, weight, bias, eps, dropout_p if training else 0.0, row_scale=row_scale,
        residual_dtype=residual_dtype, out_dtype=out_dtype, seed=dropout_seed,
    )  # fmt: skip
    check_probability("dropout_p", dropout_p)
    out, total = _norm(call)
    return (out, total) if return_residual else out


def add_rms_norm(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float | None = None,
    dropout_p: float = 0.0,
    training: bool = True,
    *,
    offset: float = 0.0,
    return_residual: bool = False,
    row_scale: Tensor | None = None,
    residual_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
    dropout_seed: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """RMSNorm(residual + row_scale * dropout(input)) in one pass; arguments as in `add_layer_norm` and `rms_norm`.

    eps=None takes the machine epsilon of the sum's dtype.
    """
    call = _Call(
        input, residual, weight, None, eps, dropout_p if training else 0.0, rms=True, offset=offset,
        row_scale=row_scale, residual_dtype=residual_dtype, out_dtype=out_dtype, seed=dropout_seed,
    )  # fmt: skip
    check_probability("dropout_p", dropout_p)
    out, total = _norm(call)
    return (out, total) if return_residual else out


@dataclass
class _Call:
    """One call's arguments, the same for the four functions."""

    input: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    eps: float | None
    p: float = 0.0
    rms: bool = False
    offset: float = 0.0
    row_scale: Tensor | None = None
    residual_dtype: torch.dtype | None = None
    out_dtype: torch.dtype | None = None
    seed: Tensor | None = None


def _norm(call: _Call) -> tuple[Tensor, Tensor]:
    _check(call)
    return _compose(call)


def _check(call: _Call) -> None:
    check_tensor("input", call.input, dtypes=_REFERENCE_FLOATS)
    if call.input.ndim == 0:
        raise ValueError("input must have at least one dimension, got shape ()")
    shape, device = tuple(call.input.shape), call.input.device
    if call.residual is not None:
        check_tensor("residual", call.residual, dtypes=_REFERENCE_FLOATS, shape=shape, device=device)
    for name, value in (("weight", call.weight), ("bias", call.bias)):
        if value is not None:
            check_tensor(name, value, dtypes=_REFERENCE_FLOATS, shape=shape[-1:], device=device)
    if call.row_scale is not None:
        check_tensor("row_scale", call.row_scale, dtypes=_REFERENCE_FLOATS, shape=shape[:-1], device=device)
    if call.seed is not None:
        check_tensor("dropout_seed", call.seed, dtypes=(torch.int64,), shape=(1,), device=device)


def _compose(call: _Call) -> tuple[Tensor, Tensor]:
    """PyTorch's own operators: bit for bit the stock layer wherever stock accepts the dtypes."""
    total = call.input
    if call.residual is not None:
        branch = _dropout(call.input, call.p, call.seed)
        if call.row_scale is not None:
            branch = branch * call.row_scale.unsqueeze(-1)
        total = call.residual + branch
        if call.residual_dtype is not None:
            total = total.to(call.residual_dtype)
    shape = total.shape[-1:]
    weight = call.weight
    if weight is not None and call.offset:
        weight = weight.float() + call.offset
    stock = all(
        w is None or w.dtype == total.dtype or torch.is_autocast_enabled(total.device.type) for w in (weight, call.bias)
    )
    if call.rms:
        eps = torch.finfo(total.dtype).eps if call.eps is None else call.eps
        if stock:
            out = F.rms_norm(total, shape, weight, eps)
        else:
            out = F.rms_norm(total.float(), shape, weight.float(), eps).to(total.dtype)
    elif stock:
        out = F.layer_norm(total, shape, weight, call.bias, call.eps)
    else:
        wide = (None if w is None else w.float() for w in (weight, call.bias))
        out = F.layer_norm(total.float(), shape, *wide, call.eps).to(total.dtype)
    return (out if call.out_dtype is None else out.to(call.out_dtype)), total


def _dropout(input: Tensor, p: float, seed: Tensor | None) -> Tensor:
    if seed is None or p == 0.0:
        return F.dropout(input, p)
    rows = torch.arange(input[..., 0].numel(), device=input.device).view(*input.shape[:-1], 1)
    columns = torch.arange(input.shape[-1], device=input.device)
    keep = philox_keep(int(seed), columns, rows, torch.zeros_like(columns), p)
    return torch.where(keep, input * (1 / (1 - p) if p < 1 else 0.0), 0.0)
