"""The attention kernels as an operator: registration, derivative, and which calls they take."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch.autograd import forward_ad

from fastformer.ops.attention.options import Options
from fastformer.ops.attention.packed_reference import varlen_reference
from fastformer.ops.attention.reference import attention_reference
from fastformer.ops.operator import Kernel, Operator, differentiate, kernels
from fastformer.ops.random import dropout_threshold
from fastformer.ops.validate import FLOATS

_warned: set[str] = set()


def why_not(query: Tensor, value: Tensor, *others: Tensor | None) -> str | None:
    """Why the kernels cannot take this call, None if they can.

    Args:
        others: the call's other floating-point tensors.
    """
    if query.dtype not in FLOATS:
        return f"{query.dtype} inputs"
    if min(query.shape[-1], value.shape[-1]) < 1:
        return "a head dimension of 0"
    if has_tangent(query, value, *others):
        return "a forward-mode derivative"
    if _is_differentiated_by_func():
        return "a derivative by torch.func"
    return None


def _is_differentiated_by_func() -> bool:
    """Whether torch.func takes a derivative, which registered operators have none for."""
    if functorch.maybe_current_level() is None:
        return False
    derivatives = (functorch.TransformType.Grad, functorch.TransformType.Jvp)
    return any(level.key() in derivatives for level in functorch.get_interpreter_stack())


def has_tangent(*tensors: Tensor | None) -> bool:
    """Whether a forward-mode derivative is being taken through one of these tensors."""
    if forward_ad._current_level < 0:
        return False
    return any(x is not None and forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def say_once(reason: str) -> None:
    """Warn, once a process and reason, that PyTorch's operations stand in for the kernels."""
    if reason not in _warned and not torch.compiler.is_compiling():
        _warned.add(reason)
        warnings.warn(
            f"fastformer attention: {reason} is not in the Triton kernels; PyTorch operations compute this call "
            "(the same result, slower and in more memory)",
            stacklevel=3,
        )


def run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    max_q: int,
    max_k: int,
    options: Options,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    dropout_seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output and LSE from the kernels; tensors whose last stride is not 1 are copied first.

    Returns:
        output like query; LSE (B, H, Sq), or (T, H) for packed calls, fp32.
    """
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    if attn_mask is not None:
        attn_mask = attn_mask[(None,) * (4 - attn_mask.ndim)]
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.contiguous()
    if sinks is not None:
        sinks = sinks.contiguous()
    out, lse = attention(
        query,
        key,
        value,
        cu_q,
        cu_k,
        max_q,
        max_k,
        attn_mask,
        alibi_slopes,
        sinks,
        dropout_seed,
        options.dropout_p,
        options.is_causal,
        options.scale,
        options.bottom_right,
        options.left,
        options.right,
        options.softcap,
    )
    return out, lse if cu_q is None else lse.t()


def make_call(tensors: tuple[Any, ...], numbers: tuple[Any, ...]) -> Any:
    query, key, _, cu_q, _, max_q, max_k, mask, *extras = tensors
    if mask is not None:
        # Only here, so that the gradient has the shape that was given.
        packed = cu_q is not None
        batch = cu_q.shape[0] - 1 if packed else query.shape[0]
        lengths = (max_q, max_k) if packed else (query.shape[2], key.shape[2])
        mask = mask.expand(batch, query.shape[1], *lengths)
        tensors = (*tensors[:7], mask, *extras)
    dropout_p, *rest = numbers
    arguments: list[Any] = [*tensors, dropout_p, dropout_threshold(dropout_p), *rest]
    return kernels("attention.call").Call(*arguments)


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    max_q: int,
    max_k: int,
    mask: Tensor | None,
    slopes: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    causal: bool,
    scale: float,
    bottom_right: bool,
    left: int,
    right: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    numbers = (dropout_p, causal, scale, bottom_right, left, right, softcap)
    return kernels("attention.forward").attention_forward(
        make_call((query, key, value, cu_q, cu_k, max_q, max_k, mask, slopes, sinks, seed), numbers)
    )


def _like(x: Tensor, packed: bool, last: int) -> Tensor:
    """What the launchers' `Call.empty_like` makes: tokens outside heads in memory."""
    if packed:
        return x.new_empty((x.shape[0], x.shape[1], last))
    return x.new_empty((x.shape[0], x.shape[2], x.shape[1], last)).transpose(1, 2)


def _fake(query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
    packed = cu_q is not None
    shape = (query.shape[1], query.shape[0]) if packed else query.shape[:3]
    return _like(query, packed, value.shape[-1]), query.new_empty(shape, dtype=torch.float32)


def _backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    mask: Tensor | None,
    slopes: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    causal: bool,
    scale: float,
    bottom_right: bool,
    left: int,
    right: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    numbers = (dropout_p, causal, scale, bottom_right, left, right, softcap)
    call = make_call((query, key, value, cu_q, cu_k, max_q, max_k, mask, slopes, sinks, seed), numbers)
    return kernels("attention.backward").attention_backward(call, out, lse, grad_out, grad_lse)


def _fake_backward(query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    packed = cu_q is not None
    dq, dk, dv = (_like(x, packed, x.shape[-1]) for x in (query, key, value))
    return dq, dk, dv, torch.empty_like(rest[6])


_backward_kernel = Kernel("attention_backward", _backward, _fake_backward)


def _bias_gradient(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    mask: Tensor | None,
    slopes: Tensor | None,
    seed: Tensor | None,
    lse: Tensor,
    delta: Tensor,
    grad_out: Tensor,
    of_slopes: bool,
    max_q: int,
    max_k: int,
    dropout_p: float,
    causal: bool,
    scale: float,
    bottom_right: bool,
    left: int,
    right: int,
    softcap: float,
) -> Tensor:
    """Gradient of mask, or with of_slopes of slopes."""
    numbers = (dropout_p, causal, scale, bottom_right, left, right, softcap)
    call = make_call((query, key, value, cu_q, cu_k, max_q, max_k, mask, slopes, None, seed), numbers)
    source = slopes if of_slopes else mask
    assert source is not None
    batch = source.shape[0] if source.ndim > 1 else 1
    shape = (batch, source.shape[-1], 1, 1) if of_slopes else tuple(source.shape)
    found = kernels("attention.bias").attention_bias_gradient(call, lse, delta, grad_out, shape, of_slopes)
    return found.view(source.shape)


def _fake_bias_gradient(*args: Any) -> Tensor:
    source = args[6] if args[11] else args[5]
    return source.new_empty(source.shape)


_bias_kernel = Kernel("attention_bias_gradient", _bias_gradient, _fake_bias_gradient)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, cu_q, cu_k, max_q, max_k, mask, slopes, sinks, seed, *numbers = inputs
    ctx.save_for_backward(query, key, value, cu_q, cu_k, mask, slopes, sinks, seed, *output)
    ctx.numbers = max_q, max_k, *numbers
    ctx.set_materialize_grads(False)


def _run_backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    *inputs, sinks, seed, out, lse = tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    elif grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    dq, dk, dv, delta = _backward_kernel(*tensors, grad_out, grad_lse, *ctx.numbers)
    dsinks = None
    if sinks is not None:
        # A sink is a score without a value: its gradient is -p_sink * delta, summed over the rows of its head.
        head_axis = 1 if lse.ndim == 3 else 0
        shape = [1] * lse.ndim
        shape[head_axis] = -1
        share = torch.where(lse == -torch.inf, 0.0, torch.exp(sinks.float().view(shape) - lse) * delta)
        dsinks = -share.sum([a for a in range(lse.ndim) if a != head_axis]).to(sinks.dtype)
    dmask, dslopes = (
        _bias_kernel(*inputs, seed, lse, delta, grad_out, of_slopes, *ctx.numbers) if wanted else None
        for of_slopes, wanted in ((False, ctx.needs_input_grad[7]), (True, ctx.needs_input_grad[8]))
    )
    return dq, dk, dv, *[None] * 4, dmask, dslopes, dsinks, *[None] * 8  # in the order of `_forward`'s arguments


def _run_second(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    """The first derivative again, from PyTorch's operations, so that it has a derivative of its own."""
    query, key, value, cu_q, cu_k, mask, slopes, sinks, seed, _out, _lse = ctx.saved_tensors
    max_q, max_k, *numbers = ctx.numbers
    options = Options(*numbers)

    def reference(
        query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, slopes: Tensor | None, sinks: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if cu_q is None:
            return attention_reference(query, key, value, options, mask, slopes, sinks, seed)
        out, lse = varlen_reference(query, key, value, cu_q, cu_k, max_q, max_k, options, mask, slopes, sinks, seed)
        return out, lse.t()

    tensors = (query, key, value, mask, slopes, sinks)
    dq, dk, dv, *extras = differentiate("attention", reference, tensors, (grad_out, grad_lse))
    return dq, dk, dv, *[None] * 4, *extras, *[None] * 8


attention = Operator("attention", _forward, _fake, _setup, _run_backward, _run_second)
