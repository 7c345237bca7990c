"""Watching one training step: every kernel launch, the phase and the module it belongs to.

- The step runs on the CPU under a dispatch mode that sees every operator below autograd. PyTorch's own are counted as a
  GPU launches them (`cost`); dropout and attention, which a CPU composes of many, are swapped for what a GPU runs.
  fastformer's launchers run as on a GPU, with launches that only count. But for what shapes hang on (`packing`) their
  results are not computed, so numbers of such a step mean nothing.
- In the backward pass an operator belongs to the module that made its autograd node: modules mark the nodes they add.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fastformer.launches import cost
from fastformer.launches.packing import COMPUTED
from fastformer.ops import backend

_MARK = "fastformer_module"


@dataclass(frozen=True)
class Launch:
    """One operator's launches.

    Attributes:
        phase: "forward", "backward", "optimizer" or "loop" (whatever the step does between them).
        module: dotted name of the module, "" for none.
        operator: PyTorch's name ("addmm") or "fastformer::" and the kernel's ("norm.forward_tile").
        kernels: how many kernels.
    """

    phase: str
    module: str
    operator: str
    kernels: int


class _Place:
    """Where a step is."""

    def __init__(self, names: dict[int, str]) -> None:
        self.names, self.modules = names, [""]
        self.optimizing = False

    def now(self) -> tuple[str, str]:
        node: Any = torch._C._current_autograd_node()
        if node is not None:
            return "backward", node.metadata.get(_MARK, "")
        if self.optimizing:
            return "optimizer", ""
        return ("forward" if len(self.modules) > 1 else "loop"), self.modules[-1]

    def enter(self, module: torch.nn.Module, args: Any) -> None:
        # What led here without a module of its own is the enclosing one's.
        _mark(args, self.modules[-1])
        self.modules.append(self.names.get(id(module), self.modules[-1]))

    def leave(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        _mark(output, self.modules.pop())


def _mark(output: Any, name: str) -> None:
    """Write a module's name on the autograd nodes that it, and no module inside it, has added."""
    found: list[Any] = [
        t.grad_fn for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.grad_fn is not None
    ]
    while found:
        node = found.pop()
        if node is None or _MARK in node.metadata:
            continue
        node.metadata[_MARK] = name
        found.extend(following for following, _ in node.next_functions)


class Tracer(TorchDispatchMode):
    """Collects `launches` and counts `host_reads` while it is on."""

    def __init__(self, place: _Place) -> None:
        super().__init__()
        self.place, self.launches, self.host_reads = place, list[Launch](), 0

    def add(self, name: str, kernels: int) -> None:
        if kernels:
            self.launches.append(Launch(*self.place.now(), name, kernels))

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function._schema.name.split("::")[1]
        result = function(*args, **kwargs)
        # Optimizers keep their step counts on the CPU.
        self.host_reads += name in cost.READS and not self.place.optimizing
        self.add(name, cost.launches(function._schema, args, kwargs, result))
        return result


# What autocast computes in fp32 on a GPU and not on a CPU, of what classifiers and language models call.
_SINGLE = (
    torch.nn.functional.cross_entropy,
    torch.nn.functional.layer_norm,
    torch.nn.functional.log_softmax,
    torch.nn.functional.softmax,
)


class _AsOnGpu(TorchFunctionMode):
    """Dropout and attention as single operators, as a GPU runs them, and what autocast computes in fp32 there."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is Tensor.tolist:
            self.tracer.host_reads += 1
        if function in (torch.nn.functional.dropout, torch.dropout):
            return self._dropout(*args, **kwargs)
        if function is torch.nn.functional.scaled_dot_product_attention:
            return _Attention.apply(self.tracer, *args[:3] or (kwargs["query"], kwargs["key"], kwargs["value"]))
        if function in _SINGLE and torch.is_autocast_enabled("cpu"):
            args, kwargs = pytree.tree_map(_single, (args, kwargs))
        return function(*args, **kwargs)

    def _dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return torch.native_dropout(input, p, True)[0] if training and p > 0 else input


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tracer: Tracer, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        tracer.add("scaled_dot_product_attention", 1)
        ctx.tracer, ctx.like = tracer, (query, key, value)
        return _blank(query, value.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        ctx.tracer.add("scaled_dot_product_attention_backward", 2)
        return None, *(_blank(t, t.shape[-1]) for t in ctx.like)


def _single(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def _blank(like: Tensor, width: int) -> Tensor:
    """An uncounted tensor."""
    with torch.utils._python_dispatch._disable_current_modes():
        return torch.ones(*like.shape[:-1], width, dtype=like.dtype)


@contextlib.contextmanager
def _counting(tracer: Tracer) -> Iterator[None]:
    """Triton launches that are counted instead of compiled and run."""
    from triton.runtime.jit import JITFunction

    def count(self: Any, *args: Any, **kwargs: Any) -> None:
        operator = self.fn.__module__.removeprefix("fastformer.kernels.").split(".")[0]
        tracer.add(f"fastformer::{operator}.{self.fn.__name__.strip('_')}", 1)
        if self.fn.__name__ in COMPUTED:
            with torch.utils._python_dispatch._disable_current_modes():
                COMPUTED[self.fn.__name__](*args)

    run = JITFunction.run
    JITFunction.run = count
    try:
        yield
    finally:
        JITFunction.run = run


@contextlib.contextmanager
def tracing(model: torch.nn.Module) -> Iterator[Tracer]:
    """A tracer that watches whatever runs in the context; for a model on the CPU.

    Raises:
        RuntimeError: Triton is not usable here, or is in interpreter mode.
    """
    usable, why = backend.triton_status()
    if not usable:
        raise RuntimeError(f"counting launches needs Triton: {why}")
    from fastformer.kernels import targets

    if targets.interpreting():
        raise RuntimeError("counting launches needs Triton's compiler, not its interpreter: unset TRITON_INTERPRET")
    place = _Place({id(module): name for name, module in model.named_modules()})
    # What wraps the model is no module of its own.
    place.names[id(model)] = ""
    tracer = Tracer(place)

    def optimizing(on: bool) -> Callable[..., None]:
        return lambda *args: setattr(place, "optimizing", on)

    every = torch.nn.modules.module
    with contextlib.ExitStack() as stack:
        for handle in (
            every.register_module_forward_pre_hook(place.enter),
            every.register_module_forward_hook(place.leave, always_call=True),
            register_optimizer_step_pre_hook(optimizing(True)),
            register_optimizer_step_post_hook(optimizing(False)),
        ):
            stack.callback(handle.remove)
        stack.enter_context(targets.assume(targets.TARGETS["sm_90"]))
        stack.enter_context(backend.standing_in())
        stack.enter_context(_counting(tracer))
        stack.enter_context(_AsOnGpu(tracer))
        stack.enter_context(tracer)
        yield tracer
