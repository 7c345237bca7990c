"""The operators behind `fastformer.ops.norm`: registration, what is saved, derivatives."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastformer.ops.backend import autocasts
from fastformer.ops.operator import Kernel, Operator, differentiate, kernels
from fastformer.ops.random import drop_numbers, dropout


class Numbers(NamedTuple):
    """What backward needs to know beside tensors; dtypes of input, residual, weight and bias."""

    p: float
    eps: float
    offset: float
    rms: bool
    out_dtype: torch.dtype
    dtypes: tuple[torch.dtype | None, ...]


def affine_reference(
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


def _forward(*arguments: Any) -> Any:
    """(normed, statistics), the sum not kept."""
    *tensors, p, eps, offset, rms, sum_dtype, out_dtype = arguments
    numbers = (*drop_numbers(p), eps, offset, rms, sum_dtype, out_dtype, False)
    return kernels("norm").norm_forward(*tensors, *numbers)[::2]


# The schema is inferred from it: `_forward_sum`'s, a result shorter.
_forward.__signature__ = inspect.signature(_forward_sum).replace(  # type: ignore[attr-defined]
    return_annotation="tuple[Tensor, Tensor]"
)


def _forward_fake(input, residual, weight, bias, row_scale, seed, p, eps, offset, rms, sum_dtype, out_dtype):
    rows = input.numel() // input.shape[-1]
    stats = input.new_empty((1 if rms else 2, rows), dtype=torch.float32)
    return input.new_empty(input.shape, dtype=out_dtype), stats


def _forward_sum_fake(input, *rest):
    out, stats = _forward_fake(input, *rest)
    return out, input.new_empty(input.shape, dtype=rest[-2]), stats


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.numbers = numbers_of(inputs)
    ctx.save_for_backward(*_saved(ctx.numbers, inputs, output))


def numbers_of(inputs: Sequence[Any]) -> Numbers:
    """inputs: as the registered functions take them."""
    *tensors, p, eps, offset, rms, _, out_dtype = inputs
    dtypes = tuple(None if t is None else t.dtype for t in tensors[:4])
    return Numbers(p, eps, offset, rms, out_dtype, dtypes)


def _saved(numbers: Numbers, tensors: tuple[Any, ...], results: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
    """z, statistics, weight, row scale, seed. No derivative depends on bias."""
    kept = len(results) == 3 and results[1] is not None
    return results[1] if kept else tensors[0], results[-1], tensors[2], tensors[4], tensors[5]


def _wanted(
    numbers: Numbers, needs: Sequence[bool], row_scale: Tensor | None, seed: Tensor | None
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
    total, stats, weight, row_scale, seed = ctx.saved_tensors
    numbers = ctx.numbers
    wanted, shared = _wanted(numbers, ctx.needs_input_grad, row_scale, seed)
    if dy is None:
        dy = torch.zeros_like(total)
    found = iter(
        norm_backward(dy, dz, total, stats, weight, row_scale, seed, numbers.p, numbers.offset, numbers.rms, *wanted)
    )
    gradients = [None if dtype is None else next(found) for dtype in wanted]
    if shared:
        gradients[0] = gradients[1]
    return *gradients, *_NOTHING


def _second(ctx: Any, dy: Tensor | None, dz: Tensor | None = None, _: None = None) -> tuple[Any, ...]:
    total, _, weight, row_scale, seed = ctx.saved_tensors
    p, eps, offset, rms, out_dtype, dtypes = ctx.numbers
    bias = None
    if ctx.needs_input_grad[3]:
        bias = torch.zeros(total.shape[-1:], dtype=dtypes[3], device=total.device, requires_grad=True)

    def reference(total: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return affine_reference(total, weight, bias, eps, offset, rms).to(out_dtype)

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


def _bind(
    numbers: Numbers, needs: Sequence[bool], grads: tuple[Tensor | None, ...], saved: tuple[Any, ...]
) -> tuple[Callable[..., tuple[Tensor | None, ...]], Sequence[int | None]] | None:
    dy, dz = grads if len(grads) == 2 else (*grads, None)
    if dy is None:
        return None
    wanted, shared = _wanted(numbers, needs, *saved[3:])
    run = kernels("norm_backward").bind_backward(
        dy, dz, *saved, *drop_numbers(numbers.p), numbers.offset, numbers.rms, *wanted
    )
    if run is None:
        return None
    back = run if len(grads) == 2 else lambda dy, *saved: run(dy, None, *saved)
    return back, (1 if shared else 0, 1, 2, 3, None, None)


# Two registrations of one function: a norm alone has a single result, which is cheaper to hand out than two.
norm_op = Operator(
    "norm", _forward, _forward_fake, _setup_context, _backward, _second, visible=1, saved=_saved, bind=_bind
)
add_norm_op = Operator("add_norm", _forward_sum, _forward_sum_fake, _setup_context, _backward, _second, visible=2)
norm_backward = Kernel("norm_backward", _run_backward, _run_backward_fake)
