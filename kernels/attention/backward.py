"""Backward pass of attention in two kernels, without atomics: dQ, then dK and dV (Dao 2023).

- The first also stores delta = rowsum(dO * O) - dLSE, which the second needs.
- Short sequences take the one kernel of `short`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastformer.kernels.attention.backward_key import backward_key
from fastformer.kernels.attention.backward_query import backward_query
from fastformer.kernels.attention.call import Call, as_bytes, hopper_launchers
from fastformer.kernels.attention.config import backward_config, bind, short_config, takes_short_backward
from fastformer.kernels.attention.short import short_backward
from fastformer.kernels.attention.wide import wide_key, wide_query
from fastformer.kernels.launch import Bound
from fastformer.kernels.rows import cdiv
from fastformer.kernels.targets import hopper_chosen, target_of

Backward = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]


def attention_backward(
    call: Call,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    into: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of a call.

    Args:
        call: as in forward. out, lse: what forward returned. grad_out: like out, last stride 1.
        grad_lse: like lse, any strides, or None.
        into: memory for dQ, dK, dV, shaped as query, key, value, last stride 1; None: allocated here, laid out as
            (B, S, H, D).

    Returns:
        dQ, dK, dV, and delta (like lse): rowsum(dO * O) - dLSE.
    """
    return bind_backward(call, out, grad_out, grad_lse, into)(*call.tensors, out, lse, grad_out, grad_lse, into)


def bind_backward(
    call: Call,
    out: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    into: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Backward:
    """`attention_backward` as a function of `Call.tensors` and its other arguments, for all calls with these numbers
    whose other arguments lie in memory like these."""
    layouts = [None if x is None else x.stride() for x in (out, grad_out, grad_lse, *(into or ()))]
    if not hopper_chosen(call.query.device):
        return call.once(
            ("backward", call.short_backward, grad_out.dtype, *layouts), lambda: _backward_of(call, *layouts)
        )
    hopper = hopper_launchers()
    return call.once(
        ("Hopper backward", hopper.backward_query_kernel, hopper.backward_key_kernel, grad_out.dtype, *layouts),
        lambda: hopper.bind_backward(call, _backward_of(call, *layouts), *layouts),
    )


# Strides of a tensor, None where there is none.
_Layout = tuple[int, ...] | None


def _backward_of(call: Call, out: Any, grad_out: Any, grad_lse: _Layout, *into: Any) -> Backward:
    device, dtype = call.query.device, call.query.dtype
    made = [call.layout_like(x) for x in (call.query, call.key, call.value)]
    layouts = (out, grad_out, grad_lse, *(into or [strides for _, strides in made]))
    short = takes_short_backward(target_of(device), call)
    if short:
        all_three = _by_short(call, *layouts)
    else:
        by_query, by_key = _by_query(call, *layouts), _by_key(call, *layouts)
    rows, keys = call.query.numel() > 0, call.key.numel() > 0

    def run(
        query: Tensor, key: Tensor, value: Tensor, cu_q: Tensor | None, cu_k: Tensor | None, mask: Tensor | None,
        slopes: Tensor | None, sinks: Tensor | None, seed: Tensor | None, out: Tensor, lse: Tensor, grad_out: Tensor,
        grad_lse: Tensor | None, into: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        dq, dk, dv = into or [torch.empty_strided(*where, dtype=dtype, device=device) for where in made]
        delta = torch.empty_like(lse)
        places = (as_bytes(mask), slopes, seed, cu_q, cu_k)
        if short:
            if rows or keys:
                all_three.launch(query, key, value, grad_out, lse, grad_lse, delta, dq, dk, dv, *places)
            return dq, dk, dv, delta
        if rows:
            by_query.launch(query, key, value, out, grad_out, lse, grad_lse, delta, dq, *places)
        if keys:
            by_key.launch(query, key, value, grad_out, lse, delta, dk, dv, *places)
        return dq, dk, dv, delta

    return run


def _lse_strides(call: Call, grad_lse: _Layout) -> tuple[int, ...]:
    """(batch, head, token) strides of the gradient of the LSE."""
    if grad_lse is None:
        return 0, 0, 0
    return (0, *grad_lse) if call.packed else grad_lse


def _rules(call: Call) -> tuple[Any, ...]:
    return call.scale, *call.scales, call.left, call.right, call.threshold, call.keep_scale


def _by_short(call: Call, out: Any, grad_out: Any, grad_lse: _Layout, dq: Any, dk: Any, dv: Any) -> Bound:
    target = target_of(call.query.device)
    config = short_config(target, call, "short backward")
    others = (
        *call.strides(call.query), *call.strides(call.key), *call.strides(call.value), *call.along(grad_out),
        *call.along(dq), *call.along(dk), *call.along(dv), *call.row_strides(), *_lse_strides(call, grad_lse),
        *call.mask_strides, call.slope_stride, call.heads, call.q_len, call.k_len, *_tokens(call), call.batch,
        *_rules(call),
    )  # fmt: skip
    constants = {**call.constants, "ONCE": call.q_len <= config.block_m, **config.options(target)}
    return Bound(short_backward, (call.kv_heads * (call.batch + call.packed),), others, constants)


def _by_query(call: Call, out: Any, grad_out: Any, grad_lse: _Layout, dq: Any, dk: Any, dv: Any) -> Bound:
    target = target_of(call.query.device)
    config = backward_config(target, call)[0]
    tiles = max(1, cdiv(call.q_len, config.block_m))
    others = (
        *call.strides(call.query), *call.strides(call.key), *call.strides(call.value), *call.along(out),
        *call.along(grad_out), *call.along(dq), *call.row_strides(), *_lse_strides(call, grad_lse),
        *call.mask_strides, call.slope_stride, tiles, call.heads, call.q_len, call.k_len, _tokens(call)[0], call.batch,
        *_rules(call),
    )  # fmt: skip
    programs = tiles * call.heads * (call.batch + call.packed)
    return bind(target, call, backward_query, wide_query, programs, others, config, call.head_dim)


def _by_key(call: Call, out: Any, grad_out: Any, grad_lse: _Layout, dq: Any, dk: Any, dv: Any) -> Bound:
    target = target_of(call.query.device)
    config = backward_config(target, call)[1]
    tiles = max(1, cdiv(call.k_len, config.block_n))
    others = (
        *call.strides(call.query), *call.strides(call.key), *call.strides(call.value), *call.along(grad_out),
        *call.along(dk), *call.along(dv), *call.row_strides(), *call.mask_strides, call.slope_stride,
        tiles, call.heads, call.q_len, call.k_len, _tokens(call)[1], call.batch, *_rules(call),
    )  # fmt: skip
    programs = tiles * call.kv_heads * (call.batch + call.packed)
    columns = max(call.head_dim, call.value_dim)
    return bind(target, call, backward_key, wide_key, programs, others, config, columns)


def _tokens(call: Call) -> tuple[int, int]:
    """Packed tokens of queries and of keys, 0 of dense calls."""
    return (call.query.shape[0], call.key.shape[0]) if call.packed else (0, 0)
