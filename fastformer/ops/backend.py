"""Which implementation runs: the Triton kernels, or PyTorch's own operators.

- CUDA and ROCm tensors run the kernels where triton can be imported; everything else runs PyTorch's operators.
- `FASTFORMER_BACKEND=triton|torch` forces one for the whole process. Forcing triton where it cannot run is an error,
  never a silent fallback.
- Of the attention kernels there are two families, the portable ones and those for Hopper (sm_90), which are chosen
  where they are proven (`fastformer.kernels.targets`). `FASTFORMER_BACKEND=hopper|portable` forces one, and triton with
  it; calls with options that the Hopper kernels lack take the portable ones all the same.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import torch

_CHOICES = ("auto", "triton", "torch", "hopper", "portable")
MINIMUM_TRITON = (3, 6)
_standing_in = False
# os.environ.get encodes the name and, of an unset variable, raises and catches: 0.8 µs of every call. The mapping
# beneath it answers in 30 ns.
_NAME = "FASTFORMER_BACKEND"
_variables = getattr(os.environ, "_data", None)
_key = os.environ.encodekey(_NAME) if _variables is not None else _NAME


def forced_backend() -> str:
    """The value of FASTFORMER_BACKEND: "auto" (unset), "triton", "torch", "hopper" or "portable".

    Raises:
        ValueError: it is set to anything else.
    """
    choice = os.environ.get(_NAME, "auto")
    if choice not in _CHOICES:
        raise ValueError(f"FASTFORMER_BACKEND must be one of {', '.join(_CHOICES)}, got {choice!r}")
    return choice


@functools.cache
def triton_status() -> tuple[bool, str]:
    """(whether triton can be used, why or why not), without importing it."""
    if importlib.util.find_spec("triton") is None:
        return False, "triton is not installed"
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        # Vendors ship triton under other names (pytorch-triton-rocm, triton-windows): present, version unknown.
        return True, "triton (version unknown)"
    parts = tuple(int(p) for p in version.split("+")[0].split(".")[:2])
    if parts < MINIMUM_TRITON:
        return False, f"triton {version} is older than {'.'.join(map(str, MINIMUM_TRITON))}"
    return True, f"triton {version}"


def backend_for(device: torch.device) -> str:
    """ "triton" or "torch" for tensors on `device`. Tensors on "meta" have shapes only, which PyTorch's operators tell.

    Raises:
        RuntimeError: FASTFORMER_BACKEND names a family of kernels that cannot run there.
    """
    if _standing_in:
        return "triton"
    choice = "auto" if state()[1] is None else forced_backend()
    kind = device.type
    if choice == "torch" or kind == "meta" or (choice == "auto" and kind != "cuda"):
        return "torch"
    usable, why = triton_status()
    if choice != "auto":
        if not usable:
            raise RuntimeError(f"FASTFORMER_BACKEND={choice}, but {why}")
        if choice == "hopper" and _capability(device) != (9, 0):
            raise RuntimeError(f"FASTFORMER_BACKEND=hopper, but {device} is no Hopper GPU (sm_90)")
        if kind != "cuda" and os.environ.get("TRITON_INTERPRET", "0") != "1":
            raise RuntimeError(
                f"FASTFORMER_BACKEND={choice}, but tensors on {device} can run Triton kernels only "
                "in its interpreter (TRITON_INTERPRET=1)"
            )
        return "triton"
    return "triton" if usable else "torch"


def state() -> tuple[bool, Any]:
    """What `backend_for` goes by beside the device: while this is the same, so are its answers."""
    return _standing_in, (_variables if _variables is not None else os.environ).get(_key)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" and not torch.version.hip else None


@contextlib.contextmanager
def standing_in() -> Iterator[None]:
    """Take the kernels' way for tensors on any device, where something stands in for the launches."""
    global _standing_in
    before, _standing_in = _standing_in, True
    try:
        yield
    finally:
        _standing_in = before


def is_standing_in() -> bool:
    """Whether something stands in for the launches."""
    return _standing_in


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast computes in for tensors on `device`, None where it is off."""
    return torch.get_autocast_dtype(device.type) if autocasts(device) else None


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for tensors on `device`; False on devices that know none ("meta")."""
    kind = device.type
    return kind != "meta" and torch.is_autocast_enabled(kind)


@contextlib.contextmanager
def autocast_off(device_type: str) -> Iterator[None]:
    """No autocast for tensors on devices of a type on which it is on; cheaper than a `torch.autocast`."""
    torch.set_autocast_enabled(device_type, False)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device_type, True)
