"""Peak memory of a piece of work: bytes of the GPU's allocator, or resident bytes of the process on Linux."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import sys
from collections.abc import Callable

import torch


def peak_increase(work: Callable[[], object], device: torch.device) -> int | None:
    """Run `work` and return by how many bytes memory rose above what was in use before, at its highest.

    On a CUDA device these are the bytes of live tensors (torch.cuda.max_memory_allocated); on a CPU the resident
    memory of the process, after what earlier work freed was given back to the system. None where the system does not
    tell the highest point of a period: CPU runs outside Linux.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if not sys.platform.startswith("linux"):
        work()
        return None
    with contextlib.suppress(OSError, AttributeError):  # a C library without malloc_trim keeps nothing back either
        ctypes.CDLL(None).malloc_trim(0)
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # proc(5): resets the peak resident set size
        before = _status("VmRSS")
        work()
        return max(0, _status("VmHWM") - before)
    except (OSError, KeyError):  # some containers have a reduced /proc
        work()
        return None


def _status(name: str) -> int:
    """A field of /proc/self/status, in bytes."""
    with open("/proc/self/status") as file:
        fields = dict(line.split(":", 1) for line in file)
    return int(fields[name].split()[0]) * 1024


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def describe(device: torch.device) -> str:
    """The machine in a few words, for the report."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU with {os.cpu_count()} cores, threads used: {torch.get_num_threads()}"
