"""What a device is and what it may hold.

- `Target` describes one compilation target: its name, shared memory, warp width, number of multiprocessors.
- `target_of(device)` tells which one a tensor's device is; `assume(target)` makes launchers choose for another one,
  which is how the ahead-of-time gate compiles every configuration without a GPU.
- Launchers pick their tile configuration from `Target` alone, so that choice and check read the same table.
- `hopper_chosen(device)` tells whether attention takes the Hopper kernels there.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton


@dataclass(frozen=True, eq=False)  # one object a device: compared and hashed by identity, at every launch
class Target:
    """One kind of device.

    Attributes:
        name: "sm_90", "gfx942", … or "interpreter".
        backend: "cuda", "hip" or "interpreter", as Triton names them.
        arch: 90 for sm_90, "gfx942" for AMD.
        shared_memory: bytes of shared memory (LDS) one block may use.
        warp_size: threads a warp.
        multiprocessors: number of multiprocessors (compute units) of the usual part; grids of reductions use it.
    """

    name: str
    backend: str
    arch: int | str
    shared_memory: int
    warp_size: int
    multiprocessors: int


# Shared memory a block may opt into; sm_86/89 share sm_120's limit. NVIDIA CUDA C++ programming guide, table
# "Technical specifications per compute capability"; AMD CDNA 3 ISA guide (64 KiB LDS).
TARGETS = {
    t.name: t
    for t in (
        Target("sm_75", "cuda", 75, 65536, 32, 40),
        Target("sm_80", "cuda", 80, 166912, 32, 108),
        Target("sm_86", "cuda", 86, 101376, 32, 84),
        Target("sm_89", "cuda", 89, 101376, 32, 128),
        Target("sm_90", "cuda", 90, 232448, 32, 132),
        Target("sm_100", "cuda", 100, 232448, 32, 148),
        Target("sm_120", "cuda", 120, 101376, 32, 170),
        Target("gfx942", "hip", "gfx942", 65536, 64, 304),
        Target("gfx1100", "hip", "gfx1100", 65536, 32, 96),
    )
}
# The interpreter runs one program at a time; two multiprocessors exercise the partial-row reductions.
INTERPRETER = Target("interpreter", "interpreter", 0, 1 << 20, 32, 2)

# (name of the GPU as its driver gives it, major.minor of Triton) on which tests/gpu/test_gpu_hopper.py has passed;
# `python -m bench.gpu prove` enters them. Empty: no GPU has run the Hopper kernels yet.
HOPPER_PROVEN: frozenset[tuple[str, str]] = frozenset()

_assumed: Target | None = None


@contextlib.contextmanager
def assume(target: Target) -> Iterator[None]:
    """Choose configurations for `target` whatever device the tensors are on (for ahead-of-time compilation)."""
    global _assumed
    before, _assumed = _assumed, target
    try:
        yield
    finally:
        _assumed = before


def assumed() -> bool:
    """Whether `assume` is at work: launchers then compile for a device that is not there."""
    return _assumed is not None


def target_of(device: torch.device) -> Target:
    """The target that launchers compile for when their tensors are on `device`.

    Raises:
        RuntimeError: the device is neither a CUDA/ROCm device nor is Triton's interpreter on.
    """
    if _assumed is not None:
        return _assumed
    if interpreting():
        return INTERPRETER
    if device.type != "cuda":
        raise RuntimeError(f"Triton kernels need a CUDA or ROCm device, got a tensor on {device}")
    return _device_target(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def interpreting() -> bool:
    """Whether kernels run in Triton's CPU interpreter (TRITON_INTERPRET=1, read when kernels are decorated)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def _device_target(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    count = properties.multi_processor_count
    if torch.version.hip:
        name = properties.gcnArchName.split(":")[0]
        known = TARGETS.get(name, TARGETS["gfx942"])
        return Target(name, "hip", name, known.shared_memory, properties.warp_size, count)
    arch = properties.major * 10 + properties.minor
    shared = getattr(properties, "shared_memory_per_block_optin", 0)
    if not shared:
        shared = TARGETS.get(f"sm_{arch}", TARGETS["sm_86"]).shared_memory
    return Target(f"sm_{arch}", "cuda", arch, shared, 32, count)


def hopper_chosen(device: torch.device) -> bool:
    """Whether calls on `device` take the Hopper kernels where these take them: the device has wgmma, and either the
    kernels are proven on it with this Triton or FASTFORMER_BACKEND=hopper asks for them."""
    choice = os.environ.get("FASTFORMER_BACKEND")
    if choice == "portable" or not (choice == "hopper" or HOPPER_PROVEN):
        return False
    if target_of(device).name != "sm_90":
        return False
    if choice == "hopper":
        return True
    return device.type == "cuda" and _gpu_and_triton(device) in HOPPER_PROVEN


@functools.cache
def _gpu_and_triton(device: torch.device) -> tuple[str, str]:
    """As in HOPPER_PROVEN."""
    return torch.cuda.get_device_name(device), ".".join(triton.__version__.split(".")[:2])
