"""Which units go: importance, ranking, and the zeros that stand for a mask.

Importance of a unit is the mean over optimizer steps of |dL/dm|, m being a factor on the unit's output at 1: the
first-order estimate of what removing it does to the loss (Molchanov et al. 2019, arXiv 1906.10771; for heads Michel et
al. 2019, arXiv 1905.10650, who take the absolute value of each example's; here it is of each step's). Units compete
across layers by importance per parameter. Each step's scores are divided by their mean, so that gradient clipping and
loss scaling cancel.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fastformer.compress.checking import check_count, check_share
from fastformer.compress.sites import Site, Sites, parameter_of, require_sites


class Pruner:
    """The pruned units of a model and the importance of the others.

    Args:
        model: the model.
        sites: of the model.
        keep_heads, keep_channels: the fewest units a site keeps.
        multiple_of: channels of a layer stay a multiple of it where they are pruned at all (aligned matrix products).
        uniform: prune the same share of every site, ranked within it, so that stock configurations can tell the
            sizes; otherwise sites compete.

    Attributes:
        kept: for each site a bool tensor [units] on the CPU.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        sites: Sites,
        keep_heads: int = 1,
        keep_channels: int = 8,
        multiple_of: int = 8,
        uniform: bool = False,
    ) -> None:
        for name, value in (("keep_heads", keep_heads), ("keep_channels", keep_channels), ("multiple_of", multiple_of)):
            check_count(name, value)
        self.model, self.sites, self.uniform = model, sites, uniform
        self.multiple_of = multiple_of
        self.least = [min(s.units, keep_heads if s.kind == "heads" else keep_channels) for s in sites]
        self.kept = [torch.ones(site.units, dtype=torch.bool) for site in sites]
        self.costs = [site.cost(model) for site in sites]
        self.total = sum(site.units * cost for site, cost in zip(sites, self.costs, strict=True))
        self._sums: list[Tensor | None] = [None] * len(sites)
        self._zeros: list[tuple[Tensor, int, Tensor]] = []

    @property
    def rate(self) -> float:
        """Share of the prunable parameters that is gone."""
        gone = sum(int((~kept).sum()) * cost for kept, cost in zip(self.kept, self.costs, strict=True))
        return gone / self.total

    @property
    def highest_rate(self) -> float:
        """The rate at which every site is down to the least it keeps."""
        left = sum(least * cost for least, cost in zip(self.least, self.costs, strict=True))
        return 1 - left / self.total

    # Importance

    @torch.no_grad()
    def observe(self) -> Tensor | None:
        """Add the gradients at hand to the importance.

        Returns:
            Whether all of them were finite (bool scalar on their device; nothing waits for it), None without any.
            Those that were not count for nothing.
        """
        steps = [site.gate_scores(self.model) for site in self.sites]
        given = [s for s in steps if s is not None]
        if not given:
            return None
        sizes = torch.cat([s.abs().to(given[0].device) for s in given])
        finite = sizes.isfinite().all()
        scale = torch.where(finite & (sizes.mean() > 0), 1 / sizes.mean(), 0)
        for i, step in enumerate(steps):
            if step is not None:
                score = torch.where(finite, step.abs() * scale, 0)
                before = self._sums[i]
                self._sums[i] = score if before is None else before + score
        return finite

    def importance(self) -> list[Tensor]:
        """Importance of every unit since `forget`, fp32 [units] on the CPU, up to a common factor.

        Raises:
            ValueError: no gradient was seen.
        """
        if all(s is None for s in self._sums):
            raise ValueError("importance needs gradients: train at least one step before pruning")
        return [
            torch.zeros(site.units) if s is None else s.cpu() for site, s in zip(self.sites, self._sums, strict=True)
        ]

    def forget(self) -> None:
        """Begin a new mean."""
        self._sums = [None] * len(self._sums)

    # Masks

    def choose(self, rate: float, importance: list[Tensor]) -> list[Tensor]:
        """The masks that bring the model to `rate`: what is pruned stays so, the least important go.

        A unit goes if at least half of it is asked for; channels are kept up to the next multiple of `multiple_of`.

        Args:
            rate: share of the prunable parameters to be gone, 0 to 1.
            importance: of every unit, as from `importance()`.
        """
        if self.uniform:
            return [
                self._lowest(kept, scores, round(len(kept) * (1 - rate)), site, least)
                for kept, scores, site, least in zip(self.kept, importance, self.sites, self.least, strict=True)
            ]
        order: list[tuple[float, int, int]] = []
        for i, (scores, cost) in enumerate(zip(importance, self.costs, strict=True)):
            for unit in self.kept[i].nonzero().flatten().tolist():
                order.append((float(scores[unit]) / cost, i, unit))
        order.sort()
        wanted = [int(kept.sum()) for kept in self.kept]
        left = rate * self.total - sum(
            int((~kept).sum()) * cost for kept, cost in zip(self.kept, self.costs, strict=True)
        )
        for _, i, _unit in order:
            # Where a head is too much, cheaper channels may still fit.
            if left >= self.costs[i] / 2 and wanted[i] > self.least[i]:
                wanted[i] -= 1
                left -= self.costs[i]
        return [
            self._lowest(kept, scores, count, site, least)
            for kept, scores, count, site, least in zip(
                self.kept, importance, wanted, self.sites, self.least, strict=True
            )
        ]

    def _lowest(self, kept: Tensor, scores: Tensor, count: int, site: Site, least: int) -> Tensor:
        """The mask with the `count` most important of the kept units, more for alignment and the least allowed."""
        now = int(kept.sum())
        if site.kind == "channels" and count < now:
            count = -(-count // self.multiple_of) * self.multiple_of
        count = min(now, max(count, least))
        ranked = scores.masked_fill(~kept, -1.0).argsort(descending=True, stable=True)
        mask = torch.zeros_like(kept)
        mask[ranked[:count]] = True
        return mask

    @torch.no_grad()
    def apply(self, masks: Iterable[Tensor], optimizer: Any = None) -> None:
        """Zero the parameters of every unit outside the masks, and the optimizer's moments of them.

        Args:
            masks: bool [units] for each site, True where kept.
            optimizer: one of torch.optim's, or None.
        """
        self.kept = [mask.clone() for mask in masks]
        self._zeros = []
        for site, kept in zip(self.sites, self.kept, strict=True):
            gone = (~kept).nonzero().flatten()
            for slot in site.slots if len(gone) else ():
                p = parameter_of(self.model, slot)
                places = site.places(slot, gone.to(p.device), p.shape[slot.axis])
                self._zeros.append((p, slot.axis, places))
                for moment in moments(optimizer, p):
                    moment.index_fill_(slot.axis, places, 0)
        self.hold()

    @torch.no_grad()
    def hold(self) -> None:
        """Put the zeros back where an optimizer step has moved them."""
        for p, axis, places in self._zeros:
            p.data.index_fill_(axis, places, 0)


def prune(model: torch.nn.Module, rate: float, losses: Iterable[Tensor], **options: Any) -> Pruner:
    """Prune a model to a rate at once, without watching a metric; `compact` then takes the zeros out.

    Args:
        model: the model, in place.
        rate: share of the prunable parameters to go, above 0 and up to 1.
        losses: of the model on some batches, each made when it is asked for: a generator.
        options: of `Pruner`.

    Returns:
        The pruner: hold() after each optimizer step keeps the zeros, should training go on before `compact`.

    Raises:
        ValueError: `rate` is out of range, nothing can be pruned, or there were no losses.
    """
    check_share("rate", rate)
    pruner = Pruner(model, require_sites(model), **options)
    model.zero_grad()
    for loss in losses:
        loss.backward()
        pruner.observe()
        model.zero_grad()
    pruner.apply(pruner.choose(rate, pruner.importance()))
    return pruner


def moments(optimizer: Any, parameter: Tensor) -> list[Tensor]:
    """The optimizer's tensors for a parameter that have its shape."""
    if optimizer is None:
        return []
    state = optimizer.state.get(parameter, {})
    return [value for value in state.values() if isinstance(value, Tensor) and value.shape == parameter.shape]
