"""Taking pruned units out of a model: smaller tensors under the same names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

import fastformer.nn as fnn
from fastformer.compress.describing import description, put
from fastformer.compress.families import LAYERS
from fastformer.compress.pruner import moments
from fastformer.compress.rungs import factorize
from fastformer.compress.sharing import tie
from fastformer.compress.sites import Site, find_sites, parameter_of, require_sites
from fastformer.integrations.swap import class_path, restore


def shrink(model: torch.nn.Module, kept: dict[str, Tensor], optimizer: Any = None) -> None:
    """Take units out of the model in place.

    Parameters keep their identity, so that an optimizer goes on with them; its moments shrink too. Gradients are
    dropped. A model inside DistributedDataParallel has to be wrapped again.

    Args:
        kept: for site names a bool tensor [units], True for what stays.
        optimizer: one of torch.optim's that holds the parameters, or None.

    Raises:
        ValueError: a name is no site of the model, or a mask has another length or keeps nothing.
    """
    sites = {site.name: site for site in find_sites(model, trainable=False)}
    for name, mask in kept.items():
        if name not in sites:
            raise ValueError(f"kept must name heads or channels of the model, got {name!r}")
        if mask.shape != (sites[name].units,) or not bool(mask.any()):
            raise ValueError(
                f"kept[{name!r}] must keep at least one of {sites[name].units} units, got shape {tuple(mask.shape)} "
                f"with {int(mask.sum())} kept"
            )
    for name, mask in kept.items():
        if not bool(mask.all()):
            _shrink_site(model, sites[name], mask.nonzero().flatten(), optimizer)


@torch.no_grad()
def _shrink_site(model: torch.nn.Module, site: Site, units: Tensor, optimizer: Any) -> None:
    for slot in site.slots:
        p = parameter_of(model, slot)
        places = site.places(slot, units.to(p.device), p.shape[slot.axis])
        state = [] if optimizer is None else moments(optimizer, p)
        smaller = [t.index_select(slot.axis, places) for t in (p.data, *state)]
        p.grad = None
        p.data = smaller[0]
        for old, new in zip(state, smaller[1:], strict=True):
            entries = optimizer.state[p]
            name = next(key for key, value in entries.items() if value is old)
            entries[name] = new
    for path, attribute, amount in site.counts:
        setattr(model.get_submodule(path), attribute, amount * len(units))
    attention = model.get_submodule(site.name)
    if isinstance(attention, torch.nn.MultiheadAttention):
        _leave_stock_attention(model, site, attention)


def _leave_stock_attention(model: torch.nn.Module, site: Site, attention: torch.nn.Module) -> None:
    """torch.nn's attention knows no other width than embed_dim: ours runs in its place, and no fast path around it."""
    restore(attention)
    if type(attention) is torch.nn.MultiheadAttention:
        attention.__class__ = fnn.MultiheadAttention
    layer: Any = model.get_submodule(site.layer)
    if isinstance(layer, torch.nn.TransformerEncoderLayer):
        layer.activation_relu_or_gelu = 0
    for module in model.modules():
        if isinstance(module, torch.nn.TransformerEncoder) and any(part is layer for part in module.layers):
            module.use_nested_tensor = False


def describe(model: torch.nn.Module, kept: dict[str, Tensor]) -> dict[str, Any]:
    """The description of a model after `shrink(model, kept)`, put on the model and its configuration."""
    spec = description(model)
    kinds = {site.name: site.kind for site in find_sites(model, trainable=False)}
    for name, mask in kept.items():
        dense = spec["sites"].get(name, {"of": len(mask)})["of"]
        if int(mask.sum()) < dense:
            spec["sites"][name] = {"kind": kinds[name], "kept": int(mask.sum()), "of": dense}
    _tell_config(model, spec)
    put(model, spec)
    return spec


def _tell_config(model: torch.nn.Module, spec: dict[str, Any]) -> None:
    """Move sizes that are the same in all layers into the fields of the stock configuration that can hold them."""
    config: Any = getattr(model, "config", None)
    if config is None:
        return
    sites = list(find_sites(model, trainable=False))
    tables = [table for module in model.modules() if (table := LAYERS.get(class_path(module))) is not None]
    for field in {site.config_width for site in sites if site.config_width is not None}:
        alike = [site for site in sites if site.config_width == field]
        described = [spec["sites"][site.name] for site in alike if site.name in spec["sites"]]
        # A field that did not tell the dense size is another model's business (a composite configuration's, say).
        tells = all(getattr(config, field, None) in (None, sizes["of"]) for sizes in described)
        whole = len(alike) == sum(table.config_width == field for table in tables)
        if described and hasattr(config, field) and tells and whole and _same(alike):
            setattr(config, field, alike[0].units)
            _forget(spec, alike)
    heads = [site for site in sites if site.heads_in_config]
    pruned = any(site.name in spec["sites"] for site in heads)
    if pruned and len(heads) == sum(table.heads_in_config for table in tables) and _same(heads):
        attention: Any = model.get_submodule(heads[0].name)
        config.head_dim = attention.head_dim
        config.num_key_value_heads = heads[0].units
        config.num_attention_heads = heads[0].units * attention.num_key_value_groups
        _forget(spec, heads)


def _same(sites: list[Site]) -> bool:
    return len({site.units for site in sites}) == 1


def _forget(spec: dict[str, Any], sites: Iterable[Site]) -> None:
    for site in sites:
        spec["sites"].pop(site.name, None)


def apply_description(model: torch.nn.Module, spec: dict[str, Any]) -> None:
    """Give a model as its class makes it the sizes of a description; its weights are then to be loaded.

    Raises:
        ValueError: the model is not the one described.
    """
    if spec.get("version") != 1:
        raise ValueError(f"the description must be of version 1, got {spec.get('version')!r}")
    units = {site.name: site.units for site in find_sites(model, trainable=False)}
    kept = {}
    for name, sizes in spec["sites"].items():
        if units.get(name) != sizes["of"]:
            raise ValueError(f"model must have {sizes['of']} {sizes['kind']} in {name}, got {units.get(name, 'none')}")
        # On the CPU also where a loader makes everything on the meta device.
        kept[name] = torch.arange(sizes["of"], device="cpu") < sizes["kept"]
    shrink(model, kept)
    for path, rank in spec["low_rank"].items():
        factorize(model, path, rank)
    for path, first in spec["shared"].items():
        tie(model.get_submodule(path), first)
    put(model, spec)


def compact(model: torch.nn.Module, optimizer: Any = None) -> dict[str, Any]:
    """Remove every head and channel whose parameters are all zero, which is how pruned units stand in a model.

    Outputs and gradients of what remains stay the same. Names in the state_dict stay stock's; the sizes are written
    into the model's description (see `describing`), and into the configuration where it can tell them.

    Args:
        model: a model pruned by an `AdaptiveCompressor` or `Pruner`, in memory or loaded from a checkpoint; patched or
            not, and it stays so.
        optimizer: one of torch.optim's that goes on with the model, or None.

    Returns:
        The description.

    Raises:
        ValueError: the model has nothing that can be pruned.
    """
    kept = {site.name: _used(model, site) for site in require_sites(model, trainable=False)}
    shrink(model, kept, optimizer)
    return describe(model, kept)


@torch.no_grad()
def _used(model: torch.nn.Module, site: Site) -> Tensor:
    """bool [units] on the CPU: which units have a parameter other than zero; one at least."""
    used = torch.zeros(site.units, dtype=torch.bool)
    for slot in site.slots:
        p = parameter_of(model, slot).movedim(slot.axis, 0)
        used |= (p != 0).reshape(slot.blocks, site.units, -1).any(2).any(0).cpu()
    if not bool(used.any()):
        used[0] = True
    return used
