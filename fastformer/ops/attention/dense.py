"""Attention over padded batches: PyTorch's scaled_dot_product_attention with everything fine-tuners ask for on top."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastformer.ops.attention import kernel
from fastformer.ops.attention.options import Options, check_extras, check_heads, check_mask, once, read_options
from fastformer.ops.attention.packed_cpu import attend_on_cpu, takes
from fastformer.ops.attention.reference import attention_reference
from fastformer.ops.backend import autocast_dtype, backend_for
from fastformer.ops.validate import check_tensor

# Held here, so that ours may be put in its place in torch.nn.functional.
_pytorchs_own = F.scaled_dot_product_attention


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
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
    """softmax(scale * Q K^T) V with the rules of `fastformer.ops.attention.options`, all of which combine.

    As `torch.nn.functional.scaled_dot_product_attention`, but: a row with nothing to attend to gives output 0 and
    gradient 0; NaN or Inf in a key or value that is masked out reaches neither output nor gradient; is_causal and
    attn_mask combine; rank 3 means one batch of heads.

    Args:
        query: (B, H, Sq, D) in fp32, fp16, bf16 (or fp64 on the CPU); key: (B, Hk, Sk, D); value: (B, Hk, Sk, Dv).
        attn_mask: bool (True: attend) or float (added to the scores; gets a gradient), 2-D to 4-D, broadcasts to
            (B, H, Sq, Sk).
        dropout_p: probability of dropping an attention probability.
        is_causal: key j is visible to query i only if j <= i (+ Sk - Sq with causal_alignment="bottom-right").
        scale: factor of the scores, 1 / sqrt(D) if None.
        enable_gqa: allow fewer key heads than query heads, shared by runs of neighbouring query heads.
        window: (left, right), how many keys are visible on either side of i (+ Sk - Sq for "bottom-right"); None or -1
            for no limit.
        softcap: scores become softcap * tanh(scores / softcap).
        alibi_slopes: (H,) or (B, H); get a gradient.
        sinks: (H,), one more logit in every row's denominator (gpt-oss).
        return_lse: also return the log-sum-exp of every row's scores (sinks included), (B, H, Sq) in fp32,
            differentiable; -inf where a row has nothing to attend to.
        dropout_seed: int64 of one element: the dropped elements are a function of it; None draws from PyTorch's
            generator.

    Returns:
        output (B, H, Sq, Dv) in query's dtype, or (output, lse).

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """
    numbers = (dropout_p, is_causal, scale, enable_gqa, causal_alignment, window, softcap, return_lse)
    given = (query, key, value, None, None, attn_mask, alibi_slopes, sinks, dropout_seed)
    mark, known = kernel.find(numbers, *given)
    if known is not None:
        return kernel.repeat(known, dropout_p, *given)
    check_tensor("query", query)
    if query.ndim == 3 and isinstance(key, Tensor) and isinstance(value, Tensor) and key.ndim == value.ndim == 3:
        result = scaled_dot_product_attention(
            query.unsqueeze(0),
            key.unsqueeze(0),
            value.unsqueeze(0),
            attn_mask,
            dropout_p,
            is_causal,
            scale,
            enable_gqa,
            causal_alignment=causal_alignment,
            window=window,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
            return_lse=return_lse,
            dropout_seed=dropout_seed,
        )
        return (result[0].squeeze(0), result[1].squeeze(0)) if isinstance(result, tuple) else result.squeeze(0)

    def check() -> Options:
        check_tensor("query", query, ndim=4)
        check_heads(query, key, value, 1, enable_gqa)
        batch, heads, q_len, head_dim = query.shape
        if key.shape[0] != batch:
            raise ValueError(f"key must have query's batch size {batch}, got {key.shape[0]}")
        check_extras(query, heads, batch, alibi_slopes, sinks, dropout_seed)
        check_mask(attn_mask, query, (batch, heads, q_len, key.shape[2]))
        return read_options(head_dim, dropout_p, is_causal, scale, causal_alignment, window, softcap)

    options = once(check, given, ("dense", *numbers))
    lower = autocast_dtype(query.device)
    if lower not in (None, query.dtype) and query.dtype != torch.float64:
        query, key, value, mark = query.to(lower), key.to(lower), value.to(lower), None
    if backend_for(query.device) == "triton":
        reason = kernel.why_not(query, value, key, attn_mask, alibi_slopes, sinks)
        if reason is None:
            tensors = (query, key, value, None, None, attn_mask, alibi_slopes, sinks, dropout_seed)
            return kernel.attend(mark, tensors, (0, 0), options, return_lse)
        kernel.say_once(reason)
    extras = (alibi_slopes, sinks, dropout_seed)
    # PyTorch's fused operators, and ours for the CPU, have no forward-mode derivative.
    plain = not return_lse and all(x is None for x in extras) and not kernel.has_tangent(query, key, value, attn_mask)
    if plain and _drops_on_cpu(query, key, options, attn_mask):
        return _as_packed(query, key, value, options, attn_mask)
    if plain and _stock_can(query, key, value, options, attn_mask):
        return _stock(query, key, value, options, attn_mask)
    out, lse = attention_reference(query, key, value, options, attn_mask, *extras)
    return (out, lse) if return_lse else out


def _drops_on_cpu(query: Tensor, key: Tensor, options: Options, attn_mask: Tensor | None) -> bool:
    """Whether a call is one for which PyTorch's CPU operator keeps all weights, and the packed one a seed."""
    if not options.dropout_p or query.device.type != "cpu" or torch._C._functorch.maybe_current_level() is not None:
        return False
    return query.numel() > 0 and key.numel() > 0 and takes(options, attn_mask)


def _as_packed(query: Tensor, key: Tensor, value: Tensor, options: Options, attn_mask: Tensor | None) -> Tensor:
    """Every row of the batch as one packed sequence."""
    batch, _, q_len, _ = query.shape
    k_len = key.shape[2]
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    ends_q, ends_k = (n * torch.arange(batch + 1, dtype=torch.int32) for n in (q_len, k_len))
    out = attend_on_cpu(q, k, v, ends_q, ends_k, options, attn_mask, (q_len, k_len))
    return out.unflatten(0, (batch, q_len)).transpose(1, 2)


def _stock_can(query: Tensor, key: Tensor, value: Tensor, options: Options, attn_mask: Tensor | None) -> bool:
    """Whether PyTorch's operator means the same by this call."""
    if options.softcap or options.left >= 0 or options.right >= 0:
        return False
    q_len, k_len = query.shape[2], key.shape[2]
    if options.is_causal and options.bottom_right and q_len != k_len:
        return False
    hides_pairs = options.is_causal or (attn_mask is not None and not _hides_keys(attn_mask))
    if hides_pairs and torch._C._functorch.maybe_current_level() is not None:
        return False  # under torch.func values cannot be looked at
    if hides_pairs and not torch.compiler.is_compiling() and type(key) is Tensor and key.device.type == "cpu":
        # PyTorch multiplies hidden values by zero, and 0 * NaN is NaN.
        return bool(torch.isfinite(key.detach().sum() + value.detach().sum()))
    return True


def _hides_keys(attn_mask: Tensor) -> bool:
    """Whether a mask is the same for all queries and heads, as a padding mask is."""
    return attn_mask.shape[-2] == 1 and (attn_mask.ndim == 2 or attn_mask.shape[-3] == 1)


def _stock(query: Tensor, key: Tensor, value: Tensor, options: Options, attn_mask: Tensor | None) -> Tensor:
    is_causal = options.is_causal
    if attn_mask is not None:
        if attn_mask.dtype != torch.bool:
            attn_mask = attn_mask.to(query.dtype)
        if _hides_keys(attn_mask):
            # No query sees these keys: select, since PyTorch multiplies hidden values by zero.
            seen = attn_mask if attn_mask.dtype == torch.bool else attn_mask.detach() != -torch.inf
            hidden = ~seen.transpose(-1, -2)
            key, value = key.masked_fill(hidden, 0.0), value.masked_fill(hidden, 0.0)
        if is_causal:
            # PyTorch takes one or the other.
            before = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
            both = attn_mask & before if attn_mask.dtype == torch.bool else torch.where(before, attn_mask, -torch.inf)
            attn_mask, is_causal = both, False
    return _pytorchs_own(
        query,
        key,
        value,
        attn_mask=attn_mask,
        dropout_p=options.dropout_p,
        is_causal=is_causal,
        scale=options.scale,
        enable_gqa=key.shape[1] != query.shape[1],
    )
