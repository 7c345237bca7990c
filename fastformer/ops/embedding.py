"""Word, position and token-type embedding, LayerNorm and dropout in one pass; see `fastformer.kernels.embedding`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastformer.ops.backend import autocasts, backend_for
from fastformer.ops.norm_operator import norm_reference
from fastformer.ops.operator import Kernel, Operator, differentiate, is_plain, kernels
from fastformer.ops.random import draw_seed, drop_numbers, dropout
from fastformer.ops.validate import FLOATS, check_probability, check_tensor

_DTYPES = (*FLOATS, torch.float64)
_INTEGERS = (torch.int64, torch.int32)


def embedding_layer_norm(
    input_ids: Tensor,
    word: Tensor,
    position: Tensor | None = None,
    token_type: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-12,
    dropout_p: float = 0.0,
    training: bool = True,
    *,
    position_ids: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    padding_idx: int | None = None,
    position_padding_idx: int | None = None,
    out_dtype: torch.dtype | None = None,
    dropout_seed: Tensor | None = None,
) -> Tensor:
    """dropout(LayerNorm(word[input_ids] + position[position_ids] + token_type[token_type_ids])).

    Args:
        input_ids: (..., S) int64 or int32; packed text is (T,).
        word, position, token_type: (rows, N) tables of one dtype; position and token_type may be None.
        weight, bias: (N,) or None.
        position_ids: shape of input_ids; None: 0 … S - 1.
        token_type_ids: shape of input_ids; None: 0.
        padding_idx, position_padding_idx: row of word, and of position, without a gradient, or None; negative: from
            the end.
        out_dtype, dropout_p, training, dropout_seed: as in `fastformer.ops.add_layer_norm`.

    Returns:
        (..., S, N). On a GPU an id that its table does not have gives NaN.

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape, device or range.
    """
    check_probability("dropout_p", dropout_p)
    check_tensor("input_ids", input_ids, dtypes=_INTEGERS)
    if input_ids.ndim == 0:
        raise ValueError("input_ids must have at least one dimension, got shape ()")
    shape, device = input_ids.shape, input_ids.device
    check_tensor("word", word, ndim=2, dtypes=_DTYPES, device=device)
    for name, table in (("position", position), ("token_type", token_type)):
        if table is not None:
            check_tensor(name, table, dtypes=(word.dtype,), shape=(None, word.shape[1]), device=device)
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            check_tensor(name, value, dtypes=_DTYPES, shape=word.shape[1:], device=device)
    for name, ids in (("position_ids", position_ids), ("token_type_ids", token_type_ids)):
        if ids is not None:
            check_tensor(name, ids, dtypes=_INTEGERS, shape=shape, device=device)
    if position is not None and position_ids is None and shape[-1] > position.shape[0]:
        raise ValueError(f"position must have a row for each of {shape[-1]} positions, got {position.shape[0]}")
    if dropout_seed is not None:
        check_tensor("dropout_seed", dropout_seed, dtypes=(torch.int64,), shape=(1,), device=device)
    padding = _row("padding_idx", padding_idx, word)
    position_padding = _row("position_padding_idx", position_padding_idx, position)
    p = dropout_p if training else 0.0
    tables = (word, position, token_type)
    if backend_for(device) == "torch" or word.dtype == torch.float64 or not _fits(word.shape[1]):
        arguments = (input_ids, position_ids, token_type_ids, *tables, weight, bias, dropout_seed)
        out = _reference(arguments, p, eps, padding, position_padding)
        return out if out_dtype is None else out.to(out_dtype)
    if out_dtype is None:
        out_dtype = torch.float32 if autocasts(device) else word.dtype
    if p == 0.0:
        dropout_seed = None
    elif dropout_seed is None:
        dropout_seed = draw_seed(device)
    packed = (None if t is None else t.contiguous() for t in (input_ids, position_ids, token_type_ids))
    dense = (None if t is None else t.contiguous() for t in (*tables, weight, bias))
    numbers = (p, eps, padding, position_padding, out_dtype, torch.is_grad_enabled())
    return _embed_op(*packed, *dense, dropout_seed, *numbers)


def number_tokens(input_ids: Tensor, padding_idx: int) -> Tensor:
    """RoBERTa's positions (B, S) int64: padding_idx + 1, padding_idx + 2, … at tokens that are not padding_idx, and
    padding_idx at those that are.

    Args:
        input_ids: (B, S) int64 or int32.
    """
    if backend_for(input_ids.device) != "torch" and is_plain((input_ids,)):
        return kernels("embedding").number_tokens(input_ids.contiguous(), padding_idx)
    real = (input_ids != padding_idx).long()
    return real.cumsum(dim=1) * real + padding_idx


def _row(name: str, index: int | None, table: Tensor | None) -> int:
    """A row of a table from its start; -1 for none."""
    if index is None or table is None:
        return -1
    if not -table.shape[0] <= index < table.shape[0]:
        raise ValueError(f"{name} must be a row of a table of {table.shape[0]}, got {index}")
    return index % table.shape[0]


def embedding_reference(
    ids: Tensor,
    place: Tensor | None,
    types: Tensor | None,
    word: Tensor,
    position: Tensor | None,
    token_type: Tensor | None,
    padding: int = -1,
    position_padding: int = -1,
) -> Tensor:
    """The sum of rows by PyTorch: types before places, the order BERT adds them in. padding: -1 for none."""
    total = F.embedding(ids, word, _or_none(padding))
    if token_type is not None:
        total = total + (token_type[0] if types is None else F.embedding(types, token_type))
    if position is not None and place is None and position_padding < 0:
        total = total + position[: ids.shape[-1]]
    elif position is not None:
        place = torch.arange(ids.shape[-1], device=ids.device) if place is None else place
        total = total + F.embedding(place, position, _or_none(position_padding))
    return total


def _or_none(padding: int) -> int | None:
    return padding if padding >= 0 else None


def _reference(arguments: tuple[Any, ...], p: float, eps: float, padding: int, position_padding: int) -> Tensor:
    """The operator by PyTorch; arguments: ids, place, types, word, position, token_type, weight, bias, seed."""
    ids, place, types, word, position, token_type, weight, bias, seed = arguments
    total = embedding_reference(ids, place, types, word, position, token_type, padding, position_padding)
    return dropout(norm_reference(total, weight, bias, eps, False), p, seed)


def _fits(width: int) -> bool:
    # An import of its own: torch.compile follows this one, and would not follow `kernels`.
    from fastformer.kernels.embedding import MAXIMUM_WIDTH

    return 0 < width <= MAXIMUM_WIDTH


def _forward(
    ids: Tensor,
    place: Tensor | None,
    types: Tensor | None,
    word: Tensor,
    position: Tensor | None,
    token_type: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    p: float,
    eps: float,
    padding: int,
    position_padding: int,
    out_dtype: torch.dtype,
    keep_sum: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    out, total, stats = kernels("embedding").embed_forward(
        ids, place, types, word, position, token_type, weight, bias, seed, *drop_numbers(p), eps, out_dtype, keep_sum
    )
    return out, word.new_empty(0) if total is None else total, stats


def _forward_fake(
    ids, place, types, word, position, token_type, weight, bias, seed, p, eps, padding, position_padding, out_dtype,
    keep_sum,
):  # fmt: skip
    shape = (*ids.shape, word.shape[1])
    return (
        word.new_empty(shape, dtype=out_dtype),
        word.new_empty(shape if keep_sum else 0),
        word.new_empty((2, ids.numel()), dtype=torch.float32),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ids, place, types, word, position, token_type, weight, bias, seed, *ctx.numbers, _ = inputs
    _, total, stats = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(total, stats, ids, place, types, word, position, token_type, weight, bias, seed)


_NOTHING = (None,) * 7
_scatter = torch.ops.aten.embedding_dense_backward


def _backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Any, ...]:
    if dy is None:
        return None, None, None, None, None, None, None, None, *_NOTHING
    total, stats, ids, place, types, word, position, token_type, weight, bias, seed = ctx.saved_tensors
    (p, _eps, padding, position_padding, _dtype), needs = ctx.numbers, ctx.needs_input_grad
    weight_dtype = weight.dtype if needs[6] else None
    bias_dtype = bias.dtype if needs[7] else None
    dz, *sums = _embed_backward(dy, total, stats, weight, seed, p, weight_dtype, bias_dtype)
    dweight = sums.pop(0) if needs[6] else None
    dbias = sums.pop() if needs[7] else None
    dword = dposition = dtype = None
    if needs[3]:
        dword = _scatter(dz, ids, word.shape[0], padding, False)
    if needs[4]:
        if place is None:
            length = ids.shape[-1]
            dposition = torch.zeros_like(position)
            torch.sum(dz.reshape(-1, length, dz.shape[-1]), 0, out=dposition[:length])
            if position_padding >= 0:
                dposition[position_padding].zero_()
        else:
            dposition = _scatter(dz, place, position.shape[0], position_padding, False)
    if needs[5]:
        if types is None:
            dtype = torch.zeros_like(token_type)
            torch.sum(dz.reshape(-1, dz.shape[-1]), 0, out=dtype[0])
        else:
            dtype = _scatter(dz, types, token_type.shape[0], -1, False)
    return None, None, None, dword, dposition, dtype, dweight, dbias, *_NOTHING


def _second(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Any, ...]:
    _total, _stats, ids, place, types, *parameters, seed = ctx.saved_tensors
    p, eps, padding, position_padding, out_dtype = ctx.numbers

    def reference(*tables: Any) -> Tensor:
        arguments = (ids, place, types, *tables, seed)
        return _reference(arguments, p, eps, padding, position_padding).to(out_dtype)

    return None, None, None, *differentiate("embedding_layer_norm", reference, parameters, (dy,)), *_NOTHING


def _run_backward(
    dy: Tensor,
    total: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    seed: Tensor | None,
    p: float,
    weight_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
) -> list[Tensor]:
    """Gradients of the sum of rows, weight and bias."""
    nothing = (0, 1.0)
    if seed is not None and dy.numel():
        arguments = (dy, dy, None, None, seed, *drop_numbers(p), "identity", dy.dtype, None, None)
        (dy,) = kernels("activation").activation_backward(*arguments)
    kinds = (total.dtype, None, weight_dtype, bias_dtype)
    run = kernels("norm_backward").norm_backward
    return run(dy, None, total, stats, weight, None, None, *nothing, 0.0, False, *kinds)


def _run_backward_fake(dy, total, stats, weight, seed, p, *dtypes):
    n = total.shape[-1:]
    return [torch.empty_like(total), *(total.new_empty(n, dtype=d) for d in dtypes if d is not None)]


_embed_op = Operator("embedding_layer_norm", _forward, _forward_fake, _setup_context, _backward, _second, visible=1)
_embed_backward = Kernel("embedding_layer_norm_backward", _run_backward, _run_backward_fake)
