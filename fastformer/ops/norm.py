"""LayerNorm and RMSNorm over the last dimension, alone or with the dropout and residual addition in front of them.

    z   = residual + row_scale * dropout(input)          (z = input without a residual)
    out = (z - mean) * rstd * (weight + offset) + bias    mean = 0 and rstd = 1 / rms(z) for RMSNorm

- Statistics and arithmetic are fp32 whatever the dtypes; z is rounded to its own dtype before the statistics, so the
  output does not depend on whether z is kept.
- Saved for backward: z (the input itself without a residual), two fp32 numbers a row and the dropout seed. No mask.
- Ba, Kiros, Hinton 2016, "Layer normalization"; Zhang, Sennrich 2019, "Root mean square layer normalization".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastformer.ops.backend import autocasts, backend_for
from fastformer.ops.operator import Kernel, Kind, Kinds, Operator, differentiate, is_plain, kernels
from fastformer.ops.random import draw_seed, drop_numbers, dropout
from fastformer.ops.validate import FLOATS, check_probability, check_tensor, matches

_DTYPES = (*FLOATS, torch.float64)
_kinds = Kinds()


class _Numbers(NamedTuple):
    """What backward needs to know beside tensors; dtypes of input, residual, weight and bias."""

    p: float
    eps: float
    offset: float
    rms: bool
    out_dtype: torch.dtype
    dtypes: tuple[torch.dtype | None, ...]


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
            kind = Kind(_norm_op, run, tensors, _numbers(*tensors, *numbers), 2 if keep_sum else 1)
            found = _kinds.keep(key, kind)(*tensors)
            return found if keep_sum else (found, input)
    if keep_sum:
        return _add_norm_op(*tensors, *numbers)
    return _norm_op(*tensors, *numbers), input


def _bind(
    numbers: _Numbers, needs: Sequence[bool], grads: tuple[Tensor | None, ...], saved: tuple[Any, ...]
) -> Callable[..., tuple[Tensor | None, ...]] | None:
    dy, dz = grads if len(grads) == 2 else (*grads, None)
    if dy is None:
        return None
    total, stats, weight, _, row_scale, seed = saved
    wanted, shared = _wanted(numbers, needs, row_scale, seed)
    run = kernels("norm_backward").bind_backward(
        dy, dz, total, stats, weight, row_scale, seed, *drop_numbers(numbers.p), numbers.offset, numbers.rms, *wanted
    )
    if run is None:
        return None

    def back(grads: tuple[Tensor | None, ...], saved: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
        dy, dz = grads if len(grads) == 2 else (*grads, None)
        total, stats, weight, _, row_scale, seed = saved
        dx, dr, dw, db = run(dy, dz, total, stats, weight, row_scale, seed)
        return dr if shared else dx, dr, dw, db, None, None

    return back


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
        branch = dropout(input, p, seed)
        if row_scale is not None:
            branch = (branch * row_scale.unsqueeze(-1)).to(branch.dtype)
        total = (residual + branch).to(sum_dtype)
    out = _affine_reference(total, weight, bias, eps, offset, rms)
    return (out if out_dtype is None else out.to(out_dtype)), total


def _affine_reference(
    total: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float, rms: bool
) -> Tensor:
    if weight is not None and offset:
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32)) + offset
    return norm_reference(total, weight, bias, eps, rms)


def norm_reference(total: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool) -> Tensor:
    """LayerNorm or RMSNorm by PyTorch, in fp32 where it takes no mixture of dtypes; in fp64 the tests' reference."""
    shape, dtype = total.shape[-1:], total.dtype
    mixed = any(w is not None and w.dtype != dtype for w in (weight, bias))
    mixed &= not autocasts(total.device)
    if mixed:
        total = total.float()
        weight, bias = (None if w is None else w.float() for w in (weight, bias))
    out = F.rms_norm(total, shape, weight, eps) if rms else F.layer_norm(total, shape, weight, bias, eps)
    return out.to(dtype) if mixed else out


def _forward(
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
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """(normed, statistics), the sum not kept."""
    return kernels("norm").norm_forward(
        input, residual, weight, bias, row_scale, seed, *drop_numbers(p), eps, offset, rms, sum_dtype, out_dtype, False
    )[::2]  # fmt: skip


def _forward_sum(
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
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """(normed, sum, statistics)."""
    return kernels("norm").norm_forward(
        input, residual, weight, bias, row_scale, seed, *drop_numbers(p), eps, offset, rms, sum_dtype, out_dtype, True
    )  # fmt: skip


def _forward_fake(input, residual, weight, bias, row_scale, seed, p, eps, offset, rms, sum_dtype, out_dtype):
    rows = input.numel() // input.shape[-1]
    stats = input.new_empty((1 if rms else 2, rows), dtype=torch.float32)
    return input.new_empty(input.shape, dtype=out_dtype), stats


def _forward_sum_fake(input, *rest):
    out, stats = _forward_fake(input, *rest)
    return out, input.new_empty(input.shape, dtype=rest[-2]), stats


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.numbers = _numbers(*inputs)
    ctx.save_for_backward(*_saved(ctx.numbers, inputs, output))


def _numbers(
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
    out_dtype: torch.dtype,
) -> _Numbers:
    dtypes = tuple(None if t is None else t.dtype for t in (input, residual, weight, bias))
    return _Numbers(p, eps, offset, rms, out_dtype, dtypes)


def _saved(numbers: _Numbers, tensors: tuple[Any, ...], results: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
    """z, statistics, weight, bias, row scale, seed."""
    input, _, weight, bias, row_scale, seed, *_ = tensors
    kept = len(results) == 3 and results[1] is not None
    return results[1] if kept else input, results[-1], weight, bias, row_scale, seed


def _wanted(
    numbers: _Numbers, needs: Sequence[bool], row_scale: Tensor | None, seed: Tensor | None
) -> tuple[list[torch.dtype | None], bool]:
    """Dtypes of the gradients that are needed, of input, residual, weight and bias; and whether input's is residual's:
    without dropout or row scale both get the same tensor, as from stock's addition."""
    dx, dr, dw, db = (dtype if need else None for dtype, need in zip(numbers.dtypes, needs, strict=False))
    shared = dx is not None and dx == dr and seed is None and row_scale is None
    return [None if shared else dx, dr, dw, db], shared


_NOTHING = (None,) * 8


def _backward(ctx: Any, dy: Tensor | None, dz: Tensor | None = None, _: None = None) -> tuple[Any, ...]:
    if dy is None and dz is None:
        return None, None, None, None, *_NOTHING
    total, stats, weight, _, row_scale, seed = ctx.saved_tensors
    numbers = ctx.numbers
    wanted, shared = _wanted(numbers, ctx.needs_input_grad, row_scale, seed)
    if dy is None:
        dy = torch.zeros_like(total)
    found = iter(
        _norm_backward(dy, dz, total, stats, weight, row_scale, seed, numbers.p, numbers.offset, numbers.rms, *wanted)
    )
    gradients = [None if dtype is None else next(found) for dtype in wanted]
    if shared:
        gradients[0] = gradients[1]
    return *gradients, *_NOTHING


def _second(ctx: Any, dy: Tensor | None, dz: Tensor | None = None, _: None = None) -> tuple[Any, ...]:
    total, _, weight, bias, row_scale, seed = ctx.saved_tensors
    p, eps, offset, rms, out_dtype, dtypes = ctx.numbers

    def reference(total: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return _affine_reference(total, weight, bias, eps, offset, rms).to(out_dtype)

    gradient, dw, db = differentiate("norm", reference, (total, weight, bias), (dy,))
    parts = [part.to(total.dtype) for part in (gradient, dz) if part is not None]
    if not parts:
        return None, None, dw, db, *_NOTHING
    whole = sum(parts[1:], parts[0])
    branch = whole if row_scale is None else whole * row_scale.unsqueeze(-1)
    branch = dropout(branch, p, seed)
    return branch.to(dtypes[0]), None if dtypes[1] is None else whole.to(dtypes[1]), dw, db, *_NOTHING


def _run_backward(
    dy: Tensor,
    dz: Tensor | None,
    total: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    row_scale: Tensor | None,
    seed: Tensor | None,
    p: float,
    offset: float,
    rms: bool,
    input_dtype: torch.dtype | None,
    residual_dtype: torch.dtype | None,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
) -> list[Tensor]:
    return kernels("norm_backward").norm_backward(
        dy, dz, total, stats, weight, row_scale, seed, *drop_numbers(p), offset, rms,
        input_dtype, residual_dtype, weight_dtype, bias_dtype,
    )  # fmt: skip


def _run_backward_fake(dy, dz, total, stats, weight, row_scale, seed, p, offset, rms, *dtypes):
    shapes = (total.shape, total.shape, total.shape[-1:], total.shape[-1:])
    return [total.new_empty(s, dtype=d) for s, d in zip(shapes, dtypes, strict=True) if d is not None]


# Two registrations of one function: a norm alone has a single result, which is cheaper to hand out than two.
_norm_op = Operator(
    "norm", _forward, _forward_fake, _setup_context, _backward, _second, visible=1, saved=_saved, bind=_bind
)
_add_norm_op = Operator("add_norm", _forward_sum, _forward_sum_fake, _setup_context, _backward, _second, visible=2)
_norm_backward = Kernel("norm_backward", _run_backward, _run_backward_fake)
