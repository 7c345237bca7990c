"""Counting the launches of a step on a GPU, from what PyTorch's profiler has seen of the runtime's calls.

- Every call of the runtime or driver that puts work on a stream is one launch: kernels, copies, fills, graphs.
- It belongs to the innermost operator around it, and to the innermost module: modules mark their forward as ranges. In
  the backward pass a node carries the number of the operator that made it, and so leads back to that one's module.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from fastformer.launches.tracing import Launch

_RANGE = "fastformer module "
_NODE = "autograd::engine::evaluate_function: "
_LAUNCH = re.compile(r"(cuda|cu|hip)\w*(Launch\w*Kernel|GraphLaunch|Memset|Memcpy)")
_WAIT = re.compile(r"(cuda|cu|hip)(Stream|Device|Event)Synchronize|cuCtxSynchronize")


def read_events(events: Iterable[Any]) -> tuple[list[Launch], int]:
    """(launches, host reads before the optimizer) of a profile.

    Args:
        events: `torch.profiler.profile.events()`; of each `name`, `cpu_parent` and `sequence_nr` are looked at.
    """
    events = list(events)
    made_in = {e.sequence_nr: _module(e) for e in events if e.sequence_nr >= 0 and _find(e, _NODE) is None}
    launches, reads = [], 0
    for event in events:
        waits = _WAIT.match(event.name) is not None
        if not waits and _LAUNCH.match(event.name) is None:
            continue
        phase, module = _place(event, made_in)
        if waits:
            reads += phase != "optimizer"
        else:
            operator = _find(event, "aten::")
            launches.append(Launch(phase, module, operator[6:] if operator else "fastformer::kernel", 1))
    return launches, reads


def _ancestors(event: Any) -> Iterator[Any]:
    while event is not None:
        yield event
        event = event.cpu_parent


def _find(event: Any, prefix: str) -> str | None:
    """Name of the innermost range around an event that begins with `prefix`."""
    return next((e.name for e in _ancestors(event) if e.name.startswith(prefix)), None)


def _module(event: Any) -> str:
    return (_find(event, _RANGE) or _RANGE).removeprefix(_RANGE)


def _place(event: Any, made_in: dict[int, str]) -> tuple[str, str]:
    node = next((e for e in _ancestors(event) if e.name.startswith(_NODE)), None)
    if node is not None:
        return "backward", made_in.get(node.sequence_nr, "")
    if _find(event, "Optimizer.step#") is not None:
        return "optimizer", ""
    return ("loop" if _find(event, _RANGE) is None else "forward"), _module(event)


@contextlib.contextmanager
def marked(model: torch.nn.Module) -> Iterator[None]:
    """Modules of `model` mark their forward as ranges that a profile shows."""
    names = {id(module): name for name, module in model.named_modules()}
    open_ranges: list[Any] = []

    def enter(module: torch.nn.Module, args: Any) -> None:
        # A module from elsewhere, a wrapper or a loss, is no part of the model.
        found = record_function(_RANGE + names[id(module)]) if id(module) in names else contextlib.nullcontext()
        found.__enter__()
        open_ranges.append(found)

    def leave(module: torch.nn.Module, args: Any, output: Any) -> None:
        open_ranges.pop().__exit__(None, None, None)

    every = torch.nn.modules.module
    with contextlib.ExitStack() as stack:
        stack.callback(every.register_module_forward_pre_hook(enter).remove)
        stack.callback(every.register_module_forward_hook(leave, always_call=True).remove)
        yield


def profiled(model: torch.nn.Module, step: Callable[[], Any], device: torch.device) -> tuple[list[Launch], int]:
    """(launches, host reads before the optimizer) of `step()`, which trains `model` on `device`."""
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen, marked(model):
        step()
    return read_events(seen.events())
