"""Recording device work once and replaying it: CUDA graphs, all of one model in one memory pool.

Replays share the pool's memory, so whatever a replay leaves there is gone with the next replay of any graph of the
pool; what must outlive it is copied out or lies outside the pool.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, Protocol

import torch


class Recorder(Protocol):
    """What captures; tests put a stand-in for the CPU here."""

    device: torch.device

    def rehearse(self, work: Callable[[], Any]) -> Any:
        """Run `work` for real before a capture, so that nothing is compiled or set up during it."""

    def record(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """(replay, result): `work` recorded, and what it returned, whose memory every replay writes again."""


class CaptureFailed(RuntimeError):
    """A capture had begun and failed: what the recorder captured before must not be replayed any more."""


class CudaRecorder:
    """`torch.cuda.CUDAGraph` (PyTorch 2.11 and newer)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)

    def rehearse(self, work: Callable[[], Any]) -> Any:
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            result = work()
        current.wait_stream(self.stream)
        return result

    def record(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        # A collection in the middle of a capture may free memory of another stream, which a capture does not allow.
        gc.collect()
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self.device)
        try:
            # Data loaders pin memory in threads of their own while this one captures.
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                result = work()
        except Exception as error:
            self._recover(current)
            raise CaptureFailed(str(error).splitlines()[0] if str(error) else type(error).__name__) from error
        return graph.replay, result

    def _recover(self, current: torch.cuda.Stream) -> None:
        """Leave the device usable: where ending a capture fails, PyTorch stays on its stream, allocates for its pool
        and takes random numbers as if it still captured."""
        torch.cuda.set_stream(current)
        self.stream, self.pool = torch.cuda.Stream(self.device), torch.cuda.graph_pool_handle()
        generator = torch.cuda.default_generators[self.device.index]
        # A copy of the state does not know of the capture. Graphs captured before keep the old one, and so are void.
        generator.graphsafe_set_state(generator.clone_state())


def recorder_for(device: torch.device) -> Recorder | None:
    """What captures on `device`, or None if nothing does."""
    return CudaRecorder(device) if device.type == "cuda" else None
