"""Attention over a key and value cache: append the new tokens, then attend, in contiguous or paged memory."""

from __future__ import annotations

import torch
from torch import Tensor

from fastformer.ops.attention import kernel
from fastformer.ops.attention.options import Options, check_extras, check_heads, read_options
from fastformer.ops.attention.reference import attention_reference
from fastformer.ops.backend import backend_for
from fastformer.ops.validate import check_tensor


def attention_kv_cache(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None = None,
    k: Tensor | None = None,
    v: Tensor | None = None,
    is_causal: bool = True,
    scale: float | None = None,
    *,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Append k and v to the cache in place, then attend from query to everything cached. Not differentiable.

    Queries stand at the end of their sequence (bottom-right alignment): query i of Sq sees keys up to
    length - Sq + i, where length counts the appended tokens. Nothing waits for the device.

    Args:
        query: (B, Sq, H, D).
        k_cache, v_cache: contiguous (B, S, Hk, D) and (B, S, Hk, Dv); or with block_table pages,
            (P, page, Hk, D) and (P, page, Hk, Dv). Written in place where k and v are given.
        cache_seqlens: int32 (B,), tokens cached before this call; the caller adds Sn afterwards. Together with Sn at
            most the cache's length, which is undefined behaviour on a GPU and not checked.
        block_table: int32 (B, N): page of every block of a sequence, or None.
        k, v: (B, Sn, Hk, D) and (B, Sn, Hk, Dv), appended behind cache_seqlens; both or neither. Rotate them first.

    Returns:
        output (B, Sq, H, Dv); with return_lse also the LSE, (B, H, Sq) fp32.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """
    _check(query, k_cache, v_cache, cache_seqlens, block_table, k, v)
    batch, _, heads, head_dim = query.shape
    check_extras(query, heads, batch, alibi_slopes, sinks, None)
    options = read_options(head_dim, 0.0, is_causal, scale, "bottom-right", window, softcap)
    with torch.no_grad():
        lengths = cache_seqlens
        if k is not None and v is not None:
            _append(k_cache, cache_seqlens, block_table, k)
            _append(v_cache, cache_seqlens, block_table, v)
            lengths = cache_seqlens + k.shape[1]
        if backend_for(query.device) == "triton":
            kernel.say_once("attention over a cache")
        keys, values = (_rows(x, block_table).transpose(1, 2) for x in (k_cache, v_cache))
        out, lse = _attend(query.transpose(1, 2), keys, values, lengths, options, alibi_slopes, sinks)
    out = out.transpose(1, 2)
    return (out, lse) if return_lse else out


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    options: Options,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    # What lies behind a sequence's end is never a number that counts.
    hidden = torch.arange(key.shape[2], device=key.device) >= lengths.view(-1, 1)
    hidden = hidden[:, None, :, None]
    full = torch.full_like(lengths, query.shape[2])
    return attention_reference(
        query,
        key.masked_fill(hidden, 0.0),
        value.masked_fill(hidden, 0.0),
        options,
        None,
        alibi_slopes,
        sinks,
        None,
        full,
        lengths,
    )


def _rows(cache: Tensor, block_table: Tensor | None) -> Tensor:
    """(B, S, Hk, D) of a cache; pages are gathered."""
    if block_table is None:
        return cache
    pages = cache[block_table.clamp(min=0).long()]
    return pages.flatten(1, 2)


def _append(cache: Tensor, lengths: Tensor, block_table: Tensor | None, new: Tensor) -> None:
    place = lengths.view(-1, 1).long() + torch.arange(new.shape[1], device=new.device)
    if block_table is None:
        first = torch.arange(new.shape[0], device=new.device).view(-1, 1)
    else:
        page = cache.shape[1]
        first = block_table.long().gather(1, place // page)
        place = place % page
    cache.index_put_((first, place), new.to(cache.dtype))


def _check(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    k: Tensor | None,
    v: Tensor | None,
) -> None:
    check_tensor("query", query, ndim=4)
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_tensor(name, cache, ndim=4, dtypes=(query.dtype,), device=query.device)
    check_heads(query, k_cache, v_cache, 2, True)
    batch = query.shape[0]
    check_tensor("cache_seqlens", cache_seqlens, dtypes=(torch.int32,), shape=(batch,), device=query.device)
    if block_table is not None:
        check_tensor("block_table", block_table, dtypes=(torch.int32,), shape=(batch, None), device=query.device)
    elif k_cache.shape[0] != batch:
        raise ValueError(f"k_cache must have query's batch size {batch}, got {k_cache.shape[0]}")
    if (k is None) != (v is None):
        raise ValueError("k and v must both be given or both be None")
    if k is not None and v is not None:
        heads, dim, value_dim = k_cache.shape[2], k_cache.shape[3], v_cache.shape[3]
        check_tensor("k", k, dtypes=(query.dtype,), shape=(batch, None, heads, dim), device=query.device)
        check_tensor("v", v, dtypes=(query.dtype,), shape=(batch, k.shape[1], heads, value_dim), device=query.device)
