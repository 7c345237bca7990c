"""What of a model can be pruned: groups of attention heads or feed-forward channels that disappear together.

A `Site` lists every parameter axis along which its units lie. With the parameters of a unit at zero the unit adds
nothing and receives no gradient, so a masked model is the stock model with zeros in it: masks need no buffer, no hook
and no key in the state_dict. Taking the zeros out of the axes is the whole of compaction.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastformer.compress.checking import check_model
from fastformer.compress.families import LAYERS, NAMES, Channels, Heads, Layer
from fastformer.integrations.swap import class_path, original_class

_CONV1D = "transformers.pytorch_utils.Conv1D"


@dataclass(frozen=True)
class Slot:
    """One axis of one parameter along which a site's units lie.

    Its length is blocks × units × rows: in each block, unit u has the `rows` places from u × rows on.
    """

    module: str
    parameter: str
    axis: int
    blocks: int = 1

    @property
    def name(self) -> str:
        return f"{self.module}.{self.parameter}"


@dataclass(frozen=True)
class Site:
    """Units of one layer that can be pruned one by one.

    Attributes:
        name: path of the attention or feed-forward module in the model.
        kind: "heads" (a unit is a key head with the queries that share it) or "channels".
        units: how many there are now.
        slots: all axes that shrink.
        gate: the slot of the output projection; weight times gradient, summed over a unit, is the derivative of the
            loss by a factor on that unit.
        counts: (module path, attribute, amount a unit) of the plain numbers that tell sizes.
        layer: path of the layer; config_width, heads_in_config: as in `families.Layer`.
    """

    name: str
    kind: str
    units: int
    slots: tuple[Slot, ...]
    gate: Slot
    counts: tuple[tuple[str, str, int], ...]
    layer: str
    config_width: str | None = None
    heads_in_config: bool = False

    def cost(self, model: torch.nn.Module) -> int:
        """Parameters of one unit."""
        return sum(parameter_of(model, slot).numel() for slot in self.slots) // self.units

    def gate_scores(self, model: torch.nn.Module) -> Tensor | None:
        """Σ weight × gradient over each unit's columns of the output projection, fp32 [units]; None: no gradient."""
        weight = parameter_of(model, self.gate)
        if weight.grad is None:
            return None
        product = weight.detach().float() * weight.grad.float()
        return product.movedim(self.gate.axis, 0).reshape(self.units, -1).sum(1)

    def places(self, slot: Slot, units: Tensor, length: int) -> Tensor:
        """Indices on a slot's axis of `length` that belong to the given units [n], block by block."""
        rows = length // slot.blocks // self.units
        start = torch.arange(slot.blocks, device=units.device)[:, None] * (self.units * rows) + units * rows
        return (start[:, :, None] + torch.arange(rows, device=units.device)).flatten()


@dataclass
class Sites:
    """The sites of a model, and what was left out.

    Attributes:
        sites: in the model's order.
        skipped: (path, reason) for layers or parts that are known but cannot be pruned.
    """

    sites: list[Site] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __str__(self) -> str:
        lines = [f"{site.name}: {site.units} {site.kind}" for site in self.sites]
        return "\n".join(lines + [f"{path}: left alone: {reason}" for path, reason in self.skipped])


def find_sites(model: torch.nn.Module, trainable: bool = True) -> Sites:
    """The heads and channels of a model that can be pruned.

    Embeddings, norms, poolers and classifiers are never among them.

    Args:
        model: a Hugging Face or torch.nn model, patched or not.
        trainable: leave out what is frozen (the base of a LoRA model, say): its importance cannot be learned.

    Raises:
        TypeError: `model` is not a torch.nn.Module.
    """
    check_model(model)
    users = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    found = Sites()
    for path, module in model.named_modules():
        table = LAYERS.get(class_path(module))
        if table is None:
            continue
        for part, reason in table.left:
            if getattr(module, part, None) is not None:
                found.skipped.append((_join(path, part), reason))
        specs: list[Heads | Channels] = [*table.heads, *table.channels]
        for spec in specs:
            if not _has(module, spec.output) or not all(_has(module, name) for name in spec.inputs):
                continue
            name = _join(path, spec.module if isinstance(spec, Heads) else spec.output)
            reason = _why_not(module, spec)
            if reason:
                found.skipped.append((name, reason))
                continue
            if isinstance(spec, Heads):
                site = _heads_site(path, name, module, spec, table)
            else:
                site = _channels_site(path, name, module, spec, table)
            parameters = [parameter_of(model, slot) for slot in site.slots]
            if any(users[id(p)] > 1 for p in parameters):
                reason = "its weights are tied to others"
            elif trainable and not all(p.requires_grad for p in parameters):
                reason = "its weights are frozen"
            elif any(hasattr(p, "placements") for p in parameters):
                reason = "its weights are sharded over devices"
            if reason:
                found.skipped.append((name, reason))
            else:
                found.sites.append(site)
    return found


def require_sites(model: torch.nn.Module, trainable: bool = True) -> Sites:
    """As `find_sites`.

    Raises:
        ValueError: the model has none; says why.
    """
    found = find_sites(model, trainable)
    if not found.sites:
        why = "; ".join(f"{path}: {reason}" for path, reason in found.skipped[:3]) or f"known layers: {NAMES}"
        raise ValueError(f"model must have heads or channels that can be pruned, got {type(model).__name__} ({why})")
    return found


def parameter_of(model: torch.nn.Module, slot: Slot) -> torch.nn.Parameter:
    """The parameter a slot names."""
    return getattr(model.get_submodule(slot.module), slot.parameter)


def count_parameters(model: torch.nn.Module, sites: Sites) -> tuple[int, int]:
    """Parameters of the whole model, and of its layers that have sites, each counted once."""
    whole = sum(p.numel() for p in model.parameters())
    layers = [model.get_submodule(path) for path in dict.fromkeys(site.layer for site in sites)]
    return whole, sum({id(p): p.numel() for layer in layers for p in layer.parameters()}.values())


def is_conv1d(module: torch.nn.Module) -> bool:
    """Whether a module is GPT-2's linear layer, whose weight is [in, out]."""
    return class_path(module) == _CONV1D


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _has(module: torch.nn.Module, path: str) -> bool:
    part: Any = module
    for name in path.split("."):
        part = getattr(part, name, None)
    return isinstance(part, torch.nn.Module)


def _why_not(layer: torch.nn.Module, spec: Heads | Channels) -> str:
    names = (spec.output,) if isinstance(spec, Heads) and spec.joint else (*spec.inputs, spec.output)
    for name in names:
        part = layer.get_submodule(name)
        plain = original_class(part) in (torch.nn.Linear, torch.nn.modules.linear.NonDynamicallyQuantizableLinear)
        if not (plain or is_conv1d(part)) or type(getattr(part, "weight", None)) is not torch.nn.Parameter:
            return f"{name} is a {type(part).__name__}, not a plain linear layer"
    if isinstance(spec, Heads) and spec.joint:
        attention: Any = layer.get_submodule(spec.module)
        if not isinstance(attention, torch.nn.MultiheadAttention) or not attention._qkv_same_embed_dim:
            return "its projections are no single matrix"
        if attention.bias_k is not None or attention.add_zero_attn:
            return "it has add_bias_kv or add_zero_attn"
    return ""


def _heads_site(path: str, name: str, layer: torch.nn.Module, spec: Heads, table: Layer) -> Site:
    attention: Any = layer.get_submodule(spec.module)
    size = getattr(attention, spec.head_size)
    output = layer.get_submodule(spec.output)
    queries = _length(output, inputs=True) // size
    counts: list[tuple[str, str, int]] = []
    if spec.joint:
        weights = [Slot(name, "in_proj_weight", 0, 3)]
        if attention.in_proj_bias is not None:
            weights.append(Slot(name, "in_proj_bias", 0, 3))
        slots, units = tuple(weights), queries
    else:
        slots, counts = _outputs(path, layer, spec.inputs, spec.packed)
        # Keys are the last but one of three projections, or one of three blocks of the only one.
        keys = layer.get_submodule(spec.inputs[-2] if len(spec.inputs) > 1 else spec.inputs[0])
        units = _length(keys, inputs=False) // spec.packed // size
    gate, own = _inputs(path, layer, spec.output)
    counts += own
    counts += [(name, a, queries) for a in spec.counts if a in attention.__dict__]
    counts += [(name, a, queries * size) for a in spec.widths if a in attention.__dict__]
    # A number that tells a length is so many a unit.
    return Site(
        name,
        "heads",
        units,
        (*slots, gate),
        gate,
        tuple((module, attribute, amount // units) for module, attribute, amount in counts),
        path,
        heads_in_config=table.heads_in_config,
    )


def _channels_site(path: str, name: str, layer: torch.nn.Module, spec: Channels, table: Layer) -> Site:
    slots, counts = _outputs(path, layer, spec.inputs, spec.packed)
    gate, own = _inputs(path, layer, spec.output)
    units = _length(layer.get_submodule(spec.output), inputs=True)
    if hasattr(layer, "mlp") and "intermediate_size" in layer.mlp.__dict__:
        own.append((_join(path, "mlp"), "intermediate_size", units))
    counts = [(module, attribute, amount // units) for module, attribute, amount in (*counts, *own)]
    return Site(name, "channels", units, (*slots, gate), gate, tuple(counts), path, table.config_width)


def _outputs(
    path: str, layer: torch.nn.Module, names: tuple[str, ...], packed: int
) -> tuple[tuple[Slot, ...], list[tuple[str, str, int]]]:
    """The output axes of linear layers, and their numbers that tell the length."""
    slots, counts = [], []
    for name in names:
        part: Any = layer.get_submodule(name)
        full = _join(path, name)
        slots.append(Slot(full, "weight", 1 if is_conv1d(part) else 0, packed))
        if part.bias is not None:
            slots.append(Slot(full, "bias", 0, packed))
        counts.append((full, "nf" if is_conv1d(part) else "out_features", _length(part, inputs=False)))
    return tuple(slots), counts


def _inputs(path: str, layer: torch.nn.Module, name: str) -> tuple[Slot, list[tuple[str, str, int]]]:
    part = layer.get_submodule(name)
    full, conv = _join(path, name), is_conv1d(part)
    return Slot(full, "weight", 0 if conv else 1), [(full, "nx" if conv else "in_features", _length(part, inputs=True))]


def _length(linear: Any, inputs: bool) -> int:
    """Number of a linear layer's inputs or outputs, read off its weight."""
    return linear.weight.shape[int(inputs) ^ int(is_conv1d(linear))]
