"""Sharing parameters across layers, as ALBERT does (Lan et al. 2020, arXiv 1909.11942)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fastformer.compress.checking import check_model
from fastformer.compress.describing import description, put
from fastformer.compress.families import LAYERS
from fastformer.integrations.swap import class_path


@dataclass(frozen=True)
class SharingReport:
    """What sharing changed.

    Attributes:
        layers: (path of the list of layers, index of the layer whose parameters each one has now).
        parameters_before, parameters_after: of the whole model, each counted once.
    """

    layers: list[tuple[str, list[int]]]
    parameters_before: int
    parameters_after: int

    def __str__(self) -> str:
        lists = "; ".join(f"{path}: {len(set(first))} of {len(first)} distinct" for path, first in self.layers)
        saved = 1 - self.parameters_after / self.parameters_before
        return (
            f"layers share parameters ({lists}): {self.parameters_before:,} → {self.parameters_after:,} parameters "
            f"(−{saved:.0%}, and as much less optimizer state). Speed: unchanged, every layer still runs. Accuracy: "
            "all but the first layer of a group lose what they had learned; train again before use"
        )


def share_layers(model: torch.nn.Module, groups: int = 1) -> SharingReport:
    """Tie the parameters of consecutive layers in place: `groups` distinct layers remain in each stack.

    Every group takes the parameters of its first layer. Make the optimizer afterwards. What this costs stands in the
    report. Pruning leaves shared layers alone (their weights are tied), and layers that were pruned unevenly cannot be
    shared.

    Args:
        model: a Hugging Face or torch.nn model.
        groups: distinct layers a stack, 1 to their number.

    Raises:
        TypeError: `model` is not a torch.nn.Module.
        ValueError: the model has no stack of known layers, `groups` does not fit, or layers have different shapes.
    """
    check_model(model)
    stacks = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) > 1 and all(class_path(m) in LAYERS for m in module)
    ]
    if not stacks:
        raise ValueError(f"model must have a list of known layers, got {type(model).__name__}")
    before = sum(p.numel() for p in model.parameters())
    spec, report = description(model), []
    for path, layers in stacks:
        count = len(layers)
        if not isinstance(groups, int) or not 1 <= groups <= count:
            raise ValueError(f"groups must be between 1 and the {count} layers of {path}, got {groups!r}")
        group = [i * groups // count for i in range(count)]
        first = [group.index(g) for g in group]
        tie(layers, first)
        spec["shared"][path] = first
        report.append((path, first))
    put(model, spec)
    return SharingReport(report, before, sum(p.numel() for p in model.parameters()))


def tie(layers: Any, first: list[int]) -> None:
    """Give layer i the parameters of layer first[i].

    Raises:
        ValueError: two of them have different parameters.
    """
    for i, source in enumerate(first):
        own, other = (dict(layers[k].named_parameters(remove_duplicate=False)) for k in (i, source))
        if {n: p.shape for n, p in own.items()} != {n: p.shape for n, p in other.items()}:
            raise ValueError(f"layers must have the same shapes to be shared, got layers {source} and {i} that differ")
        for name, parameter in other.items():
            parent, _, attribute = name.rpartition(".")
            setattr(layers[i].get_submodule(parent), attribute, parameter)
