"""Several linear layers of one input as one matrix product, over the parameters that are there.

The parameters are moved side by side into one buffer, each a view of it: names, shapes, state_dict and optimizers stay
as they are, updates in place are seen, and the buffer is the weight of all layers at once. Gradients come as parts of
one product. `separate` undoes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastformer.nn.parts import has_hooks
from fastformer.ops.operator import light

_MARK = "fastformer_side_by_side"


def project(module: Any, names: Sequence[str], hidden: Tensor, shape: tuple[int, int]) -> Sequence[Tensor]:
    """What the linear layers `names` of a module make of `hidden`: [..., *shape] each, (heads, head_dim) say.

    Layers that are hooked, wrapped or not plain (adapters, quantisation), and parameters that something else keeps in a
    buffer of its own, are called one by one.
    """
    if not lie_side_by_side(module, names, hidden):
        return [getattr(module, name)(hidden).unflatten(-1, shape) for name in names]
    layers = [getattr(module, name) for name in names]
    weight = _joined(*(layer.weight for layer in layers))
    bias = None if layers[0].bias is None else _joined(*(layer.bias for layer in layers))
    # One view and one node of autograd for all of them.
    return F.linear(hidden, weight, bias).view(*hidden.shape[:-1], len(names), *shape).unbind(-3)


def lie_side_by_side(module: Any, names: Sequence[str], hidden: Tensor) -> bool:
    """Whether the weights of the linear layers `names`, and their biases, are one matrix in memory, after moving them
    there if they may be moved."""
    layers = [getattr(module, name) for name in names]
    if not _are_plain(layers, hidden):
        return False
    weights: list[Any] = [layer.weight for layer in layers]
    biases: list[Any] = [layer.bias for layer in layers if layer.bias is not None]
    return _side_by_side(module, weights) and (not biases or _side_by_side(module, biases))


def separate(module: torch.nn.Module) -> None:
    """Give every parameter that `project` has moved memory of its own again."""
    for name in module.__dict__.pop(_MARK, ()):
        parameter = module.get_parameter(name)
        parameter.data = parameter.data.clone()


def _are_plain(layers: list[torch.nn.Module], hidden: Tensor) -> bool:
    if torch.compiler.is_compiling() or hidden.device.type == "meta":
        return False
    biased = {getattr(layer, "bias", None) is not None for layer in layers}
    return len(biased) == 1 and all(map(is_plain_linear, layers))


def is_plain_linear(layer: torch.nn.Module) -> bool:
    """Whether a Linear may be read instead of called: no subclass, no hook, no parameter of another class."""
    if type(layer) is not torch.nn.Linear or has_hooks(layer):
        return False
    return all(type(p) is torch.nn.Parameter for p in layer.__dict__["_parameters"].values() if p is not None)


def _side_by_side(module: torch.nn.Module, parameters: list[torch.nn.Parameter]) -> bool:
    """Whether parameters lie one after another in memory, after moving them there if nothing else has a say in it."""
    end = parameters[0].data_ptr()
    for p in parameters:
        if p.data_ptr() != end or not p.is_contiguous():
            return _move(module, parameters)
        end += p.numel() * p.element_size()
    return len({p.dtype for p in parameters}) == 1


def _move(module: torch.nn.Module, parameters: list[torch.nn.Parameter]) -> bool:
    first = parameters[0]
    for p in parameters:
        alone = p.untyped_storage().nbytes() == p.numel() * p.element_size() and p.is_contiguous()
        alike = p.dtype == first.dtype and p.device == first.device and p.shape[1:] == first.shape[1:]
        if not alone or not alike or p.is_inference():
            return False
    if first.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    with torch.no_grad():
        joined = torch.cat([p.detach().flatten() for p in parameters])
        for p, part in zip(parameters, joined.split([p.numel() for p in parameters]), strict=True):
            p.data = part.view(p.shape)
    moved = {id(p) for p in parameters}
    names = {name for name, p in module.named_parameters() if id(p) in moved}
    module.__dict__[_MARK] = tuple(sorted({*module.__dict__.get(_MARK, ()), *names}))
    return True


class _Joined(torch.autograd.Function):
    """Parameters that lie side by side as one tensor, joined along the first dimension; nothing is copied."""

    @staticmethod
    def forward(*parameters: Tensor) -> Tensor:
        first = parameters[0].detach()
        return first.as_strided((sum(p.shape[0] for p in parameters), *first.shape[1:]), first.stride())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.sizes = [p.shape[0] for p in inputs]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad.split(ctx.sizes)


_joined = light(_Joined)
