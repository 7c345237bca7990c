"""FLOPs and times of models."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from fastformer.integrations import unpatch


def flops(model: torch.nn.Module, batch: Mapping[str, Any] | tuple[Any, ...]) -> float:
    """FLOPs of one stock forward on `batch` (matrix products, convolutions and attention)."""
    from torch.utils.flop_counter import FlopCounterMode

    stock = copy.deepcopy(model).eval()
    unpatch(stock)
    # torch.nn's fast path is one operator, which the counter does not know.
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            _call(stock, batch)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return float(counter.get_total_flops())


def latency(model: torch.nn.Module, batch: Mapping[str, Any] | tuple[Any, ...], repeats: int = 9) -> float:
    """Median wall time of one forward on `batch`, in seconds, after one to warm up."""
    training = model.training
    model.eval()
    times = []
    with torch.no_grad():
        for _ in range(repeats + 1):
            begun = time.perf_counter()
            _call(model, batch)
            if torch.cuda.is_available() and torch.cuda.is_initialized():
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begun)
    model.train(training)
    return statistics.median(times[1:])


def speedup(
    before: torch.nn.Module, after: torch.nn.Module, batches: Iterable[Mapping[str, Any]], backward: bool = False
) -> float:
    """How many times faster `after` is: the ratio of the medians of CPU time, batches taken in turns.

    CPU time is what a busy machine does not distort; for a GPU compare `latency`.

    Args:
        batches: keyword arguments of calls; with backward, the outputs must have a `loss`.
        backward: time forward and backward instead of forward alone.

    Raises:
        ValueError: no batches.
    """
    models = (before, after)
    times: tuple[list[float], list[float]] = ([], [])
    training = [model.training for model in models]
    for batch in batches:
        for model, taken in zip(models, times, strict=True):
            begun = time.process_time()
            with torch.set_grad_enabled(backward):
                out = model.eval()(**batch)
            if backward:
                out.loss.backward()
            taken.append(time.process_time() - begun)
            model.zero_grad()
    if not times[0]:
        raise ValueError("batches must hold at least one batch, got none")
    for model, was in zip(models, training, strict=True):
        model.train(was)
    return statistics.median(times[0]) / statistics.median(times[1])


def _call(model: torch.nn.Module, batch: Mapping[str, Any] | tuple[Any, ...]) -> Any:
    return model(**batch) if isinstance(batch, Mapping) else model(*batch)
