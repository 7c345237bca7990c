"""A hard target for a compressed model: parameters, FLOPs or measured latency."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastformer.compress.checking import is_number
from fastformer.compress.compacting import shrink
from fastformer.compress.loops import from_first
from fastformer.compress.measuring import flops, latency
from fastformer.compress.pruner import Pruner

_RESOLUTION = 0.005  # of the rate that meets a target


@dataclass(frozen=True)
class Target:
    """What a model must come down to, whatever the metric says. Give exactly one of the first three.

    Attributes:
        parameters: of the whole model; below 1: a share of the dense model's.
        flops: of one forward on `batch`, counted by torch.utils.flop_counter on the stock forward; below 1: a share.
        latency: seconds of one forward on `batch` on the machine at hand, the median of several.
        batch: keyword arguments (a mapping) or positional ones (a tuple) of one call of the model.
    """

    parameters: float | None = None
    flops: float | None = None
    latency: float | None = None
    batch: Mapping[str, Any] | tuple[Any, ...] | None = None

    def __post_init__(self) -> None:
        given = {n: v for n, v in (("parameters", self.parameters), ("flops", self.flops), ("latency", self.latency))
                 if v is not None}  # fmt: skip
        if len(given) != 1:
            raise ValueError(f"give exactly one of parameters, flops and latency, got {sorted(given) or 'none'}")
        ((name, value),) = given.items()
        if not is_number(value) or value <= 0:
            raise ValueError(f"{name} must be a positive number, got {value!r}")
        if name != "parameters" and self.batch is None:
            raise ValueError(f"a target of {name} needs a batch to measure it on, got None")

    def __str__(self) -> str:
        if self.latency is not None:
            return f"latency ≤ {self.latency * 1e3:.2f} ms"
        name, value = ("parameters", self.parameters) if self.parameters is not None else ("flops", self.flops)
        assert value is not None
        return f"{name} ≤ {value:.0%} of the dense model's" if value < 1 else f"{name} ≤ {value:,.0f}"

    def measure(self, model: torch.nn.Module) -> float:
        """The number that counts, of a model without masks."""
        if self.parameters is not None:
            return float(sum(p.numel() for p in model.parameters()))
        assert self.batch is not None
        return flops(model, self.batch) if self.flops is not None else latency(model, self.batch)

    def limit(self, dense: float) -> float:
        """What `measure` must come down to, given the dense model's."""
        value = next(v for v in (self.parameters, self.flops, self.latency) if v is not None)
        return value * dense if self.latency is None and value < 1 else value


class Aim:
    """A target for one model.

    Args:
        target: the target.
        pruner: of the model, which is dense yet.

    Raises:
        ValueError: pruning all that may go does not meet it.
    """

    def __init__(self, target: Target, pruner: Pruner) -> None:
        self._target, self._pruner = target, pruner
        self._limit = target.limit(target.measure(pruner.model))
        if not self._meets(pruner.highest_rate, self._any()):
            raise ValueError(f"target must be within reach, got {target}: pruning all that may go does not meet it")

    def __str__(self) -> str:
        return str(self._target)

    def holds(self, model: torch.nn.Module) -> bool:
        """Whether a model without masks meets the target; rank 0's answer on every process."""
        return from_first(self._target.measure(model) <= self._limit)

    def is_met(self) -> bool:
        """Whether the model would meet it if what is pruned now were taken out."""
        return self._meets(0.0, self._any())

    def rate(self, importance: list[Tensor]) -> float:
        """The lowest rate that meets it, to half a percent, if units go by `importance`."""
        low, high = 0.0, self._pruner.highest_rate
        while high - low > _RESOLUTION:
            middle = (low + high) / 2
            low, high = (low, middle) if self._meets(middle, importance) else (middle, high)
        return high

    def _meets(self, rate: float, importance: list[Tensor]) -> bool:
        small = copy.deepcopy(self._pruner.model)
        masks = self._pruner.choose(rate, importance)
        shrink(small, {site.name: mask for site, mask in zip(self._pruner.sites, masks, strict=True)})
        return self.holds(small)

    def _any(self) -> list[Tensor]:
        return [torch.ones(site.units) for site in self._pruner.sites]
