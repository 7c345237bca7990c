"""The rungs behind pruning, tried one after the other under the same gate."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch

from fastformer.compress.rungs import low_rank, quantize_int8

RUNGS = ("low_rank", "int8", "int8_dynamic")
_FIRST_ENERGY, _TRIALS = 0.5, 4


def climb(
    model: torch.nn.Module,
    rungs: tuple[str, ...],
    evaluate: Callable[[torch.nn.Module], float],
    holds: Callable[[float], bool],
) -> tuple[list[str], float | None]:
    """Apply to the model, in place, every rung after which the metric holds; each is tried on a copy first.

    "low_rank" bisects the energy that the factors keep: as little as holds. "int8" and "int8_dynamic" either hold or
    not.

    Args:
        model: a compact model.
        rungs: in order.
        evaluate: the metric of a model.
        holds: whether a metric is good enough.

    Returns:
        What was done, a line a rung, and the metric after the last one kept (None: none was).

    Raises:
        ValueError: an unknown rung, or one that cannot be applied to the model.
    """
    for rung in rungs:
        if rung not in RUNGS:
            raise ValueError(f"rungs must be among {RUNGS}, got {rung!r}")
    notes: list[str] = []
    metric: float | None = None
    for rung in rungs:
        found = _low_rank(model, evaluate, holds) if rung == "low_rank" else _int8(model, rung, evaluate, holds)
        notes.append(found[0])
        metric = metric if found[1] is None else found[1]
    return notes, metric


def _low_rank(
    model: torch.nn.Module, evaluate: Callable[[torch.nn.Module], float], holds: Callable[[float], bool]
) -> tuple[str, float | None]:
    low, high, best = 0.0, 1.0, None
    energy = _FIRST_ENERGY
    for _ in range(_TRIALS):
        small = copy.deepcopy(model)
        if low_rank(small, energy):
            metric = evaluate(small)
            if holds(metric):
                best, high = (energy, metric), energy
            else:
                low = energy
        else:
            high = energy  # nothing gets smaller that keeps so much
        energy = (low + high) / 2
    if best is None:
        return "low rank: no factors held the metric; left as it was", None
    ranks = low_rank(model, best[0])
    return f"low rank: {len(ranks)} layers factored, {best[0]:.0%} of the energy kept, metric {best[1]:.4f}", best[1]


def _int8(
    model: torch.nn.Module, rung: str, evaluate: Callable[[torch.nn.Module], float], holds: Callable[[float], bool]
) -> tuple[str, float | None]:
    small = copy.deepcopy(model)
    quantize_int8(small, dynamic=rung == "int8_dynamic")
    metric = evaluate(small)
    if not holds(metric):
        return f"{rung}: the metric would be {metric:.4f}; left as it was", None
    count = quantize_int8(model, dynamic=rung == "int8_dynamic")
    return f"{rung}: {count} layers quantized, metric {metric:.4f}", metric
