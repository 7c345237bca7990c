"""The attention kernels as an operator: registration, derivative, and which calls they take."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from fastformer.ops.attention.options import MAX_HEAD_DIM, Options
from fastformer.ops.attention.packed_reference import varlen_reference
from fastformer.ops.attention.reference import attention_reference
from fastformer.ops.operator import Kernel, Operator, kernels
from fastformer.ops.random import dropout_threshold
from fastformer.ops.validate import FLOATS

_warned: set[str] = set()


def why_not(
    query: Tensor,
    value: Tensor,
    options: Options,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    grad: bool,
) -> str | None:
    """Why the kernels cannot take this call, None if they can.

    Args:
        grad: whether a derivative may be asked for.
    """
    head_dim = max(query.shape[-1], value.shape[-1])
    if query.dtype not in FLOATS:
        return f"{query.dtype} inputs"
    # The tables of fastformer.kernels.attention.config end there.
    widest = MAX_HEAD_DIM if query.dtype != torch.float32 else 64
    if head_dim > widest or min(query.shape[-1], value.shape[-1]) < 1:
        return f"a head dimension of {head_dim} in {query.dtype}"
    ruled = attn_mask is not None or alibi_slopes is not None or options.has_window or options.bottom_right
    if head_dim > 256 and (ruled or options.dropout_p or options.softcap):
        return f"a head dimension of {head_dim} with more rules than top-left causal"
    if grad and attn_mask is not None and attn_mask.requires_grad:
        return "the gradient of attn_mask"
    if grad and alibi_slopes is not None and alibi_slopes.requires_grad:
        return "the gradient of alibi_slopes"
    return None


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
        attn_mask = attn_mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
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


def _call(tensors: tuple[Any, ...], numbers: tuple[Any, ...]) -> Any:
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
        _call((query, key, value, cu_q, cu_k, max_q, max_k, mask, slopes, sinks, seed), numbers)
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
    call = _call((query, key, value, cu_q, cu_k, max_q, max_k, mask, slopes, sinks, seed), numbers)
    return kernels("attention.backward").attention_backward(call, out, lse, grad_out, grad_lse)


def _fake_backward(query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    packed = cu_q is not None
    dq, dk, dv = (_like(x, packed, x.shape[-1]) for x in (query, key, value))
    return dq, dk, dv, torch.empty_like(rest[6])


_backward_kernel = Kernel("attention_backward", _backward, _fake_backward)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, cu_q, cu_k, max_q, max_k, mask, slopes, sinks, seed, *numbers = inputs
    ctx.save_for_backward(query, key, value, cu_q, cu_k, mask, slopes, sinks, seed, *output)
    ctx.numbers = max_q, max_k, *numbers
    ctx.set_materialize_grads(False)


def _run_backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    sinks, out, lse = tensors[7], tensors[9], tensors[10]
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
    return dq, dk, dv, *[None] * 6, dsinks, *[None] * 8  # in the order of `_forward`'s arguments


def _run_second(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    """The first derivative again, from PyTorch's operations, so that it has a derivative of its own."""
    say_once("a second derivative")
    query, key, value, cu_q, cu_k, mask, slopes, sinks, seed, _out, _lse = ctx.saved_tensors
    max_q, max_k, *numbers = ctx.numbers
    options = Options(*numbers)
    if cu_q is None:
        out, lse = attention_reference(query, key, value, options, mask, slopes, sinks, seed)
    else:
        out, lse = varlen_reference(query, key, value, cu_q, cu_k, max_q, max_k, options, slopes, sinks, seed)
        lse = lse.t()
    inputs = [query, key, value] + ([sinks] if sinks is not None else [])
    wanted = [x for x in inputs if x.requires_grad]
    pairs = [(o, g) for o, g in ((out, grad_out), (lse, grad_lse)) if g is not None]
    outputs, grads = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=True, allow_unused=True))
    by_input = [next(found) if x.requires_grad else None for x in inputs]
    dsinks = by_input[3] if sinks is not None else None
    return *by_input[:3], *[None] * 6, dsinks, *[None] * 8


attention = Operator("attention", _forward, _fake, _setup, _run_backward, _run_second)
