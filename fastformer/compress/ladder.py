"""The rungs behind pruning, tried one after the other under the same gate."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable

import torch

from fastformer.compress.rungs import linear_layers, low_rank, quantize_int8

RUNGS = ("low_rank", "int8", "int8_dynamic")
_FIRST_ENERGY, _TRIALS = 0.5, 4


def check_rungs(rungs: tuple[str, ...]) -> None:
    """Raises ValueError for an unknown rung, ImportError for one whose library is missing."""
    for rung in rungs:
        if rung not in RUNGS:
            raise ValueError(f"rungs must be among {RUNGS}, got {rung!r}")
        if rung != "low_rank" and importlib.util.find_spec("torchao") is None:
            raise ImportError(f"the rung {rung!r} needs torchao, which is not installed")


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
        rungs: in order, as `check_rungs` allows.
        evaluate: the metric of a model.
        holds: whether a metric is good enough.

    Returns:
        What was done, a line a rung, and the metric after the last one kept (None: none was).
    """
    notes: list[str] = []
    metric: float | None = None
    for rung in rungs:
        if not any(True for _ in linear_layers(model)):
            notes.append(f"{rung}: the model has no linear layer that can be replaced")
            continue
        note, after = (_low_rank if rung == "low_rank" else _int8)(model, rung, evaluate, holds)
        notes.append(note)
        metric = metric if after is None else after
    return notes, metric


def _low_rank(
    model: torch.nn.Module, rung: str, evaluate: Callable[[torch.nn.Module], float], holds: Callable[[float], bool]
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
        return f"{rung}: no factors held the metric; left as it was", None
    ranks = low_rank(model, best[0])
    return f"{rung}: {len(ranks)} layers factored, {best[0]:.0%} of the energy kept, metric {best[1]:.4f}", best[1]


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
