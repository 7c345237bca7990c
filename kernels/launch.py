"""Launches that skip Triton's argument binding when they repeat an earlier one.

Triton binds, classifies and prints all arguments of every launch before it looks for the compiled kernel: 9–11 µs of
host time, more than a BERT layer's small kernels run. A repeated launch needs none of that.

- The first launch of its kind is Triton's own (`JITFunction.run`), and the compiled kernel it answers with is kept.
- Its key holds all that Triton can specialise on, and repeats nothing of Triton's rules: numbers and constants by value
  and type; of tensors the dtype and the address modulo 16, on AMD also whether the storage lies within 2 GiB (which
  decides on buffer instructions); the launch options, the device, and the switches that Triton reads at every launch.
- A later launch with the same key calls the compiled kernel's launcher with plain addresses, on the stream that is
  current then: it can be captured in a CUDA graph. Where numbers change from step to step, as packed batches' token
  counts do, the first layer pays for Triton's own launch and the others do not.
- With launch hooks (profilers) or pre-run hooks installed, and while a target is assumed (ahead-of-time compilation),
  every launch is Triton's own. In the interpreter kernels stay what `triton.jit` makes of them.

What Triton checks at every launch and a repeated one does not: that pointers lie on the device (`fastformer.ops` checks
it), and that no global constant of a kernel was reassigned.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from fastformer.kernels import targets

# Distinct launches that a kernel (or a prepared launch) remembers; a training step makes a few.
KEPT = 256

_TWO_GIB = 2**31 - 1
_HIP = torch.version.hip is not None


class _Launcher:
    """A Triton kernel, launched as `kernel[grid](*tensors, *others, **constants_and_launch_options)`.

    Its leading parameters with upper-case names take tensors or None, the others numbers, bools, strings, dtypes or
    None. Tensors and numbers are passed by position, constants also by name.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.__name__, self.__doc__ = kernel.fn.__name__, kernel.fn.__doc__
        taking = [p.name.isupper() and not p.is_constexpr for p in kernel.params]
        self.tensors = (*taking, False).index(False)
        self.found: dict[Any, Any] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return functools.partial(self.launch, grid)

    def launch(self, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        others = args[self.tensors :]
        key = (others, tuple(map(type, others)), tuple(options.items()))
        _launch(self, self.found, key, grid, args[: self.tensors], others, options)


def launcher(kernel: Any) -> Any:
    """Decorator above `triton.jit` that makes repeated launches cheap; the kernel is launched as before.

    Tensors come first, under upper-case names; they and numbers are passed by position, constants also by name.
    """
    return _Launcher(kernel) if isinstance(kernel, JITFunction) else kernel


class Prepared:
    """A launch of which only the tensors are open, for callers that keep the rest between calls.

    Args:
        kernel: as `launcher` returns it.
        grid: one to three ints.
        others: the arguments by position behind the tensors.
        options: constants by name and launch options (num_warps, …).
        views: of the leading tensors, what the kernel is given in the place of each: `view(tensor)` makes its tensor
            descriptor, `view.known[pointer]` keeps or `view.at(pointer)` makes one for launches that are repeated.
    """

    __slots__ = ("found", "grid", "kernel", "options", "others", "views")

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        others: tuple[Any, ...],
        options: dict[str, Any],
        views: tuple[Any, ...] = (),
    ) -> None:
        self.kernel, self.grid, self.others, self.options, self.views = kernel, grid, others, options, views
        self.found: dict[Any, Any] = {}

    def __call__(self, *tensors: Tensor | None) -> Any:
        self._launch(tensors)

    def _launch(self, tensors: tuple[Tensor | None, ...]) -> Any:
        kernel = self.kernel
        if type(kernel) is _Launcher:
            return _launch(kernel, self.found, None, self.grid, tensors, self.others, self.options, self.views)
        kernel[self.grid](*_given(tensors, self.views), *self.others, **self.options)
        return None


class Bound(Prepared):
    """A prepared launch whose tensors have the same dtypes each time and are None in the same places, as the key under
    which its owner keeps it says. It runs on the GPU of its first tensor, whichever is the current one.

    Attributes:
        launch: `launch(*tensors)`. While all of them lie on multiples of 16 bytes, as fresh tensors do, and nothing
            else has changed since the last launch, it needs no look-up.
    """

    __slots__ = ("launch",)

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        others: tuple[Any, ...],
        options: dict[str, Any],
        views: tuple[Any, ...] = (),
    ) -> None:
        super().__init__(kernel, (*grid, 1, 1)[:3], others, options, views)
        self.launch: Callable[..., Any] = self

    def __call__(self, *tensors: Tensor | None) -> Any:
        first = next(t for t in tensors if t is not None)
        if first.is_cuda and first.get_device() != torch.cuda.current_device():
            with torch.cuda.device(first.get_device()):
                self._launch(tensors)
            return
        found = self._launch(tensors)
        # Not on AMD, where the storages' sizes count as well.
        if found is not None and not _HIP and not any(t is not None and t.data_ptr() & 15 for t in tensors):
            run, function, metadata, tail = found
            jit, active, runtime, compilation = self.kernel.kernel, driver.active, knobs.runtime, knobs.compilation
            device, debug, mode = active.get_current_device(), runtime.debug, compilation.instrumentation_mode

            def unchanged() -> bool:
                return (
                    driver.active is active
                    and active.get_current_device() == device
                    and runtime.debug == debug
                    and compilation.instrumentation_mode == mode
                    and not _is_own(jit)
                )

            build = _repeating(tuple(t is not None for t in tensors), len(self.views))
            stream, others = functools.partial(active.get_current_stream, device), (*self.others, *tail)
            run = functools.partial(run, *self.grid)
            self.launch = build(self, unchanged, run, stream, function, metadata, others, self.views)


@functools.cache
def _repeating(given: tuple[bool, ...], viewed: int) -> Callable[..., Callable[..., None]]:
    """What builds a `Bound`'s launch of tensors that are None where `given` is not, the first `viewed` of them as
    descriptors: written out for them, since a loop over them costs as much as the launch."""
    names = [f"t{place}" for place in range(len(given))]
    addresses = [f"p{place}" if there else "None" for place, there in enumerate(given)]
    addresses[:viewed] = [f"known[{place}](p{place}) or make[{place}](p{place})" for place in range(viewed)]
    taken = [f"(p{place} := t{place}.data_ptr())" for place, there in enumerate(given) if there]
    source = f"""
def build(bound, unchanged, run, stream, function, metadata, others, views):
    known, make = [view.known.get for view in views], [view.at for view in views]
    def launch({", ".join(names)}):
        if ({" | ".join(taken)}) & 15 or not unchanged():
            return bound({", ".join(names)})
        run(stream(), function, metadata, None, None, None, {", ".join(addresses)}, *others)
    return launch
"""
    found: dict[str, Any] = {}
    exec(source, found)
    return found["build"]


def _is_own(jit: Any) -> bool:
    """Whether a launch must be Triton's own: something is to see it, or only compiles it."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    # Hooks are usually chains, and usually empty ones.
    return bool(
        (enter is not None and getattr(enter, "calls", True))
        or (leave is not None and getattr(leave, "calls", True))
        or runtime.add_stages_inspection_hook is not None
        or jit.pre_run_hooks
        or targets.assumed()
    )


def _given(tensors: tuple[Tensor | None, ...], views: tuple[Any, ...]) -> tuple[Any, ...]:
    """The tensors, the leading ones as their views."""
    return (*[view(t) for view, t in zip(views, tensors, strict=False)], *tensors[len(views) :])


def _launch(
    kernel: _Launcher,
    found: dict[Any, Any],
    kind: Any,
    grid: tuple[int, ...],
    tensors: tuple[Tensor | None, ...],
    others: tuple[Any, ...],
    options: dict[str, Any],
    views: tuple[Any, ...] = (),
) -> Any:
    """Launch from `found` or for the first time; `kind` stands in the key for others, options and views.

    Returns:
        what was launched, as `found` holds it; None where Triton launched by itself.
    """
    jit = kernel.kernel
    if _is_own(jit):
        jit[grid](*_given(tensors, views), *others, **options)
        return None
    active = driver.active
    device = active.get_current_device()
    pointers = [None if t is None else t.data_ptr() for t in tensors]
    key = (
        kind,
        active,
        device,
        knobs.runtime.debug,
        knobs.compilation.instrumentation_mode,
        *[None if t is None else t.dtype for t in tensors],
        *[p and p & 15 for p in pointers],
    )
    if _HIP:
        key += tuple(t is not None and t.untyped_storage().size() <= _TWO_GIB for t in tensors)
    known = found.get(key)
    if known is None:
        return _first(kernel, found, key, grid, _given(tensors, views), others, options)
    run, function, metadata, tail = known
    x, y, z = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
    stream = active.get_current_stream(device)
    made = [view.known.get(pointer) or view.at(pointer) for view, pointer in zip(views, pointers, strict=False)]
    run(x, y, z, stream, function, metadata, None, None, None, *made, *pointers[len(made) :], *others, *tail)
    return known


def _first(
    kernel: _Launcher,
    found: dict[Any, Any],
    key: Any,
    grid: tuple[int, ...],
    tensors: tuple[Any, ...],
    others: tuple[Any, ...],
    options: dict[str, Any],
) -> Any:
    jit = kernel.kernel
    # Parameters that come by name are constants, or the key would have to tell their types apart.
    named = [p.name for p in jit.params[len(tensors) + len(others) :] if p.is_constexpr and p.name in options]
    by_position = len(jit.params) - kernel.tensors - len(named)
    if (len(tensors), len(others)) != (kernel.tensors, by_position) or any(isinstance(x, Tensor) for x in others):
        raise TypeError(
            f"{jit.fn.__name__} takes {kernel.tensors} tensors and then {by_position} other arguments by position, "
            f"got {len(tensors)} and {len(others)}"
        )
    compiled = jit[grid](*tensors, *others, **options)
    # A hook may have compiled or launched in its own way; then there is nothing to keep.
    if type(compiled) is not CompiledKernel:
        return None
    if len(found) >= KEPT:
        found.clear()
    constants = tuple(options[name] for name in named)
    found[key] = compiled.run, compiled.function, compiled.packed_metadata, constants
    return found[key]
