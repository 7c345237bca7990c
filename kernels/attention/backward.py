"""Backward pass of attention in two kernels, without atomics: dQ, then dK and dV (Dao 2023).

- The first also stores delta = rowsum(dO * O) - dLSE, which the second needs.
- Short sequences take the one kernel of `short`.
"""

from typing import Any

import torch
from torch import Tensor

from fastformer.kernels.attention.backward_key import backward_key
from fastformer.kernels.attention.backward_query import backward_query
from fastformer.kernels.attention.call import Call, hopper_launchers
from fastformer.kernels.attention.config import (
    backward_config,
    short_config,
    takes_short_backward,
    wide_constants,
)
from fastformer.kernels.attention.short import short_backward
from fastformer.kernels.attention.wide import wide_key, wide_query
from fastformer.kernels.rows import cdiv
from fastformer.kernels.targets import hopper_chosen, target_of


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
    query, key, value = call.query, call.key, call.value
    dq, dk, dv = into or (call.empty_like(x) for x in (query, key, value))
    delta = torch.empty_like(lse)
    l_sb, l_sh = (0, query.shape[0]) if call.packed else (call.heads * call.q_len, call.q_len)
    dl_strides: tuple[int, ...]
    if grad_lse is None:
        dl_strides = (0, 0, 0)
    else:
        dl_strides = (0, *grad_lse.stride()) if call.packed else grad_lse.stride()
    numbers = (call.scale, *call.scales, call.left, call.right, call.threshold, call.keep_scale)
    batches = call.batch + call.packed

    def prepare_short() -> tuple[Any, ...]:
        target = target_of(query.device)
        config = short_config(target, call, "short backward")
        others = (
            *call.strides(query), *call.strides(key), *call.strides(value), *call.strides(grad_out),
            *call.strides(dq), *call.strides(dk), *call.strides(dv), l_sb, l_sh, *dl_strides, *call.mask_strides,
            call.slope_stride, call.heads, call.q_len, call.k_len,
            *((query.shape[0], key.shape[0]) if call.packed else (0, 0)), call.batch, *numbers,
        )  # fmt: skip
        constants = {**call.constants, "ONCE": call.q_len <= config.block_m, **config.options(target)}
        return short_backward, (call.kv_heads * batches,), others, constants

    def prepare_query() -> tuple[Any, ...]:
        target = target_of(query.device)
        config = backward_config(target, call)[0]
        tiles = max(1, cdiv(call.q_len, config.block_m))
        others = (
            *call.strides(query), *call.strides(key), *call.strides(value), *call.strides(out),
            *call.strides(grad_out), *call.strides(dq), l_sb, l_sh, *dl_strides, *call.mask_strides, call.slope_stride,
            tiles, call.heads, call.q_len, call.k_len, query.shape[0] if call.packed else 0, call.batch, *numbers,
        )  # fmt: skip
        programs = tiles * call.heads * batches
        if call.wide:
            constants, parts = wide_constants(target, call, call.head_dim)
            others = (*others, call.head_dim, call.value_dim)
            return wide_query, (parts * programs,), others, {**constants, **config.options(target)}
        return backward_query, (programs,), others, {**call.constants, **config.options(target)}

    def prepare_key() -> tuple[Any, ...]:
        target = target_of(query.device)
        config = backward_config(target, call)[1]
        tiles = max(1, cdiv(call.k_len, config.block_n))
        others = (
            *call.strides(query), *call.strides(key), *call.strides(value),
            *call.strides(grad_out), *call.strides(dk), *call.strides(dv), l_sb, l_sh,
            *call.mask_strides, call.slope_stride,
            tiles, call.heads, call.q_len, call.k_len, key.shape[0] if call.packed else 0, call.batch, *numbers,
        )  # fmt: skip
        programs = tiles * call.kv_heads * batches
        if call.wide:
            constants, parts = wide_constants(target, call, max(call.head_dim, call.value_dim))
            others = (*others, call.head_dim, call.value_dim)
            return wide_key, (parts * programs,), others, {**constants, **config.options(target)}
        return backward_key, (programs,), others, {**call.constants, **config.options(target)}

    chosen = hopper_chosen(query.device)
    if takes_short_backward(target_of(query.device), call) and not chosen:
        if query.numel() or key.numel() or value.numel():
            call.launch(
                ("short backward", grad_out.stride(), dl_strides, dq.stride(), dk.stride(), dv.stride()),
                (
                    query, key, value, grad_out, lse, grad_lse, delta, dq, dk, dv, call.mask, call.slopes, call.seed,
                    call.cu_q, call.cu_k,
                ),
                prepare_short,
            )  # fmt: skip
        return dq, dk, dv, delta
    if chosen and hopper_launchers().hopper_backward(call, out, lse, grad_out, grad_lse, delta, dq, dk, dv):
        return dq, dk, dv, delta
    if query.numel() or out.numel():
        call.launch(
            ("dQ", out.stride(), grad_out.stride(), dl_strides, dq.stride()),
            (
                query, key, value, out, grad_out, lse, grad_lse, delta, dq, call.mask, call.slopes, call.seed,
                call.cu_q, call.cu_k,
            ),
            prepare_query,
        )  # fmt: skip
    if key.numel() or value.numel():
        call.launch(
            ("dK and dV", grad_out.stride(), dk.stride(), dv.stride()),
            (
                query, key, value, grad_out, lse, delta, dk, dv, call.mask, call.slopes, call.seed,
                call.cu_q, call.cu_k,
            ),
            prepare_key,
        )  # fmt: skip
    return dq, dk, dv, delta
