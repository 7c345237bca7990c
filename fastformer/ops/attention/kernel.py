"""The attention kernels as an operator: registration, derivative, and which calls they take."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch.autograd import forward_ad

from fastformer.ops.attention.options import Options
from fastformer.ops.attention.packed_reference import varlen_reference
from fastformer.ops.attention.reference import attention_reference
from fastformer.ops.operator import Kernel, Kind, Kinds, Operator, differentiate, is_plain, kernels
from fastformer.ops.random import draw_seed, dropout_threshold
from fastformer.ops.validate import FLOATS

_warned: set[str] = set()
_kinds = Kinds()


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


def attend(
    mark: Any, given: tuple[Any, ...], longest: tuple[int, int], options: Options, return_lse: bool
) -> Tensor | tuple[Tensor, Tensor]:
    """What the kernels say of a checked call; tensors that they cannot read in place are copied first.

    Args:
        mark: under which `find` is to know calls like this one, None for none.
        given: query, key, value, boundaries of queries and keys or None, and attn_mask, slopes, sinks, seed or None.
        longest: packed sequences; (0, 0) for dense calls.
    """
    query, key, value, cu_q, cu_k, mask, slopes, sinks, seed = given
    seed = _seed(options.dropout_p, query.device, seed)
    readable = [x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value)]
    small = [x if x is None or x.is_contiguous() else x.contiguous() for x in (cu_q, cu_k, slopes, sinks)]
    tensors = (*readable, *small[:2], mask, *small[2:], seed)
    numbers = (*longest, *dataclasses.astuple(options))
    copied = any(a is not b for a, b in zip(tensors[:-1], given, strict=False))
    kind = None if mark is None or copied else _kind_of(tensors, numbers, return_lse)
    if kind is not None:
        return _by_token(_kinds.keep(mark, kind)(*tensors), cu_q)
    mask = None if mask is None else mask[(None,) * (4 - mask.ndim)]
    found = attention(*tensors[:5], mask, *tensors[6:], *numbers)
    return _by_token(found if return_lse else found[0], cu_q)


def find(numbers: tuple[Any, ...], *tensors: Tensor | None) -> tuple[Any, Callable[..., Any] | None]:
    """(mark of a call, its kind if that is known).

    Args:
        numbers: the call's other arguments. tensors: those of `attend`.
    """
    return _kinds.find((numbers, tensors[3] is tensors[4]), *tensors)


def repeat(kind: Callable[..., Any], dropout_p: float, *tensors: Any) -> Tensor | tuple[Tensor, Tensor]:
    """A call of a known kind on its tensors, those of `attend`."""
    seed = _seed(dropout_p, tensors[0].device, tensors[8])
    return _by_token(kind(*tensors[:8], seed), tensors[3])


def _seed(dropout_p: float, device: torch.device, seed: Tensor | None) -> Tensor | None:
    """Dropout's seed, drawn if none was given."""
    if dropout_p == 0.0:
        return None
    return draw_seed(device) if seed is None else seed


def _by_token(found: Any, cu_q: Tensor | None) -> Tensor | tuple[Tensor, Tensor]:
    """Results with a packed call's LSE as callers see it, (T, H)."""
    return (found[0], found[1].t()) if cu_q is not None and type(found) is tuple else found


def _kind_of(tensors: tuple[Any, ...], numbers: tuple[Any, ...], return_lse: bool) -> Kind | None:
    """The kind of a call whose tensors the kernels read in place; None for those without."""
    _, _, _, cu_q, cu_k, *_ = tensors
    # Which rows may be empty depends on whether boundaries are the same memory; different tensors may be, once.
    shared = cu_q is not None and cu_q is not cu_k and cu_q.data_ptr() == cu_k.data_ptr()
    if shared or forward_ad._current_level >= 0 or not is_plain(tensors):
        return None
    launch = kernels("attention.forward").bind_forward(make_call(tensors, numbers))
    return Kind(attention, launch, tensors, numbers, None if return_lse else 1)


def make_call(tensors: tuple[Any, ...], numbers: tuple[Any, ...]) -> Any:
    """A launcher's `Call`.

    Args:
        tensors: those of `attend`. numbers: longest packed sequences of queries and keys, and `Options`.
    """
    query, key, value, cu_q, cu_k, mask, slopes, sinks, seed = tensors
    max_q, max_k, dropout_p, *rest = numbers
    if mask is not None:
        # Only here, so that the gradient has the shape that was given.
        packed = cu_q is not None
        batch = cu_q.shape[0] - 1 if packed else query.shape[0]
        lengths = (max_q, max_k) if packed else (query.shape[2], key.shape[2])
        mask = mask.expand(batch, query.shape[1], *lengths)
    arguments = (mask, slopes, sinks, seed, dropout_p, dropout_threshold(dropout_p), *rest)
    return kernels("attention.call").Call(query, key, value, cu_q, cu_k, max_q, max_k, *arguments)


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    mask: Tensor | None,
    slopes: Tensor | None,
    sinks: Tensor | None,
    seed: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    causal: bool,
    scale: float,
    bottom_right: bool,
    left: int,
    right: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    tensors = (query, key, value, cu_q, cu_k, mask, slopes, sinks, seed)
    numbers = (max_q, max_k, dropout_p, causal, scale, bottom_right, left, right, softcap)
    return kernels("attention.forward").attention_forward(make_call(tensors, numbers))


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
    numbers = (max_q, max_k, dropout_p, causal, scale, bottom_right, left, right, softcap)
    call = make_call((query, key, value, cu_q, cu_k, mask, slopes, sinks, seed), numbers)
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
    numbers = (max_q, max_k, dropout_p, causal, scale, bottom_right, left, right, softcap)
    call = make_call((query, key, value, cu_q, cu_k, mask, slopes, None, seed), numbers)
    source = slopes if of_slopes else mask
    assert source is not None
    batch = source.shape[0] if source.ndim > 1 else 1
    shape = (batch, source.shape[-1], 1, 1) if of_slopes else (*(1,) * (4 - source.ndim), *source.shape)
    found = kernels("attention.bias").attention_bias_gradient(call, lse, delta, grad_out, shape, of_slopes)
    return found.view(source.shape)


def _fake_bias_gradient(*args: Any) -> Tensor:
    source = args[6] if args[11] else args[5]
    return source.new_empty(source.shape)


_bias_kernel = Kernel("attention_bias_gradient", _bias_gradient, _fake_bias_gradient)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.numbers = inputs[9:]
    ctx.save_for_backward(*_saved(ctx.numbers, inputs, output))
    ctx.set_materialize_grads(False)


def _saved(numbers: Any, inputs: tuple[Any, ...], results: tuple[Tensor, Tensor]) -> tuple[Tensor | None, ...]:
    return *inputs[:9], *results


def _run_backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None = None) -> tuple[Tensor | None, ...]:
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
        for of_slopes, wanted in ((False, ctx.needs_input_grad[5]), (True, ctx.needs_input_grad[6]))
    )
    return dq, dk, dv, None, None, dmask, dslopes, dsinks, *[None] * 10  # in the order of `_forward`'s arguments


def _bind(
    numbers: tuple[Any, ...], needs: Sequence[bool], grads: tuple[Tensor | None, ...], saved: tuple[Any, ...]
) -> tuple[Callable[..., tuple[Tensor, ...]], Sequence[int | None]] | None:
    *tensors, out, _ = saved
    grad_out, grad_lse = grads if len(grads) == 2 else (*grads, None)
    extras = tensors[7] is not None or needs[5] or needs[6]  # sinks, or gradients of mask or slopes
    if extras or grad_out is None or grad_out.stride(-1) != 1:
        return None
    run = kernels("attention.backward").bind_backward(make_call(tuple(tensors), numbers), out, grad_out, grad_lse)

    def back(grad_out: Tensor, *others: Any) -> tuple[Tensor, ...]:
        if len(grads) == 2:
            grad_lse, *saved = others
            return run(*saved, grad_out, grad_lse)
        return run(*others, grad_out, None)

    return back, (0, 1, 2, *[None] * 6)


def _run_second(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None = None) -> tuple[Tensor | None, ...]:
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
    return dq, dk, dv, None, None, *extras, *[None] * 10


attention = Operator("attention", _forward, _fake, _setup, _run_backward, _run_second, saved=_saved, bind=_bind)
