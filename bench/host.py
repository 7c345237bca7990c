"""Host cost of every public operator: microseconds of Python, PyTorch and Triton an eager call, kernels excluded.

- Without a GPU a stand-in takes the place of Triton's driver and of its compiled kernels: launchers choose for an
  H200's target, look up and launch as ever, and the launch itself does nothing. What is left out is the kernel launcher
  in C, the CUDA allocator (a CPU tensor is allocated instead) and the hop to autograd's device thread, once a backward.
- With a GPU (stage host-cost of `make gpu`) the same calls run on it with tensors of a few rows, so that the device
  keeps up and the clock sees the host.
- One call's graph costs a fixed price to start autograd's engine, which a training step pays once and not once an
  operator. It is measured on an empty Function, alone and in a chain, and taken off every backward figure. A second
  result handed to `torch.autograd.grad` costs 9 us more of it (its own checks of every result and gradient, a second
  root), so the price is that of a Function with as many results.
- CPU time of the process, the least of many rounds, all subjects in turn: other work on the machine moves it little.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import importlib
import pkgutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.subjects import Subject, subjects
from fastformer.ops import backend

LINKS = 16
CALLS, ROUNDS = 20, 40
# Modules of attention that look at lengths where these are at hand.
_READERS = ("options", "cache")


class Empty(torch.autograd.Function):
    """What any operator with a backward in Python pays: a result, two saved tensors, a gradient for each input. It is
    the floor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        x, weight = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)


class EmptyOfTwo(torch.autograd.Function):
    """The same with a second input and result beside the first, for the price of starting a graph with two."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, z: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        return torch.empty_like(x), torch.empty_like(z)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        x, weight = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)


def _nowhere(tensor: Tensor) -> bool:
    return False


@contextlib.contextmanager
def stand_in(name: str = "sm_90") -> Iterator[None]:
    """Inside, CPU tensors take the kernels' path as on the GPU `name`; nothing is compiled or run."""
    from triton.compiler import CompiledKernel

    from bench.standin import standing_in

    # All of them before: what is imported inside would be made for the interpreter.
    for package in ("fastformer.ops", "fastformer.kernels"):
        for module in pkgutil.walk_packages(importlib.import_module(package).__path__, f"{package}."):
            importlib.import_module(module.name)
    functions = []

    def compile_nothing(source: Any, **_: Any) -> CompiledKernel:
        functions.append(source.fn)
        kernel = object.__new__(CompiledKernel)
        kernel.src, kernel.module, kernel.function, kernel.packed_metadata = source, object(), object(), object()
        kernel.name, kernel._run = "nothing", lambda *args: None
        return kernel

    # Values on a GPU are not read to be checked.
    unread = [mock.patch(f"fastformer.ops.attention.{module}.values_at_hand", _nowhere) for module in _READERS]
    try:
        with contextlib.ExitStack() as stack:
            for patch in (mock.patch("triton.compiler.compile", compile_nothing), *unread):
                stack.enter_context(patch)
            stack.enter_context(standing_in(name, record=False))
            # A tensor on a GPU is not asked for its backend at every call, as one on the CPU is.
            stack.enter_context(backend.standing_in())
            yield
    finally:
        for function in functions:
            function.device_caches.clear()


def measure(
    names: list[str] | None = None, rounds: int = ROUNDS, device: torch.device | None = None
) -> dict[str, dict[str, float]]:
    """Microseconds a call of every subject.

    Args:
        names: of `bench.subjects`; None: all.
        device: None or a CPU: through the stand-in.

    Returns:
        {name: {"inference", "forward", "both", "stock_forward", "stock_both"}}: under no_grad; with a graph; forward
        and backward; and the last two for PyTorch's operators, whose kernels count on a CPU. "floor" is the empty
        Function, and its "engine" and "engine_of_two" what was taken off every backward figure of one and two results.
    """
    where = device or torch.device("cpu")
    inside: Callable[[], Any] = stand_in if where.type == "cpu" else contextlib.nullcontext
    chosen = {k: s for k, s in subjects(True, where).items() if names is None or k in names}
    leaves = {k: s.draw(where, torch.float32) for k, s in chosen.items()}
    results = {k: len(_results(s.reference(*leaves[k]))) for k, s in chosen.items() if s.differentiable}
    ours: dict[tuple[str, str], Callable[[], object]] = {}
    stock: dict[tuple[str, str], Callable[[], object]] = {}
    for name, subject in chosen.items():
        for calls, function, prefix in ((ours, subject.operator, ""), (stock, subject.reference, "stock_")):
            if prefix and subject.random:
                continue
            _add(calls, name, prefix, subject, function, leaves[name])
    x, weight, bias = [torch.randn(shape, device=where, requires_grad=True) for shape in ((19, 48), (48,), (48,))]
    pairs = [[t.detach().clone().requires_grad_() for t in (weight, bias)] for _ in range(LINKS)]
    ours["floor", "forward"] = functools.partial(Empty.apply, x, weight, bias)
    for count, function in ((1, Empty.apply), (2, EmptyOfTwo.apply)):
        firsts = [x.detach().clone().requires_grad_() for _ in range(count)]
        sent = [torch.ones_like(x) for _ in range(count)]
        ours["floor", f"single {count}"] = functools.partial(_both, function, [*firsts, weight, bias], sent)
        ours["floor", f"chain {count}"] = functools.partial(_chain, function, firsts, pairs, sent)
    best: dict[tuple[str, str], float] = {}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            with inside():
                _round(ours, best)
            _round(stock, best)
    finally:
        gc.enable()
    chains = {count: best.pop(("floor", f"chain {count}")) / LINKS for count in (1, 2)}
    engines = {count: best.pop(("floor", f"single {count}")) - chains[count] for count in (1, 2)}
    found = {"floor": {"both": chains[1], "engine": engines[1], "engine_of_two": engines[2]}}
    for (name, kind), value in best.items():
        started = engines[results[name]] if kind.endswith("both") else 0.0
        found.setdefault(name, {})[kind] = value - started
    return found


def _results(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _add(
    calls: dict[tuple[str, str], Callable[[], object]],
    name: str,
    prefix: str,
    subject: Subject,
    function: Callable[..., Any],
    leaves: list[Tensor],
) -> None:
    if not prefix:
        calls[name, "inference"] = functools.partial(_inference, function, leaves)
    if subject.differentiable:
        calls[name, f"{prefix}forward"] = functools.partial(function, *leaves)
        sent = [torch.ones_like(part) for part in _results(subject.reference(*leaves))]
        calls[name, f"{prefix}both"] = functools.partial(_both, function, leaves, sent)


def _inference(function: Callable[..., Any], leaves: list[Tensor]) -> None:
    with torch.no_grad():
        function(*leaves)


def _both(function: Callable[..., Any], leaves: list[Tensor], sent: Any) -> None:
    torch.autograd.grad(function(*leaves), leaves, sent)


def _chain(function: Callable[..., Any], firsts: list[Tensor], pairs: list[list[Tensor]], sent: list[Tensor]) -> None:
    results: tuple[Tensor, ...] = tuple(firsts)
    for pair in pairs:
        results = _results(function(*results, *pair))
    torch.autograd.grad(results, [*firsts, *(t for pair in pairs for t in pair)], sent)


def _round(calls: dict[tuple[str, str], Callable[[], object]], best: dict[tuple[str, str], float]) -> None:
    for key, call in calls.items():
        call()
        start = time.process_time()
        for _ in range(CALLS):
            call()
        taken = (time.process_time() - start) / CALLS * 1e6
        best[key] = min(best.get(key, taken), taken)


def main() -> int:
    """Measure on the CPU, through the stand-in, into the file that `fastformer bench report` reads."""
    from bench.gpu.machine import this_machine
    from bench.gpu.results import Results

    parser = argparse.ArgumentParser(prog="python -m bench.host", description="host cost of every operator on the CPU")
    parser.add_argument("folder", type=Path, help="where results.json goes, for fastformer bench report")
    parser.add_argument("--only", action="append", help="one operator (repeatable)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    kept = Results("host-cost", arguments.folder, this_machine(), fresh=True)
    for name, row in measure(arguments.only).items():
        kept.add(name, {"host_us": row})
        print(f"{name:28s}", "  ".join(f"{kind} {value:6.1f}" for kind, value in row.items()))
    kept.complete = True
    kept.write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
