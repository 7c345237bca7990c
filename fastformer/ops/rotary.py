"""Rotary position embedding of queries and keys in one pass; the arithmetic stands in `fastformer.kernels.rotary`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastformer.ops.backend import backend_for
from fastformer.ops.operator import Kernel, Kind, Kinds, Operator, is_plain, kernels, on_its_device, say_once
from fastformer.ops.validate import FLOATS, check_tensor, matches

_DTYPES = (*FLOATS, torch.float64)
_kinds = Kinds()


class _Numbers(NamedTuple):
    """What backward needs to know beside tensors, which may be laid out as the caller gave them.

    Attributes:
        table: (P, R / 2), shape of cos and sin; tokens: (B, S), of the positions.
        packed: whether query and key are (T, H, D) and not (B, S, H, D).
    """

    interleaved: bool
    by_token: bool
    table: tuple[int, ...]
    tokens: tuple[int, ...]
    has_key: bool
    packed: bool


def rotary_embedding(
    query: Tensor,
    key: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None = None,
    *,
    interleaved: bool = False,
    inplace: bool = False,
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
        inplace: write over query and key, where no element of them lies under another. Backward needs neither; where
            another operation's does (it saved one of them), autograd says so when that backward runs, as for any
            operation in place. Leaves that require a gradient are refused.

    Returns:
        (query, key) in the dtypes of the old, new tensors or with `inplace` the same; arithmetic in float32.

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape, device or memory layout.
        RuntimeError: autograd's own, `inplace` on a view that it does not let be modified (of split, chunk, unbind).
    """
    mark, known = (None, None) if inplace else _kinds.find(interleaved, query, key, cos, sin, position_ids)
    if known is not None:
        turned = known(query, key, cos, sin, position_ids)
        return (turned, None) if key is None else turned
    given = (query, key, cos, sin, position_ids)
    check_tensor("query", query, dtypes=_DTYPES)
    if query.ndim not in (3, 4):
        raise ValueError(f"query must be (B, S, H, D) or (T, H, D), got shape {tuple(query.shape)}")
    lead, device, width = query.shape[:-2], query.device, query.shape[-1]
    if key is not None:
        check_tensor("key", key, dtypes=_DTYPES, shape=(*lead, None, width), device=device)
    for name, table in (("cos", cos), ("sin", sin)):
        if name == "cos" or not matches(table, cos.shape, device):
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
    if inplace:
        _check_inplace(query, key)
    packed = query.ndim == 3
    q = query.unsqueeze(0) if packed else query
    k = key.unsqueeze(0) if packed and key is not None else key
    wide = query.dtype == torch.float64 or (key is not None and key.dtype == torch.float64)
    options = (position_ids, interleaved, by_token)
    if backend_for(device) == "torch" or wide:
        q_out, k_out = (None if x is None else rotary_reference(x, cos, sin, *options) for x in (q, k))
    else:
        cos, sin = (table if table.stride(-1) == 1 else table.contiguous() for table in (cos, sin))
        if inplace and is_plain((query, key)):
            _turn_in_place(q, k, cos, sin, *options)
            return query, key
        operands = (cos, sin, position_ids)
        if mark is not None and _same_memory(operands, given[2:]) and is_plain(given):
            run = kernels("rotary").bind(query, key, *operands, interleaved, by_token, False)
            numbers = _Numbers(interleaved, by_token, cos.shape, tokens, key is not None, packed)
            turned = _kinds.keep(mark, Kind(_rotary_op, run, given, numbers, 1 if key is None else 2))(*given)
            return (turned, None) if key is None else turned
        q_out, k_out = _rotary_op(q, k, cos, sin, *options)
    assert q_out is not None
    if packed:
        q_out, k_out = q_out.squeeze(0), None if key is None or k_out is None else k_out.squeeze(0)
    if inplace:
        return query.copy_(q_out), None if key is None or k_out is None else key.copy_(k_out)
    return q_out, None if key is None else k_out


def _same_memory(tensors: Sequence[Tensor | None], others: Sequence[Tensor | None]) -> bool:
    return all(a is None or b is None or a.data_ptr() == b.data_ptr() for a, b in zip(tensors, others, strict=True))


def _check_inplace(query: Tensor, key: Tensor | None) -> None:
    for name, x in (("query", query), ("key", key)):
        if x is None:
            continue
        if x.requires_grad and x.is_leaf and torch.is_grad_enabled():
            raise ValueError(f"{name} must not be a leaf that requires a gradient with inplace=True")
        if _overlaps_itself(x):
            raise ValueError(
                f"{name} must hold every element once with inplace=True, got shape {tuple(x.shape)} with strides "
                f"{x.stride()}"
            )
    if key is not None and _may_overlap(query, key):
        raise ValueError("query and key must not share memory with inplace=True")


def _overlaps_itself(x: Tensor) -> bool:
    reach = 0
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def _may_overlap(query: Tensor, key: Tensor) -> bool:
    """Whether some element may belong to both; those of one projection, told apart by their offset in a token, do not.

    False is certain; True is also said of layouts that the comparison below does not know.
    """
    if query.untyped_storage().data_ptr() != key.untyped_storage().data_ptr() or not query.numel() or not key.numel():
        return False
    if query.dtype != key.dtype:
        return True
    starts, sizes = zip(*((x.storage_offset(), _reach(x, 0)) for x in (query, key)), strict=True)
    if starts[0] + sizes[0] <= starts[1] or starts[1] + sizes[1] <= starts[0]:
        return False
    # Both in steps of one stride: apart if their parts of a step are.
    lead = [(a, b) for a, b, n in zip(query.stride()[:-2], key.stride()[:-2], query.shape, strict=False) if n > 1]
    if not lead or any(a != b for a, b in lead):
        return True
    step = min(a for a, _ in lead)
    if any(a % step for a, _ in lead):
        return True
    q_part, k_part = (_reach(x, x.ndim - 2) for x in (query, key))
    distance = (starts[1] - starts[0]) % step
    return distance < q_part or distance + k_part > step


def _reach(x: Tensor, first: int) -> int:
    """Elements from the first to the last of dimensions `first` on, ends included."""
    return 1 + sum(stride * (size - 1) for stride, size in zip(x.stride()[first:], x.shape[first:], strict=True))


def rotary_reference(
    x: Tensor, cos: Tensor, sin: Tensor, position: Tensor | None, interleaved: bool, by_token: bool
) -> Tensor:
    """The same in PyTorch for one (B, S, H, D) tensor, in float32 at least."""
    batch, length = x.shape[:2]
    wide = torch.promote_types(x.dtype, torch.float32)
    half = cos.shape[-1]
    if position is not None:
        c, s = (table.to(wide)[position] for table in (cos, sin))
    else:
        first = batch if by_token else 1
        c, s = (table[: first * length].to(wide).view(first, length, half) for table in (cos, sin))
    c, s = c.unsqueeze(2), s.unsqueeze(2)  # (B or 1, S, 1, R / 2)
    y = x.to(wide)
    if interleaved:
        a, b = y[..., 0 : 2 * half : 2], y[..., 1 : 2 * half : 2]
        turned = torch.stack((a * c - b * s, b * c + a * s), -1).flatten(-2)
    else:
        a, b = y[..., :half], y[..., half : 2 * half]
        turned = torch.cat((a * c - b * s, b * c + a * s), -1)
    turned = turned.to(x.dtype)
    return turned if 2 * half == x.shape[-1] else torch.cat((turned, x[..., 2 * half :]), -1)


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
    return kernels("rotary").rotate(query, key, cos, sin, position, interleaved, by_token, inverse)


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
    outs = kernels("rotary").rotate(query, key, cos, sin, position, interleaved, by_token, False)
    return outs[0], outs[1] if key is not None else query.new_empty(0)


def _forward_fake(query, key, cos, sin, position, interleaved, by_token):
    outs = _run_fake(query, key, cos, sin, position, interleaved, by_token, False)
    return outs[0], outs[1] if key is not None else query.new_empty(0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, cos, _, _, interleaved, by_token = inputs
    ctx.set_materialize_grads(False)
    ctx.numbers = _Numbers(interleaved, by_token, cos.shape, query.shape[:2], key is not None, False)
    ctx.save_for_backward(*_saved(ctx.numbers, inputs, output))


def _saved(numbers: _Numbers, tensors: tuple[Any, ...], results: Any) -> tuple[Tensor | None, ...]:
    """cos, sin, positions."""
    return tensors[2:5]


def _tables(numbers: _Numbers, saved: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor | None]:
    """cos and sin (P, R / 2), positions (B, S)."""
    cos, sin, position = saved
    position = None if position is None else position.reshape(numbers.tokens)
    return cos.reshape(numbers.table), sin.reshape(numbers.table), position


def _bind(
    numbers: _Numbers, needs: Sequence[bool], grads: tuple[Tensor | None, ...], saved: tuple[Any, ...]
) -> tuple[Callable[..., list[Tensor]], Sequence[int | None]] | None:
    tables, present = _tables(numbers, saved), [g for g in grads if g is not None]
    if not present or not _same_memory(tables, saved):
        return None
    options = (numbers.interleaved, numbers.by_token, True)
    run = kernels("rotary").bind(present[0], present[1] if len(present) == 2 else None, *tables, *options)
    if len(present) == 2:
        return run, (0, 1, None, None, None)
    alone = int(grads[0] is None)

    def back(*tensors: Tensor | None) -> list[Tensor]:
        return run(tensors[alone], None, *tensors[len(grads) :])

    return back, (None if alone else 0, 0 if alone else None, None, None, None)


def _through(ctx: Any, grads: tuple[Any, ...], turn: Callable[..., Any]) -> tuple[Any, ...]:
    """`turn(dquery, dkey, cos, sin, positions, interleaved, by_token)` of (B, S, H, D), on gradients as they come."""
    numbers = ctx.numbers
    dquery, dkey = grads if numbers.has_key else (grads[0], None)
    dquery, dkey = (g.unsqueeze(0) if g is not None and numbers.packed else g for g in (dquery, dkey))
    tables = _tables(numbers, ctx.saved_tensors)
    found = turn(dquery, dkey, *tables, numbers.interleaved, numbers.by_token)
    return *(g.squeeze(0) if g is not None and numbers.packed else g for g in found), *_NOTHING


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    def turn(dquery: Tensor | None, dkey: Tensor | None, *rest: Any) -> Sequence[Tensor | None]:
        if dquery is not None and dkey is not None:
            return _turn(dquery, dkey, *rest, True)
        return [None if g is None else _turn(g, None, *rest, True)[0] for g in (dquery, dkey)]

    return _through(ctx, grads, turn)


_NOTHING = (None,) * 5


def _second(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    def turn(dquery: Tensor | None, dkey: Tensor | None, cos: Tensor, sin: Tensor, *rest: Any) -> list[Tensor | None]:
        return [None if g is None else rotary_reference(g, cos, -sin, *rest) for g in (dquery, dkey)]

    say_once("rotary_embedding")
    return _through(ctx, grads, turn)


_rotary_op = Operator(
    "rotary_embedding", _forward, _forward_fake, _setup_context, _backward, _second, saved=_saved, bind=_bind
)
_turn = Kernel("rotary_embedding_turn", _run, _run_fake)


class _InPlace(torch.autograd.Function):
    """One tensor: autograd follows views through a function in place only where that has a single result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *options: Any) -> Tensor:
        ctx.mark_dirty(x)
        cos, sin, position, *numbers = options
        ctx.save_for_backward(cos, sin, position)
        ctx.numbers = numbers
        _write(x, None, *options)
        return x

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        cos, sin, position = ctx.saved_tensors
        interleaved, by_token = ctx.numbers
        if torch.is_grad_enabled():
            say_once("rotary_embedding")
            return rotary_reference(dy, cos, -sin, position, interleaved, by_token), *_NOTHING
        return _turn(dy, None, cos, sin, position, interleaved, by_token, True)[0], *_NOTHING


@on_its_device
def _write(query: Tensor, key: Tensor | None, cos: Tensor, sin: Tensor, *options: Any) -> None:
    kernels("rotary").rotate(query, key, cos, sin, *options, False, True)


def _turn_in_place(query: Tensor, key: Tensor | None, *options: Any) -> None:
    """Overwrite query and key, (B, S, H, D)."""
    recorded = torch.is_grad_enabled() and (query.requires_grad or (key is not None and key.requires_grad))
    if not recorded:
        with torch.no_grad():
            _write(query, key, *options)
            # Whoever saved them must notice.
            torch.autograd.graph.increment_version(query if key is None else (query, key))
        return
    for x in (query, key):
        if x is not None:
            _InPlace.apply(x, *options)
