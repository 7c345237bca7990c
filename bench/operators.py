"""What the operator benchmarks share: shapes, peers at hand, the check before the timing, figures beside the time."""

from __future__ import annotations

import functools
import importlib
import itertools
import math
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.gpu.timing import median_time

ON_GPU = torch.cuda.is_available()
OURS = "fastformer"
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPE = torch.bfloat16 if ON_GPU else torch.float32

if not ON_GPU:
    torch.set_num_threads(1)
ROTATED_BYTES = 256 << 20

Call = Callable[..., Tensor]


def shapes(
    widths: tuple[int, ...], rows: tuple[int, ...], limit: int = 2**29, on_cpu: int = 2**20
) -> list[tuple[int, int]]:
    """(rows, width) of at most `limit` elements on a GPU; without one every width once, in about `on_cpu` elements."""
    if not ON_GPU:
        return [(max(on_cpu // w, 1), w) for w in widths]
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
    if not ON_GPU:
        return _host_seconds(call)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


@functools.cache
def ceilings() -> dict[str, float]:
    """The machine's own limits, measured now.

    Returns:
        copy_gbs: a large copy, bytes read plus bytes written.
        matmul_tflops: product of square matrices, bf16 on a GPU, fp32 on a CPU.
        launch_us: host time of one eager elementwise operation on eight numbers.
    """
    size = 8192 if ON_GPU else 512
    a, b = (torch.randn(size, size, device=DEVICE, dtype=DTYPE) for _ in range(2))
    product = min(_seconds(lambda: torch.mm(a, b)) for _ in range(20))
    small = torch.zeros(8, device=DEVICE)
    burst = min(_host_seconds(lambda: [small.add_(1.0) for _ in range(200)]) for _ in range(10)) / 200
    return {
        "copy_gbs": copy_bandwidth() / 1e9,
        "matmul_tflops": 2 * size**3 / product / 1e12,
        "launch_us": burst * 1e6,
    }


def _host_seconds(call: Callable[[], object]) -> float:
    # On a CPU its own time, which other work on the machine moves less than the clock's.
    clock = time.perf_counter if ON_GPU else time.process_time
    if ON_GPU:
        torch.cuda.synchronize()
    start = clock()
    call()
    return clock() - start


def check(call: Call, stock: Call, leaves: dict[str, Tensor], backward: bool = True, peer: str = OURS) -> None:
    """Refuse to time a wrong result or gradient: error against float64 at most twice stock's, plus two ulps.

    Others may be ten times as far off, which still tells a call that was meant otherwise: torch.compile sums the
    gradient of a bias over 1,024 rows with four times stock's error.
    """
    sent: list[Tensor] = []

    def results(function: Call, dtype: torch.dtype | None) -> dict[str, Tensor]:
        given = {k: v.detach().to(dtype or v.dtype) if v.is_floating_point() else v for k, v in leaves.items()}
        wanted = {k: v.requires_grad_() for k, v in given.items() if backward and v.is_floating_point()}
        out = function(**given)
        if not sent:
            sent.append(torch.randn_like(out))
        found = torch.autograd.grad(out, list(wanted.values()), sent[0].to(out.dtype)) if wanted else ()
        return {"result": out.detach()} | {f"gradient of {k}": g for k, g in zip(wanted, found, strict=True)}

    ours, theirs, exact = results(call, None), results(stock, None), results(stock, torch.float64)
    for name, reference in exact.items():
        error, stocks = ((r[name].double() - reference).abs().max().item() for r in (ours, theirs))
        ulp = torch.finfo(ours[name].dtype).eps * reference.abs().max().item()
        allowed = (2 * stocks + 2 * ulp) * (1 if peer == OURS else 10)
        if not error <= allowed:
            raise AssertionError(f"{name}: error {error:.3e}, allowed {allowed:.3e}: wrong results are not timed")


def run(benchmark: Any, call: Call, leaves: dict[str, Tensor], moved: int, backward: bool) -> None:
    """Time one call, or forward and backward, on sets of inputs in turn, so that no cache holds them from last time.

    Besides pytest-benchmark's host times (on a CPU the CPU time of one thread) `extra_info` gets: on a GPU device_us,
    the median of CUDA graph replays; GB/s and of_copy, that rate over a copy's; peak_MiB, the most memory alive at once
    beyond the inputs.

    Args:
        moved: bytes that must move at least.
    """
    sets = [leaves, *({k: _redrawn(v) for k, v in leaves.items()} for _ in range(_count(leaves) - 1))]
    wanted = [[v.requires_grad_() for v in s.values() if v.is_floating_point()] if backward else [] for s in sets]
    sent = torch.ones_like(call(**leaves)) if backward else None

    def one(index: int) -> None:
        with torch.set_grad_enabled(backward):
            out = call(**sets[index])
        if backward:
            torch.autograd.grad(out, wanted[index], sent)

    turn = itertools.cycle(range(len(sets)))

    def step() -> None:
        one(next(turn))
        if ON_GPU:
            torch.cuda.synchronize()

    step()
    benchmark.extra_info |= {"dtype": str(DTYPE), "sets": len(sets), "peak_MiB": peak_bytes(step) / 2**20}
    warmup, rounds = (10, 50) if ON_GPU else (2, 10)
    benchmark.pedantic(step, warmup_rounds=warmup, rounds=rounds)
    if benchmark.stats:
        seconds = benchmark.stats.stats.median
        if ON_GPU:
            timing = median_time([functools.partial(one, index) for index in range(len(sets))])
            seconds = timing.seconds
            benchmark.extra_info |= {"device_us": seconds * 1e6, "method": timing.method}
        rate = moved / seconds
        benchmark.extra_info |= {"GB/s": rate / 1e9, "of_copy": rate / copy_bandwidth()}


def peak_bytes(step: Callable[[], object]) -> int:
    """The most bytes that tensors made inside `step` held at once."""
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(live, default=0)


def _count(leaves: dict[str, Tensor]) -> int:
    """Sets that together outgrow a GPU's L2 several times; two on a CPU."""
    size = sum(v.numel() * v.element_size() for v in leaves.values())
    return max(2, min(16, ROTATED_BYTES // max(size, 1))) if ON_GPU else 2


def _redrawn(tensor: Tensor) -> Tensor:
    return torch.randn_like(tensor) if tensor.is_floating_point() else tensor
