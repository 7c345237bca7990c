"""LayerNorm and RMSNorm over the last dimension, alone or with the dropout and residual addition in front of them.

    z   = residual + row_scale * dropout(input)          (z = input without a residual)
    out = (z - mean) * rstd * (weight + offset) + bias    mean = 0 and rstd = 1 / rms(z) for RMSNorm

- Statistics and arithmetic are fp32 whatever the dtypes; z is rounded to its own dtype before the statistics, so the
  output does not depend on whether z is kept.
- Saved for backward: z (the input itself without a residual), two fp32 numbers a row and the dropout seed. No mask.
- Ba, Kiros, Hinton 2016, "Layer normalization"; Zhang, Sennrich 2019, "Root mean square layer normalization".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastformer.ops.backend import autocasts, backend_for
from fastformer.ops.norm_operator import add_norm_op, affine_reference, norm_op, numbers_of
from fastformer.ops.operator import Kind, Kinds, is_plain, kernels
from fastformer.ops.random import draw_seed, drop_numbers, dropout
from fastformer.ops.validate import FLOATS, check_number, check_probability, check_tensor, matches

_DTYPES = (*FLOATS, torch.float64)
_kinds = Kinds()


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
    return _norm(input, None, weight, bias, None, None, 0.0, eps, 0.0, False, None, out_dtype, False)[0]


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
        eps: None: the machine epsilon of input's dtype, float32's for 16 bits (as stock).
        offset: added to weight; 1.0 for Gemma.
        out_dtype: as in `layer_norm`.

    Returns:
        (..., N).

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape or device.
    """
    return _norm(input, None, weight, None, None, None, 0.0, eps, offset, True, None, out_dtype, False)[0]


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
    check_probability("dropout_p", dropout_p)
    out, total = _norm(
        input, residual, weight, bias, row_scale, dropout_seed, dropout_p if training else 0.0, eps, 0.0, False,
        residual_dtype, out_dtype, return_residual,
    )  # fmt: skip
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

    eps=None takes the machine epsilon of the sum's dtype, float32's for 16 bits.
    """
    check_probability("dropout_p", dropout_p)
    out, total = _norm(
        input, residual, weight, None, row_scale, dropout_seed, dropout_p if training else 0.0, eps, offset, True,
        residual_dtype, out_dtype, return_residual,
    )  # fmt: skip
    return (out, total) if return_residual else out


def _norm(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    row_scale: Tensor | None,
    seed: Tensor | None,
    p: float,
    eps: float | None,
    offset: float,
    rms: bool,
    sum_dtype: torch.dtype | None,
    out_dtype: torch.dtype | None,
    want_sum: bool,
) -> tuple[Tensor, Tensor]:
    """The four functions in one: (normed, sum); the sum is meaningful only if `want_sum`."""
    numbers = (p, eps, offset, rms, sum_dtype, out_dtype, want_sum)
    key, known = _kinds.find(numbers, input, residual, weight, bias, row_scale, seed)
    if known is None:
        return _norm_anew(key, (input, residual, weight, bias, row_scale, seed), *numbers)
    if p == 0.0:
        seed = None
    elif seed is None:
        seed = draw_seed(input.device)
    found = known(input, residual, weight, bias, row_scale, seed)
    return found if type(found) is tuple else (found, input)


def _norm_anew(
    key: Any,
    given: tuple[Any, ...],
    p: float,
    eps: float | None,
    offset: float,
    rms: bool,
    sum_dtype: torch.dtype | None,
    out_dtype: torch.dtype | None,
    want_sum: bool,
) -> tuple[Tensor, Tensor]:
    """Check, choose and run; what was chosen is kept under `key` where later calls can take the same way."""
    input, residual, weight, bias, row_scale, seed = given
    _check(input, residual, weight, bias, row_scale, seed)
    if eps is not None:
        check_number("eps", eps)
    check_number("offset", offset)
    if sum_dtype is None:
        sum_dtype = input.dtype
        if residual is not None and residual.dtype != sum_dtype:
            sum_dtype = torch.promote_types(sum_dtype, residual.dtype)
    elif sum_dtype not in _DTYPES:
        raise TypeError(f"residual_dtype must be a floating-point dtype, got {sum_dtype}")
    if out_dtype is not None and out_dtype not in _DTYPES:
        raise TypeError(f"out_dtype must be a floating-point dtype, got {out_dtype}")
    if eps is None:
        # Stock computes 16-bit inputs in float32 and takes that one's epsilon.
        eps = torch.finfo(torch.promote_types(sum_dtype, torch.float32)).eps
    device = input.device
    # No kernel computes in float64 or has a program for rows without elements.
    if backend_for(device) == "torch" or sum_dtype == torch.float64 or input.shape[-1] == 0:
        return _compose(input, residual, weight, bias, row_scale, seed, p, eps, offset, rms, sum_dtype, out_dtype)
    if out_dtype is None:
        out_dtype = torch.float32 if autocasts(device) else sum_dtype
    if p == 0.0:
        seed = None
    elif seed is None:
        seed = draw_seed(device)
    tensors = (input, residual, _unit_stride(weight), _unit_stride(bias), _unit_stride(row_scale), seed)
    numbers = (p, eps, offset, rms, sum_dtype, out_dtype)
    keep_sum = want_sum or (residual is not None and torch.is_grad_enabled())
    copied = any(a is not b for a, b in zip(tensors[:5], given, strict=False))
    if key is not None and not copied and is_plain(tensors):
        run = kernels("norm").bind_forward(*tensors, *drop_numbers(p), *numbers[1:], keep_sum)
        if run is not None:
            # A second derivative takes its way through the sum, which is a result for its sake.
            kind = Kind(norm_op, run, tensors, numbers_of((*tensors, *numbers)), 2 if keep_sum else 1)
            found = _kinds.keep(key, kind)(*tensors)
            return found if keep_sum else (found, input)
    if keep_sum:
        return add_norm_op(*tensors, *numbers)
    return norm_op(*tensors, *numbers), input


def _check(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    row_scale: Tensor | None,
    seed: Tensor | None,
) -> None:
    check_tensor("input", input, dtypes=_DTYPES)
    if input.ndim == 0:
        raise ValueError("input must have at least one dimension, got shape ()")
    shape, device = input.shape, input.device
    if residual is not None and not matches(residual, shape, device):
        check_tensor("residual", residual, dtypes=_DTYPES, shape=shape, device=device)
    columns = shape[-1:]
    if weight is not None and not matches(weight, columns, device):
        check_tensor("weight", weight, dtypes=_DTYPES, shape=columns, device=device)
    if bias is not None and not matches(bias, columns, device):
        check_tensor("bias", bias, dtypes=_DTYPES, shape=columns, device=device)
    if row_scale is not None:
        check_tensor("row_scale", row_scale, dtypes=_DTYPES, shape=shape[:-1], device=device)
        if row_scale.requires_grad:
            raise ValueError("row_scale takes no gradient; detach it, got requires_grad=True")
    if seed is not None:
        check_tensor("dropout_seed", seed, dtypes=(torch.int64,), shape=(1,), device=device)


def _unit_stride(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or tensor.is_contiguous() else tensor.contiguous()


def _compose(
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    row_scale: Tensor | None,
    seed: Tensor | None,
    p: float,
    eps: float,
    offset: float,
    rms: bool,
    sum_dtype: torch.dtype,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """PyTorch's own operators: bit for bit the stock layer wherever stock accepts the dtypes."""
    total = input
    if residual is not None:
        branch = dropout(input, p, seed) if p else input
        if row_scale is not None:
            branch = (branch * row_scale.unsqueeze(-1)).to(branch.dtype)
        total = (residual + branch).to(sum_dtype)
    out = affine_reference(total, weight, bias, eps, offset, rms)
    return (out if out_dtype is None else out.to(out_dtype)), total
