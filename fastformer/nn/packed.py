"""How a batch without padding travels through a stack of layers.

- A stack (`TransformerEncoder`, `TransformerDecoder`) packs [batch, seqlen, embed] into [rows, embed] once, hands its
  layers the `Packing` in place of the key padding mask, and pads once at the end. Layers do the same to their
  attention with a `PackedKeys`. So every module is still called, in the same order, and activation checkpointing sees
  all it needs to run a layer again.
- Padding stays where taking it away would show: a hook that would see other shapes, a layer or a mask that is not
  understood, a compiled or traced graph (the number of tokens is data).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastformer.nn.counters import count_host_read
from fastformer.nn.parts import has_hooks
from fastformer.ops.packing import Packing


@dataclass(frozen=True, eq=False)
class PackedKeys:
    """What a packed attention receives as its key_padding_mask: where its queries and its keys come from."""

    query: Packing
    key: Packing


def hooked(modules: Iterable[torch.nn.Module]) -> bool:
    """Whether a hook below any of these would see packed tensors. Hooks of torch.distributed look at no shape."""
    return any(has_hooks(part) and not _only_distributed(part) for module in modules for part in module.modules())


def _only_distributed(module: torch.nn.Module) -> bool:
    if "forward" in module.__dict__:
        return False
    tables = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return all(
        (getattr(hook, "__module__", None) or "").startswith("torch.distributed.")
        for table in tables
        for hook in table.values()
    )


def unwrap(layer: torch.nn.Module) -> torch.nn.Module:
    """The layer inside a checkpoint_wrapper of torch.distributed, which hands everything through."""
    return getattr(layer, "_checkpoint_wrapped_module", layer)


def unbind_nested(tensors: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Packing, ...]]:
    """Nested tensors [batch, ragged, embed] as packed ones [tokens, embed], with where the tokens belong.

    The same tensor given twice comes back as the same tensor, since projections make use of it.
    """
    if tensors[0].device.type != "cpu":
        count_host_read()
    done: dict[int, tuple[Tensor, Packing]] = {}
    for tensor in tensors:
        if id(tensor) not in done:
            parts = tensor.unbind()
            packing = Packing.from_lengths([part.shape[0] for part in parts], tensor.device)
            done[id(tensor)] = (torch.cat(parts), packing)
    pairs = [done[id(tensor)] for tensor in tensors]
    return tuple(flat for flat, _ in pairs), tuple(packing for _, packing in pairs)


def rebuild_nested(flat: Tensor, like: Tensor) -> Tensor:
    """[tokens, embed] as a nested tensor with the lengths and the layout of `like`."""
    if like.layout == torch.jagged:
        return torch.nested.nested_tensor_from_jagged(flat, like.offsets())  # type: ignore[attr-defined]
    return torch.nested.as_nested_tensor(
        list(flat.split([part.shape[0] for part in like.unbind()])), layout=like.layout
    )
