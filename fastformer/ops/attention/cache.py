"""Attention over a key and value cache: append the new tokens, then attend, in contiguous or paged memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastformer.ops.attention import kernel
from fastformer.ops.attention.options import Options, check_extras, check_heads, once, read_options, values_at_hand
from fastformer.ops.attention.reference import attention_reference
from fastformer.ops.backend import backend_for
from fastformer.ops.operator import Kernel, Kinds, is_plain, kernels
from fastformer.ops.rotary import rotary_reference
from fastformer.ops.validate import FLOATS, check_tensor

# The widest head whose tiles a decoding kernel holds in one piece.
_MAX_HEAD_DIM = 512
_kinds = Kinds()


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
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    interleaved: bool = False,
    window: tuple[int | None, int | None] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Append k and v to the cache in place, then attend from query to everything cached. Not differentiable.

    Queries stand at the end of their sequence (bottom-right alignment): query i of Sq is at position
    p = length - Sq + i, where length counts the appended tokens, and sees keys up to p. Nothing waits for the device,
    and what is launched follows from shapes alone: a CUDA graph of the call serves every length.

    Args:
        query: (B, Sq, H, D).
        k_cache, v_cache: contiguous (B, S, Hk, D) and (B, S, Hk, Dv); or with block_table pages,
            (P, page, Hk, D) and (P, page, Hk, Dv). Written in place where k and v are given.
        cache_seqlens: int32 (B,), tokens cached before this call; the caller adds Sn afterwards. Together with Sn at
            most the cache's length; on a GPU that is not checked, and what does not fit is not stored.
        block_table: int32 (B, N): page of every block of a sequence, or None. Entries behind a sequence's end may hold
            anything.
        k, v: (B, Sn, Hk, D) and (B, Sn, Hk, Dv), appended behind cache_seqlens; both or neither.
        cos, sin: (positions, R / 2) with R <= D, turn query and k by their positions before anything else, as
            `rotary_embedding` does (whose layouts `interleaved` chooses from); both or neither, and only with k and v.
            A position beyond the table gives NaN.
        is_causal, scale, window, softcap, alibi_slopes, sinks: as in `scaled_dot_product_attention`.

    Returns:
        output (B, Sq, H, Dv); with return_lse also the LSE, (B, H, Sq) fp32.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """

    given = (query, k_cache, v_cache, cache_seqlens, block_table, k, v, cos, sin, alibi_slopes, sinks)
    numbers = (is_causal, scale, interleaved, window, softcap)
    mark, known = _kinds.find(numbers, *given)
    if known is not None:
        _check_lengths(k_cache, cache_seqlens, block_table, k)
        found = known(*given)
        return found if return_lse else found[0]

    def check() -> Options:
        _check(query, k_cache, v_cache, cache_seqlens, block_table, k, v)
        _check_angles(query, k, cos, sin)
        check_extras(query, query.shape[2], query.shape[0], alibi_slopes, sinks, None)
        return read_options(query.shape[3], 0.0, is_causal, scale, "bottom-right", window, softcap)

    options = once(check, given, ("cache", *numbers))
    _check_lengths(k_cache, cache_seqlens, block_table, k)
    extras = (alibi_slopes, sinks)
    if backend_for(query.device) == "triton":
        reason = _why_not(query, k_cache, v_cache)
        if reason is None:
            found = _run(mark, given, options, interleaved)
            return found if return_lse else found[0]
        kernel.say_once(reason)
    with torch.no_grad():
        lengths = cache_seqlens
        if k is not None and v is not None:
            lengths = cache_seqlens + k.shape[1]
            if cos is not None and sin is not None:
                query = _turn(query, cos, sin, lengths - query.shape[1], interleaved)
                k = _turn(k, cos, sin, cache_seqlens, interleaved)
            _append(k_cache, cache_seqlens, block_table, k)
            _append(v_cache, cache_seqlens, block_table, v)
        keys, values = (_rows(x, block_table, lengths).transpose(1, 2) for x in (k_cache, v_cache))
        out, lse = _attend(query.transpose(1, 2), keys, values, lengths, options, *extras)
    out = out.transpose(1, 2)
    return (out, lse) if return_lse else out


def _why_not(query: Tensor, k_cache: Tensor, v_cache: Tensor) -> str | None:
    """Why the kernels cannot take this call, None if they can."""
    if query.dtype not in FLOATS:
        return f"{query.dtype} inputs"
    widest = max(query.shape[-1], v_cache.shape[-1])
    if widest > _MAX_HEAD_DIM or min(query.shape[-1], v_cache.shape[-1]) < 1:
        return f"a head dimension of {widest}"
    if k_cache.stride(-1) != 1 or v_cache.stride(-1) != 1:
        return "a cache whose last stride is not 1"
    return None


def _run(mark: Any, given: tuple[Any, ...], options: Options, interleaved: bool) -> tuple[Tensor, Tensor]:
    """What the kernels say; small tensors that they cannot read in place are copied first.

    Args:
        mark: under which calls like this one are to be found, None for none. given: all tensors of the call.
    """
    query, k_cache, v_cache, *small = given
    query = query if query.stride(-1) == 1 else query.contiguous()
    # New keys and values may lie apart from token to token, what is one number a place may not.
    seqlens, table, k, v, cos, sin = (
        x if x is None or x.stride(-1) == 1 else x.contiguous() for x in small[:6]
    )  # fmt: skip
    slopes, sinks = (None if x is None else x.contiguous() for x in small[6:])
    tensors = (query, k_cache, v_cache, seqlens, table, k, v, cos, sin, slopes, sinks)
    rules = (options.is_causal, options.scale, options.left, options.right, options.softcap)
    if mark is not None and is_plain(tensors) and all(a is b for a, b in zip(tensors, given, strict=True)):
        decode = kernels("attention.decode")
        return _kinds.keep(mark, decode.bind_decode(*tensors, decode.Rules(*rules, interleaved)))(*tensors)
    if k is None:
        return _attend_kernel(*tensors[:5], slopes, sinks, *rules)
    return _append_kernel(*tensors, *rules, interleaved)


def _attend_only(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    slopes: Tensor | None,
    sinks: Tensor | None,
    causal: bool,
    scale: float,
    left: int,
    right: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    decode = kernels("attention.decode")
    rules = decode.Rules(causal, scale, left, right, softcap, False)
    return decode.attention_decode(
        query, k_cache, v_cache, cache_seqlens, block_table, None, None, None, None, slopes, sinks, rules
    )


def _append_and_attend(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    slopes: Tensor | None,
    sinks: Tensor | None,
    causal: bool,
    scale: float,
    left: int,
    right: int,
    softcap: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    decode = kernels("attention.decode")
    rules = decode.Rules(causal, scale, left, right, softcap, interleaved)
    return decode.attention_decode(
        query, k_cache, v_cache, cache_seqlens, block_table, k, v, cos, sin, slopes, sinks, rules
    )


def _fake(query: Tensor, k_cache: Tensor, v_cache: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    batch, q_len, heads, _ = query.shape
    return (
        query.new_empty((batch, q_len, heads, v_cache.shape[-1])),
        query.new_empty((batch, heads, q_len), dtype=torch.float32),
    )


_attend_kernel = Kernel("attention_cached", _attend_only, _fake)
_append_kernel = Kernel("attention_kv_cache", _append_and_attend, _fake, mutates=("k_cache", "v_cache"))


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


def _rows(cache: Tensor, block_table: Tensor | None, lengths: Tensor) -> Tensor:
    """(B, S, Hk, D) of a cache; pages are gathered, those behind a sequence's end from anywhere."""
    if block_table is None:
        return cache
    first = torch.arange(block_table.shape[1], device=cache.device) * cache.shape[1]
    pages = torch.where(first < lengths.view(-1, 1), block_table, 0)
    return cache[pages.long()].flatten(1, 2)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, first: Tensor, interleaved: bool) -> Tensor:
    """(B, S, H, D) turned by the angles of positions first … first + S - 1."""
    position = (first.view(-1, 1) + torch.arange(x.shape[1], device=x.device)).flatten()
    known = ((position >= 0) & (position < cos.shape[0])).unsqueeze(-1)
    position = position.clamp(0, max(cos.shape[0] - 1, 0)).long()
    rows = [torch.where(known, table[position], torch.nan) for table in (cos, sin)]
    return rotary_reference(x, rows[0], rows[1], None, interleaved, True)


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
        if k_cache.shape[1] < 1:
            raise ValueError(f"k_cache must hold pages of at least one token, got shape {tuple(k_cache.shape)}")
        check_tensor("block_table", block_table, dtypes=(torch.int32,), shape=(batch, None), device=query.device)
    elif k_cache.shape[0] != batch:
        raise ValueError(f"k_cache must have query's batch size {batch}, got {k_cache.shape[0]}")
    if (k is None) != (v is None):
        raise ValueError("k and v must both be given or both be None")
    if k is not None and v is not None:
        heads, dim, value_dim = k_cache.shape[2], k_cache.shape[3], v_cache.shape[3]
        check_tensor("k", k, dtypes=(query.dtype,), shape=(batch, None, heads, dim), device=query.device)
        check_tensor("v", v, dtypes=(query.dtype,), shape=(batch, k.shape[1], heads, value_dim), device=query.device)


def _check_angles(query: Tensor, k: Tensor | None, cos: Tensor | None, sin: Tensor | None) -> None:
    if cos is None and sin is None:
        return
    if cos is None or sin is None or k is None:
        raise ValueError("cos and sin must be given both or neither, and with k and v, which they turn")
    width = query.shape[-1]
    for name, table in (("cos", cos), ("sin", sin)):
        check_tensor(name, table, ndim=2, dtypes=(*FLOATS, torch.float64), device=query.device)
        if table.shape != cos.shape or not 0 < 2 * table.shape[1] <= width or table.shape[0] < 1:
            raise ValueError(
                f"{name} must be (positions, R / 2) with 0 < R <= {width}, cos and sin alike, got {tuple(table.shape)}"
            )


def _check_lengths(k_cache: Tensor, cache_seqlens: Tensor, block_table: Tensor | None, k: Tensor | None) -> None:
    """Check the lengths' values where they are at hand."""
    if not values_at_hand(cache_seqlens):
        return
    room = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    new = 0 if k is None else k.shape[1]
    lengths = cache_seqlens.tolist()
    if lengths and not 0 <= min(lengths) <= max(lengths) <= room - new:
        raise ValueError(
            f"cache_seqlens must lie between 0 and {room - new}, the cache's length less the new tokens, got {lengths}"
        )
