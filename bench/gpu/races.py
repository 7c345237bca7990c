"""Races and stray accesses: the same inputs must give the same bits every time, and the sanitizer must find nothing.

- 250 repeats of every operator's forward and backward, compared bit for bit: a missing barrier or an unordered
  accumulation shows as a changed result sooner or later.
- compute-sanitizer, where it is installed, over one small call of everything (`python -m bench.gpu subjects`).
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from bench.gpu.machine import ROOT
from bench.gpu.place import device, rehearsing
from bench.gpu.results import Row, WrongResult
from bench.subjects import subjects as every_subject
from bench.subjects import with_gradients

Subject = Callable[[], list[Tensor]]
REPEATS = 250
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")


def cases() -> list[tuple[str, Callable[[], Row]]]:
    found: list[tuple[str, Callable[[], Row]]] = [
        (f"repeats: {name}", functools.partial(repeats, subject))
        for name, subject in subjects(small=rehearsing()).items()
    ]
    for tool in TOOLS[:1] if rehearsing() else TOOLS:
        found.append((f"compute-sanitizer {tool}", functools.partial(sanitize, tool)))
    return found


def repeats(subject: Subject) -> Row:
    """Raises WrongResult if a repeat differs from the first by a single bit."""
    first = subject()
    count = 3 if rehearsing() else REPEATS
    for index in range(1, count):
        for position, (a, b) in enumerate(zip(first, subject(), strict=True)):
            if not torch.equal(_bits(a), _bits(b)):
                worst = (a.double() - b.double()).abs().max().item()
                raise WrongResult(f"repeat {index} differs in result {position} by up to {worst:.2e}")
    return {"repeats": count, "line": f"{count} repeats alike"}


def sanitize(tool: str) -> Row:
    """One sanitizer tool over every subject, small.

    Raises:
        WrongResult: it found something.
    """
    program = [sys.executable, "-m", "bench.gpu", "subjects"]
    sanitizer = shutil.which("compute-sanitizer")
    if rehearsing():
        command = program
    elif sanitizer is None:
        return {"skipped": "compute-sanitizer is not installed"}
    else:
        command = [sanitizer, "--tool", tool, "--error-exitcode", "86", *program]
    # With PyTorch's caching allocator an access past a tensor's end would still be inside a live allocation.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=150)
    except subprocess.TimeoutExpired:
        return {"skipped": "took longer than 150 s"}
    output = done.stdout + done.stderr
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", output)
    if "Device not supported" in output:
        return {"skipped": "compute-sanitizer does not support this device here"}
    if done.returncode:
        raise WrongResult(f"exit status {done.returncode}: {summary or output[-2000:]}")
    return {"summary": summary, "line": summary[-1] if summary else "ran"}


def subjects(small: bool) -> dict[str, Subject]:
    """Every operator's forward and backward on fixed random inputs, odd sizes included.

    Args:
        small: sizes of a few tiles, for the sanitizer and the rehearsal.
    """
    where = device()
    dtype = torch.float32 if rehearsing() else torch.bfloat16
    found: dict[str, Subject] = {}
    for name, subject in every_subject(small, where).items():
        found[name] = functools.partial(with_gradients, subject.ours, subject.draw(where, dtype))
    return found


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
