"""Timing: medians of many runs over rotated inputs.

- A measured function comes as several calls, one an input set, so that caches hold none of them from the last time.
- On a GPU the calls are captured in one CUDA graph and its replays timed by events: what remains is device time. Where
  capture is not possible, events around eager calls; `Timing.method` says which.
- On a CPU (rehearsal) the host clock.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from bench.gpu.place import on_gpu, synchronize

BUDGET = 0.25
MOST = 200
LEAST = 10


@dataclass(frozen=True)
class Timing:
    """A median.

    Attributes:
        seconds: median time of one call.
        spread: (75th - 25th percentile) / median; a difference between versions below it is noise.
        runs: how many timings the median is of.
        method: "graph", "events" or "host".
    """

    seconds: float
    spread: float
    runs: int
    method: str


def median_time(calls: Sequence[Callable[[], object]], *, graph: bool = True) -> Timing:
    """Median time of one of `calls`, which do the same work on different inputs.

    Args:
        calls: at least one; each is run several times first, so that compiling stays out.
        graph: False times eager calls, host gaps included.
    """
    if not on_gpu():
        return _host(calls)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            for call in calls:
                call()
        stream.synchronize()
        replay, method = (_capture(calls, stream), "graph") if graph else (None, "events")
        if replay is None:
            replay, method = _sequence(calls), "events"
        timing = _events(replay, len(calls), method)
    torch.cuda.current_stream().wait_stream(stream)
    return timing


def difference(together: Timing, alone: Timing) -> Timing | None:
    """The time of what `together` does beyond `alone`; None where it drowns in the noise of the two."""
    seconds = together.seconds - alone.seconds
    noise = together.spread * together.seconds + alone.spread * alone.seconds
    return Timing(seconds, noise / seconds, together.runs, together.method) if seconds > noise else None


def host_time(call: Callable[[], object], count: int = 200) -> float:
    """Median host seconds of one eager call, the device's work excluded: it queues up behind."""
    for _ in range(10):
        call()
    samples = []
    for _ in range(5):
        synchronize()
        start = time.perf_counter()
        for _ in range(count):
            call()
        samples.append((time.perf_counter() - start) / count)
    synchronize()
    return statistics.median(samples)


def _capture(calls: Sequence[Callable[[], object]], stream: torch.cuda.Stream) -> Callable[[], None] | None:
    captured = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(captured, stream=stream):
            for call in calls:
                call()
        captured.replay()
        stream.synchronize()
    except RuntimeError as error:
        print(f"  not captured, timing eager calls: {str(error).splitlines()[0]}")
        torch.cuda.synchronize()
        return None
    return captured.replay


def _sequence(calls: Sequence[Callable[[], object]]) -> Callable[[], None]:
    def run() -> None:
        for call in calls:
            call()

    return run


def _events(replay: Callable[[], None], calls: int, method: str) -> Timing:
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    replay()
    last.record()
    last.synchronize()
    runs = max(LEAST, min(MOST, int(BUDGET * 1e3 / max(first.elapsed_time(last), 1e-3))))
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(runs)]
    for begin, end in pairs:
        begin.record()
        replay()
        end.record()
    pairs[-1][1].synchronize()
    return _median([begin.elapsed_time(end) / 1e3 / calls for begin, end in pairs], method)


def _host(calls: Sequence[Callable[[], object]]) -> Timing:
    samples = []
    for _ in range(2):
        for call in calls:
            start = time.perf_counter()
            call()
            samples.append(time.perf_counter() - start)
    return _median(samples, "host")


def _median(samples: list[float], method: str) -> Timing:
    if len(samples) < 2:
        return Timing(samples[0], 0.0, len(samples), method)
    low, middle, high = statistics.quantiles(samples, n=4)
    return Timing(middle, (high - low) / middle, len(samples), method)
