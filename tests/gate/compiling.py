"""Compiles what launchers launch, for a device that is not there.

- A stand-in for Triton's active driver names the target; `JITFunction.run` compiles and records instead of launching.
- The resources of a kernel are stored beside it in Triton's disk cache, because ptxas's log exists only while it
  compiles.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from fastformer.kernels import targets
from fastformer.kernels.targets import Target

from . import resources, specialised
from .resources import Resources, from_amdgcn, from_ptxas, lost_matrix_units
from .specialised import lost_specialisation, machine_code

# Named after the code that reads the reports, so that a change there is never answered from the cache.
_READERS = b"".join(Path(module.__file__).read_bytes() for module in (resources, specialised))
REPORT = f"resources-{hashlib.sha256(_READERS).hexdigest()[:8]}.json"


class StandInDriver:
    """The part of a Triton driver that compiling asks for."""

    def __init__(self, target: Target) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return GPUTarget(self.target.backend, self.target.arch, self.target.warp_size)

    def get_current_device(self) -> str:
        # Triton keeps compiled kernels by device: every target is one of its own.
        return self.target.name

    def get_current_stream(self, device: str) -> int:
        return 0


@contextlib.contextmanager
def compile_only(target: Target, cache: Path) -> Iterator[list[Resources]]:
    """Inside, launchers choose for `target` and their launches only compile.

    Args:
        target: device to compile for.
        cache: folder of Triton's disk cache.

    Yields:
        the list that grows by one `Resources` with every launch.
    """
    launched: list[Resources] = []
    run = JITFunction.run

    def compile_instead(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if not callable(grid) and not all(type(size) is int for size in grid):
            raise TypeError(f"{self.__name__}: a grid is a tuple of ints, got {grid!r}")

        def build() -> tuple[Any, str]:
            with contextlib.redirect_stdout(io.StringIO()) as log:
                return run(self, *args, grid=grid, warmup=True, **kwargs), log.getvalue()

        kernel, log = build()
        report = Path(next(iter(kernel.metadata_group.values()))).with_name(REPORT)
        if log or not report.exists():
            if kernel.metadata.target.backend == "cuda" and not log:
                # In the cache, but without its resources: an earlier run stopped between the two.
                self.device_caches[target.name][0].clear()
                with triton.knobs.compilation.scope():
                    triton.knobs.compilation.always_compile = True
                    kernel, log = build()
            report.write_text(json.dumps(asdict(_resources(kernel, log, target))))
        fields = json.loads(report.read_text())
        launched.append(Resources(**{**fields, "warnings": tuple(fields["warnings"])}))
        return kernel

    before = driver._active
    driver.set_active(StandInDriver(target))
    try:
        with (
            targets.assume(target),
            triton.knobs.cache.scope(),
            triton.knobs.nvidia.scope(),
            mock.patch.object(JITFunction, "run", compile_instead),
        ):
            triton.knobs.cache.dir = str(cache)
            triton.knobs.nvidia.dump_ptxas_log = True
            yield launched
    finally:
        driver._active = before


def _resources(kernel: Any, log: str, target: Target) -> Resources:
    figures = from_ptxas(log) if kernel.metadata.target.backend == "cuda" else from_amdgcn(kernel.asm["amdgcn"])
    if "requestedRegisters" in kernel.asm["ttgir"]:
        # The machine code is disassembled only where something is looked for in it.
        code = machine_code(kernel.asm["cubin"])
        figures["warnings"] += lost_specialisation(kernel.asm["ttgir"], kernel.asm["ptx"], code)
    figures["warnings"] += lost_matrix_units(kernel.asm["ttgir"], target, kernel.metadata.num_warps)
    return Resources(
        kernel=kernel.metadata.name,
        shared=kernel.metadata.shared,
        tensor_memory=getattr(kernel.metadata, "tmem_size", None) or 0,
        warps=kernel.metadata.num_warps,
        stages=kernel.metadata.num_stages,
        **figures,
    )
