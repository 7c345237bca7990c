"""Attention over packed sequences: tokens of all sequences in one row, no padding."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from fastformer.ops.attention import kernel
from fastformer.ops.attention.options import Options, check_extras, check_heads, once, read_options
from fastformer.ops.attention.packed_cpu import packed_cpu
from fastformer.ops.attention.packed_reference import varlen_reference
from fastformer.ops.backend import backend_for
from fastformer.ops.random import draw_seed
from fastformer.ops.validate import check_tensor


def attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    causal_alignment: str = "top-left",
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    dropout_seed: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of every packed sequence to itself (or to the packed sequence of the same number in key).

    Sequence i has queries `query[cu_seqlens_q[i]:cu_seqlens_q[i + 1]]` and keys
    `key[cu_seqlens_k[i]:cu_seqlens_k[i + 1]]`; either may be empty. Tokens after the last boundary, if the tensors are
    longer, get output 0 and gradient 0. Options mean what they mean in `scaled_dot_product_attention`, within each
    sequence.

    Args:
        query: (T, H, D) in fp32, fp16, bf16 (or fp64 on the CPU); key: (Tk, Hk, D); value: (Tk, Hk, Dv). Any strides
            with a last one of 1 are read in place.
        cu_seqlens_q, cu_seqlens_k: int32 (B + 1,), on query's device, from 0, never falling, within the tensor.
        max_seqlen_q, max_seqlen_k: length of the longest sequence, or more; plain ints, so that nothing waits for the
            device. Smaller than a sequence is undefined on a GPU and an error on the CPU.
        alibi_slopes: (H,) or (B, H).
        dropout_seed: int64 of one element; None draws one from PyTorch's generator.

    Returns:
        output (T, H, Dv); with return_lse also the log-sum-exp of every row, (T, H) in fp32, -inf where a row has
        nothing to attend to.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """

    def check() -> Options:
        check_tensor("query", query, ndim=3)
        check_heads(query, key, value, 1, enable_gqa)
        options = read_options(query.shape[-1], dropout_p, is_causal, scale, causal_alignment, window, softcap)
        batch = _check_boundaries(query, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        check_extras(query, query.shape[1], batch, alibi_slopes, sinks, dropout_seed)
        return options

    options = once(
        check,
        (query, key, value, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks, dropout_seed),
        (
            "packed",
            max_seqlen_q,
            max_seqlen_k,
            dropout_p,
            is_causal,
            scale,
            enable_gqa,
            causal_alignment,
            window,
            softcap,
        ),
    )
    # Reading these does not wait for a device.
    if query.device.type == "cpu" and type(cu_seqlens_q) is Tensor and not torch.compiler.is_compiling():
        _check_values("q", cu_seqlens_q, max_seqlen_q, query.shape[0])
        _check_values("k", cu_seqlens_k, max_seqlen_k, key.shape[0])
    if torch.is_autocast_enabled(query.device.type) and query.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if backend_for(query.device) == "triton":
        reason = kernel.why_not(query, value, options, None, alibi_slopes, torch.is_grad_enabled())
        if reason is None:
            if dropout_seed is None and options.dropout_p:
                dropout_seed = draw_seed(query.device)
            out, lse = kernel.run(
                query,
                key,
                value,
                cu_seqlens_q,
                cu_seqlens_k,
                max_seqlen_q,
                max_seqlen_k,
                options,
                None,
                alibi_slopes,
                sinks,
                dropout_seed,
            )
            return (out, lse) if return_lse else out
        kernel.say_once(reason)
    extras = (alibi_slopes, sinks, dropout_seed)
    if query.device.type == "cpu" and not return_lse and _is_plain(options) and all(x is None for x in extras):
        seed = draw_seed(query.device) if dropout_p else None
        # Under autocast PyTorch would round the fp32 scores inside to half precision.
        with torch.autocast("cpu", enabled=False):
            out, _ = packed_cpu(
                query,
                key,
                value,
                cu_seqlens_q,
                cu_seqlens_k,
                options.dropout_p,
                options.is_causal,
                options.bottom_right,
                options.scale,
                seed,
            )
        return out
    out, lse = varlen_reference(
        query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, options, *extras
    )
    return (out, lse) if return_lse else out


def _is_plain(options: Options) -> bool:
    return not options.softcap and (not options.banded or (options.left < 0 and options.right < 0))


def _check_boundaries(
    query: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int
) -> int:
    """Check shapes and dtypes; returns the number of sequences."""
    for name, cu in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        check_tensor(name, cu, ndim=1, dtypes=(torch.int32,), device=query.device)
        if cu.shape[0] < 1:
            raise ValueError(f"{name} must hold B + 1 boundaries, got none")
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"cu_seqlens_k must bound as many sequences as cu_seqlens_q, {cu_seqlens_q.shape[0] - 1}, "
            f"got {cu_seqlens_k.shape[0] - 1}"
        )
    for name, longest in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if isinstance(longest, Tensor) or longest < 0:
            raise ValueError(f"{name} must be an int >= 0, got {longest!r}")
    return cu_seqlens_q.shape[0] - 1


def _check_values(which: str, cu_seqlens: Tensor, longest: int, tokens: int) -> None:
    bounds = cu_seqlens.tolist()
    lengths = [b - a for a, b in itertools.pairwise(bounds)]
    if bounds[0] != 0 or bounds[-1] > tokens or min(lengths, default=0) < 0:
        raise ValueError(
            f"cu_seqlens_{which} must start at 0, never fall, and end within {tokens} tokens, got {bounds}"
        )
    if max(lengths, default=0) > longest:
        raise ValueError(f"max_seqlen_{which} must be at least the longest sequence, {max(lengths)}, got {longest}")
