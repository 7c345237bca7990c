"""A GPU that is not there, for the host side of launches: kernels are compiled, loaded and launched by stand-ins.

    with standing_in("sm_90") as device:
        call()                       # chooses, specialises and compiles as for an sm_90, and launches nothing
        device.launches[-1]          # (handle of the kernel, stream, grid, arguments)

Tensors lie on the CPU. What it leaves out of a launch is the driver's own part (1.3 µs for a bare cuLaunchKernelEx).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from fastformer.kernels import targets


class StandIn:
    """The part of a Triton driver that compiling, loading and launching ask for.

    Attributes:
        device: what counts as the current device; launches of one are kept apart from those of another.
        stream: the current stream.
        launches: what was launched, if `record`.
    """

    def __init__(self, target: targets.Target, record: bool) -> None:
        self.target, self.record = target, record
        self.device, self.stream = 0, 0
        self.launches: list[tuple[Any, int, tuple[int, int, int], tuple[Any, ...]]] = []
        self.utils = self

    def get_current_target(self) -> GPUTarget:
        return GPUTarget(self.target.backend, self.target.arch, self.target.warp_size)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return self.stream

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self.target.shared_memory}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        return object(), object(), 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        if not self.record:
            return lambda *args: None

        def launch(x: int, y: int, z: int, stream: int, function: Any, *rest: Any) -> None:
            self.launches.append((function, stream, (x, y, z), rest[4:]))

        return launch


def _yes() -> bool:
    # A mock with a return value costs as much as a launch.
    return True


@contextlib.contextmanager
def standing_in(name: str = "sm_90", record: bool = True) -> Iterator[StandIn]:
    """Inside, tensors on the CPU count as lying on a GPU of this target."""
    device = StandIn(targets.TARGETS[name], record)
    targets.interpreting()  # it remembers its first answer, which is not to be that of the environment below
    before = driver._active
    driver.set_active(device)
    try:
        with (
            mock.patch.object(targets, "interpreting", _yes),
            mock.patch.object(targets, "INTERPRETER", device.target),
            # What lets CPU tensors through to the kernels; the kernels themselves were decorated before.
            mock.patch.dict(os.environ, {"FASTFORMER_BACKEND": "triton", "TRITON_INTERPRET": "1"}),
        ):
            yield device
    finally:
        driver._active = before
