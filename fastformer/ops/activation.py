"""Activations with the bias, gate, dropout and residual around them, one pass each way.

    y = residual + dropout(activation(gate + bias) * up)

Saved for backward: the inputs (which the matrix products before hold anyway) and the dropout seed; everything else is
recomputed. Arithmetic is fp32 between load and store.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastformer.ops.backend import backend_for
from fastformer.ops.operator import Kernel, Kind, Kinds, Operator, differentiate, is_plain, kernels
from fastformer.ops.random import draw_seed, drop_numbers, dropout
from fastformer.ops.validate import FLOATS, check_probability, check_tensor, matches

_DTYPES = (*FLOATS, torch.float64)
_kinds = Kinds()


class _Numbers(NamedTuple):
    """What backward needs to know beside tensors; the dtypes are those of gate (and up), bias and residual."""

    name: str
    p: float
    dtype: torch.dtype
    bias_dtype: torch.dtype | None
    residual_dtype: torch.dtype | None


REFERENCES = {
    "identity": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "relu_squared": lambda x: F.relu(x).square(),
}


def bias_gelu(input: Tensor, bias: Tensor | None = None, approximate: str = "none") -> Tensor:
    """gelu(input + bias).

    Args:
        input: (..., N), any strides.
        bias: (N,) or None; a bias of another dtype is rounded to input's, as autocast does to a linear layer's.
        approximate: "none" (exact) or "tanh".

    Returns:
        (..., N) in input's dtype.

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape, device or value.
    """
    return _activate(_gelu_kind(approximate), "input", input, bias=bias)


def geglu(gate: Tensor, up: Tensor, approximate: str = "none") -> Tensor:
    """gelu(gate) * up. gate, up: (..., N), any strides, so the halves of one projection serve; else as `bias_gelu`."""
    return _activate(_gelu_kind(approximate), "gate", gate, up=up)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up. Arguments, result and errors as `geglu`."""
    return _activate("silu", "gate", gate, up=up)


def relu_squared(input: Tensor) -> Tensor:
    """relu(input)^2. Arguments, result and errors as `bias_gelu`."""
    return _activate("relu_squared", "input", input)


def bias_dropout_add(
    input: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    dropout_p: float = 0.0,
    training: bool = True,
    *,
    dropout_seed: Tensor | None = None,
) -> Tensor:
    """residual + dropout(input + bias).

    Args:
        input: (..., N), any strides.
        bias: (N,) or None; rounded to input's dtype.
        residual: shape of input; its dtype may differ.
        dropout_p: probability of dropping an element while `training`.
        dropout_seed: (1,) int64; None draws one. The same seed drops the same elements.

    Returns:
        (..., N) in the promoted dtype of input and residual.

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape, device or range.
    """
    check_probability("dropout_p", dropout_p)
    p = dropout_p if training else 0.0
    return _activate("identity", "input", input, bias=bias, residual=residual, p=p, seed=dropout_seed)


def _gelu_kind(approximate: str) -> str:
    if approximate not in ("none", "tanh"):
        raise ValueError(f'approximate must be "none" or "tanh", got {approximate!r}')
    return "gelu" if approximate == "none" else "gelu_tanh"


def _activate(
    kind: str,
    name: str,
    gate: Tensor,
    up: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    key, known = _kinds.find((kind, p), gate, up, bias, residual, seed)
    if known is None:
        return _activate_anew(key, kind, name, gate, up, bias, residual, p, seed)
    if p == 0.0:
        seed = None
    elif seed is None:
        seed = draw_seed(gate.device)
    return known(gate, up, bias, residual, seed)


def _activate_anew(
    key: Any,
    kind: str,
    name: str,
    gate: Tensor,
    up: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    p: float,
    seed: Tensor | None,
) -> Tensor:
    """Check, choose and run; what was chosen is kept under `key` where later calls can take the same way."""
    given = bias
    check_tensor(name, gate, dtypes=_DTYPES)
    if gate.ndim == 0:
        raise ValueError(f"{name} must have at least one dimension, got shape ()")
    shape, device = gate.shape, gate.device
    if up is not None and not (matches(up, shape, device) and up.dtype == gate.dtype):
        check_tensor("up", up, dtypes=(gate.dtype,), shape=shape, device=device)
    if bias is not None:
        if not matches(bias, shape[-1:], device):
            check_tensor("bias", bias, dtypes=_DTYPES, shape=shape[-1:], device=device)
        # Differentiable: the gradient returns in the bias's own dtype.
        if bias.dtype != gate.dtype or not bias.is_contiguous():
            bias = bias.to(gate.dtype).contiguous()
    if residual is not None and not matches(residual, shape, device):
        check_tensor("residual", residual, dtypes=_DTYPES, shape=shape, device=device)
    if seed is not None:
        check_tensor("dropout_seed", seed, dtypes=(torch.int64,), shape=(1,), device=device)
    out_dtype = gate.dtype
    if residual is not None and residual.dtype != out_dtype:
        out_dtype = torch.promote_types(out_dtype, residual.dtype)
    # No kernel computes in float64 or has a program for rows without elements.
    if backend_for(device) == "torch" or out_dtype == torch.float64 or shape[-1] == 0:
        y = activation_reference(gate, up, bias, kind, p, seed)
        return y if residual is None else residual + y
    if p == 0.0:
        seed = None
    elif seed is None:
        seed = draw_seed(device)
    tensors, rest = (gate, up, bias, residual, seed), (kind, p, out_dtype)
    if key is not None and bias is given and is_plain(tensors):
        run = kernels("activation").bind_forward(*tensors, *drop_numbers(p), kind, out_dtype)
        if run is not None:
            known = _kinds.keep(key, Kind(_activation_op, run, tensors, _numbers(*tensors, *rest)))
            return known(*tensors)
    return _activation_op(*tensors, *rest)


def _bind(
    numbers: _Numbers, needs: Sequence[bool], grads: tuple[Tensor], saved: tuple[Tensor | None, ...]
) -> tuple[Callable[..., tuple[Tensor | None, ...]], Sequence[int | None]] | None:
    name, p, dtype, bias_dtype, residual_dtype = numbers
    if not any(needs[:3]):
        return None
    wanted = (dtype if need else None for dtype, need in zip((dtype, dtype, bias_dtype), needs, strict=False))
    run = kernels("activation").bind_backward(*grads, *saved, *drop_numbers(p), name, *wanted)
    if run is None:
        return None

    def back(dy: Tensor, *saved: Tensor | None) -> tuple[Tensor | None, ...]:
        return *run(dy, *saved), _residual_gradient(dy, residual_dtype)

    return (back if needs[3] else run), (0, 1, 2, 3, None)


def _residual_gradient(dy: Tensor, dtype: torch.dtype | None) -> Tensor | None:
    """Addition hands its gradient on as it is, like stock."""
    return None if dtype is None else dy if dy.dtype == dtype else dy.to(dtype)


def activation_reference(
    gate: Tensor, up: Tensor | None, bias: Tensor | None, kind: str, p: float, seed: Tensor | None
) -> Tensor:
    """dropout(activation(gate + bias) * up) by PyTorch."""
    y = REFERENCES[kind](gate if bias is None else gate + bias)
    return dropout(y if up is None else y * up, p, seed)


def _forward(
    gate: Tensor,
    up: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    kind: str,
    p: float,
    out_dtype: torch.dtype,
) -> Tensor:
    return kernels("activation").activation_forward(gate, up, bias, residual, seed, *drop_numbers(p), kind, out_dtype)


def _forward_fake(gate, up, bias, residual, seed, kind, p, out_dtype):
    return gate.new_empty(gate.shape, dtype=out_dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.numbers = _numbers(*inputs)
    ctx.save_for_backward(*_saved(ctx.numbers, inputs, output))


def _numbers(
    gate: Tensor,
    up: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    kind: str,
    p: float,
    out_dtype: torch.dtype,
) -> _Numbers:
    bias_dtype, residual_dtype = (None if t is None else t.dtype for t in (bias, residual))
    return _Numbers(kind, p, gate.dtype, bias_dtype, residual_dtype)


def _saved(numbers: _Numbers, tensors: tuple[Any, ...], results: Any) -> tuple[Tensor | None, ...]:
    gate, up, bias, _, seed, *_ = tensors
    # The identity's slope needs no values: nothing but the seed is kept.
    if numbers.name == "identity" and up is None:
        return None, None, None, seed
    return gate, up, bias, seed


def _backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    gate, up, bias, seed = ctx.saved_tensors
    needs, (kind, p, dtype, bias_dtype, residual_dtype) = ctx.needs_input_grad, ctx.numbers
    dgate, dup, dbias = (dtype if needs[0] else None), (dtype if needs[1] else None), (bias_dtype if needs[2] else None)
    gradients: list[Tensor | None] = []
    if needs[0] or needs[1] or needs[2]:
        gradients += _activation_backward(dy, gate, up, bias, seed, kind, p, dgate, dup, dbias)
    for place, wanted in enumerate((dgate, dup, dbias)):
        if wanted is None:
            gradients.insert(place, None)
    return *gradients, _residual_gradient(dy, residual_dtype if needs[3] else None), None, None, None, None


def _second(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    gate, up, bias, seed = ctx.saved_tensors
    needs, (kind, p, dtype, bias_dtype, residual_dtype) = ctx.needs_input_grad, ctx.numbers
    residual = dy.to(residual_dtype) if needs[3] else None
    if gate is None:
        branch = dropout(dy.to(dtype), p, seed)
        dbias = branch.flatten(0, -2).sum(0).to(bias_dtype) if needs[2] else None
        return branch if needs[0] else None, None, dbias, residual, None, None, None, None

    def reference(gate: Tensor, up: Tensor | None, bias: Tensor | None) -> Tensor:
        return activation_reference(gate, up, bias, kind, p, seed)

    gradients = differentiate("activation", reference, (gate, up, bias), (dy.to(dtype),))
    return *gradients, residual, None, None, None, None


def _run_backward(
    dy: Tensor,
    gate: Tensor | None,
    up: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    kind: str,
    p: float,
    gate_dtype: torch.dtype | None,
    up_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
) -> list[Tensor]:
    return kernels("activation").activation_backward(
        dy, gate, up, bias, seed, *drop_numbers(p), kind, gate_dtype, up_dtype, bias_dtype
    )


def _run_backward_fake(dy, gate, up, bias, seed, kind, p, *dtypes):
    shapes = (dy.shape, dy.shape, dy.shape[-1:])
    return [dy.new_empty(s, dtype=d) for s, d in zip(shapes, dtypes, strict=True) if d is not None]


_activation_op = Operator(
    "activation", _forward, _forward_fake, _setup_context, _backward, _second, saved=_saved, bind=_bind
)
_activation_backward = Kernel("activation_backward", _run_backward, _run_backward_fake)
