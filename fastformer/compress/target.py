"""A hard target for a compressed model: parameters, FLOPs or measured latency."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fastformer.compress.measuring import flops, latency


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
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value!r}")
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


def lowest_rate(meets: Callable[[float], bool], highest: float, resolution: float) -> float | None:
    """The lowest rate, to `resolution`, at which `meets` holds; None if it does not even at the highest."""
    if not meets(highest):
        return None
    low, high = 0.0, highest
    while high - low > resolution:
        middle = (low + high) / 2
        low, high = (low, middle) if meets(middle) else (middle, high)
    return high
