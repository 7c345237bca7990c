"""Rotary position embedding of queries and keys in one pass; the arithmetic stands in `fastformer.kernels.rotary`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastformer.ops.backend import backend_for
from fastformer.ops.operator import Kernel, Operator
from fastformer.ops.validate import FLOATS, check_tensor

_DTYPES = (*FLOATS, torch.float64)


def rotary_embedding(
    query: Tensor,
    key: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    *,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Turn queries and keys by their positions' angles.

    Args:
        query: (B, S, H, D), or packed (T, H, D); any strides, so `.transpose(1, 2)` of (B, H, S, D) serves.
        key: as query with its own number of heads, or None.
        cos, sin: (P, R / 2), one row a position, or (B, S, R / 2) or (1, S, R / 2), one row a token; R <= D, dimensions
            from R on are copied. Hugging Face's tables hold every angle twice: pass `cos[..., : R // 2]`. They take no
            gradient.
        position_ids: (B, S) or (T,) int64 rows of the table, for packed sequences those within each; None: 0, 1, 2, …
            On a GPU a position beyond the table gives NaN.
        interleaved: pairs are neighbours (GPT-J) and not half a head apart (GPT-NeoX, Llama).

    Returns:
        (query, key), new tensors in the dtypes of the old; arithmetic in float32.

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape or device.
    """
    check_tensor("query", query, dtypes=_DTYPES)
    if query.ndim not in (3, 4):
        raise ValueError(f"query must be (B, S, H, D) or (T, H, D), got shape {tuple(query.shape)}")
    lead, device, width = query.shape[:-2], query.device, query.shape[-1]
    if key is not None:
        check_tensor("key", key, dtypes=_DTYPES, shape=(*lead, None, width), device=device)
    for name, table in (("cos", cos), ("sin", sin)):
        check_tensor(name, table, dtypes=_DTYPES, device=device)
        if table.shape != cos.shape or table.ndim not in (2, 3) or 2 * table.shape[-1] > width:
            raise ValueError(
                f"{name} must be (positions, R / 2) or (batch, positions, R / 2) with R <= {width} and cos and sin "
                f"alike, got {tuple(table.shape)}"
            )
        if table.requires_grad:
            raise ValueError(f"{name} takes no gradient; detach it, got requires_grad=True")
    tokens = (1, *lead) if len(lead) == 1 else tuple(lead)
    by_token = False
    if cos.ndim == 3:
        if position_ids is not None:
            raise ValueError("position_ids must be None where cos and sin already have a row a token")
        if cos.shape[:2] not in (tokens, (1, tokens[1])):
            raise ValueError(f"cos must have shape ({tokens[0]} or 1, {tokens[1]}, R / 2), got {tuple(cos.shape)}")
        by_token = cos.shape[0] > 1
        cos, sin = (table.reshape(-1, table.shape[-1]) for table in (cos, sin))
    elif position_ids is not None:
        check_tensor("position_ids", position_ids, dtypes=(torch.int64, torch.int32), shape=lead, device=device)
        position_ids = position_ids.reshape(tokens).contiguous()
    elif cos.shape[0] < tokens[1]:
        raise ValueError(f"cos must have a row for each of {tokens[1]} positions, got {cos.shape[0]}")
    q = query.reshape(*tokens, *query.shape[-2:])
    k = None if key is None else key.reshape(*tokens, *key.shape[-2:])
    wide = query.dtype == torch.float64 or (key is not None and key.dtype == torch.float64)
    if backend_for(device) == "torch" or wide:
        options = (cos, sin, position_ids, interleaved, by_token)
        q, k = rotary_reference(q, *options), None if k is None else rotary_reference(k, *options)
    else:
        cos, sin = (table if table.stride(-1) == 1 else table.contiguous() for table in (cos, sin))
        q, k = _rotary_op(q, k, cos, sin, position_ids, interleaved, by_token)
    return q.reshape(query.shape), None if key is None or k is None else k.reshape(key.shape)


def rotary_reference(
    x: Tensor, cos: Tensor, sin: Tensor, position: Tensor | None, interleaved: bool, by_token: bool
) -> Tensor:
    """The same in PyTorch for one (B, S, H, D) tensor, in float32 at least."""
    batch, length = x.shape[:2]
    wide = torch.promote_types(x.dtype, torch.float32)
    if position is None:
        first = batch if by_token else 1
        position = torch.arange(first * length, device=x.device).view(first, length).expand(batch, -1)
    c, s = (table.to(wide)[position].unsqueeze(2) for table in (cos, sin))  # (B, S, 1, R / 2)
    half = cos.shape[-1]
    y = x.to(wide)
    if interleaved:
        a, b = y[..., 0 : 2 * half : 2], y[..., 1 : 2 * half : 2]
        turned = torch.stack((a * c - b * s, b * c + a * s), -1).flatten(-2)
    else:
        a, b = y[..., :half], y[..., half : 2 * half]
        turned = torch.cat((a * c - b * s, b * c + a * s), -1)
    return torch.cat((turned.to(x.dtype), x[..., 2 * half :]), -1)


def _run(
    query: Tensor,
    key: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    position: Tensor | None,
    interleaved: bool,
    by_token: bool,
    inverse: bool,
) -> list[Tensor]:
    from fastformer.kernels.rotary import rotate

    return rotate(query, key, cos, sin, position, interleaved, by_token, inverse)


def _run_fake(query, key, cos, sin, position, interleaved, by_token, inverse):
    outs = [torch.empty_like(x) for x in (query, key) if x is not None]
    return [out if out.stride(-1) == 1 else out.new_empty(out.shape) for out in outs]


def _forward(
    query: Tensor,
    key: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    position: Tensor | None,
    interleaved: bool,
    by_token: bool,
) -> tuple[Tensor, Tensor]:
    outs = _run(query, key, cos, sin, position, interleaved, by_token, False)
    return outs[0], outs[1] if key is not None else query.new_empty(0)


def _forward_fake(query, key, cos, sin, position, interleaved, by_token):
    outs = _run_fake(query, key, cos, sin, position, interleaved, by_token, False)
    return outs[0], outs[1] if key is not None else query.new_empty(0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, key, cos, sin, position, interleaved, by_token = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(cos, sin, position)
    ctx.options = (interleaved, by_token, True)
    ctx.has_key = key is not None


def _backward(ctx: Any, dquery: Tensor | None, dkey: Tensor | None) -> tuple[Any, ...]:
    sent = [d for d in (dquery, dkey if ctx.has_key else None) if d is not None]
    turned = iter(_turn(sent[0], sent[1] if len(sent) > 1 else None, *ctx.saved_tensors, *ctx.options) if sent else ())
    found_query = next(turned) if dquery is not None else None
    found_key = next(turned) if ctx.has_key and dkey is not None else None
    return found_query, found_key, None, None, None, None, None


_rotary_op = Operator("rotary_embedding", _forward, _forward_fake, _setup_context, _backward)
_turn = Kernel("rotary_embedding_turn", _run, _run_fake)
