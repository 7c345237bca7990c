"""What the operator benchmarks share: shapes, peers at hand, the check before the timing, figures beside the time."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32

Call = Callable[..., Tensor]


def shapes(widths: tuple[int, ...], rows: tuple[int, ...], limit: int = 2**29) -> list[tuple[int, int]]:
    """(rows, width) of at most `limit` elements on a GPU, one tiny pair without."""
    if not ON_GPU:
        return [(64, 256)]
    return [(r, w) for w in widths for r in rows if r * w <= limit]


def optional(module: str, attribute: str) -> Any:
    """An attribute of a peer's module; the benchmark is skipped where it is not installed."""
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        pytest.skip(f"{module}.{attribute}: {error}")


def compiled(call: Call) -> Call:
    """`call` under torch.compile, one graph a shape."""
    torch._dynamo.reset()
    return torch.compile(call, dynamic=False)


@functools.cache
def copy_bandwidth() -> float:
    """Bytes a second that a copy of 1 GiB (64 MiB without a GPU) reads and writes."""
    source = torch.empty(2**28 if ON_GPU else 2**24, device=DEVICE)
    target = torch.empty_like(source)
    target.copy_(source)
    best = math.inf
    for _ in range(10):
        best = min(best, _seconds(lambda: target.copy_(source)))
    return 2 * source.numel() * source.element_size() / best


def _seconds(call: Callable[[], object]) -> float:
    import time

    if not ON_GPU:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def check(call: Call, stock: Call, leaves: dict[str, Tensor]) -> None:
    """Refuse to time a wrong result: error against float64 at most twice stock's, plus four ulps."""
    wide = {k: v.detach().double() if v.is_floating_point() else v for k, v in leaves.items()}
    exact, ours, theirs = stock(**wide), call(**leaves), stock(**leaves)
    scale = exact.abs().max().item()
    allowed = 2 * (theirs.double() - exact).abs().max().item() + 4 * torch.finfo(ours.dtype).eps * scale
    error = (ours.double() - exact).abs().max().item()
    assert error <= allowed, f"error {error:.3e}, allowed {allowed:.3e}: nothing is timed"


def run(benchmark: Any, call: Call, leaves: dict[str, Tensor], moved: int, backward: bool) -> None:
    """Time one call, or forward and backward.

    Args:
        moved: bytes that must move at least; the report gets GB/s and the fraction of a copy's.
    """
    wanted = [v.requires_grad_() for v in leaves.values() if v.is_floating_point()] if backward else []
    sent = torch.ones_like(call(**leaves)) if backward else None

    def step() -> None:
        with torch.set_grad_enabled(backward):
            out = call(**leaves)
        if backward:
            torch.autograd.grad(out, wanted, sent)
        if ON_GPU:
            torch.cuda.synchronize()

    step()
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    benchmark.pedantic(step, warmup_rounds=10, rounds=50)
    if ON_GPU:
        benchmark.extra_info["peak_MiB"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    if benchmark.stats:
        rate = moved / benchmark.stats.stats.median
        benchmark.extra_info |= {"GB/s": rate / 1e9, "of_copy": rate / copy_bandwidth(), "dtype": str(DTYPE)}
