"""One definition of an operator, two routes to it.

- The *light* route, for plain tensors in eager mode: the launcher under a `torch.autograd.Function` (6–12 µs a call).
- The *full* route, everywhere else (torch.compile, export, fake tensors, tensor subclasses, dispatch modes):
  `torch.library.custom_op` with its fake and autograd registrations (20–36 µs a call in eager mode).
- Both share the same forward, backward and `setup_context`, so they cannot drift apart.

At BERT widths a layer's operators take a few µs of GPU time each, so the host side of a call decides.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from fastformer.ops import backend

_PLAIN = (Tensor, Parameter)


def is_plain(args: Sequence[Any]) -> bool:
    """Whether a call may take the light route: eager mode, ordinary tensors, no dispatch mode watching.

    One that stands in for the launches watches them from there.
    """
    if torch.compiler.is_compiling() or (torch._C._len_torch_dispatch_stack() > 0 and not backend.is_standing_in()):
        return False
    return all(type(a) in _PLAIN for a in args if isinstance(a, Tensor)) and (
        torch._C._functorch.maybe_current_level() is None
    )


def _on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with its first tensor's GPU as the current one, on which Triton launches whatever it is given."""

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        for a in args:
            if isinstance(a, Tensor):
                if a.is_cuda and a.get_device() != torch.cuda.current_device():
                    with torch.cuda.device(a.get_device()):
                        return function(*args)
                break
        return function(*args)

    return run


class Kernel:
    """A function of tensors and numbers without a derivative of its own, callable on either route.

    Args:
        name: operator name; registered as `fastformer::{name}`.
        function: implementation with a schema-inferable signature (Tensor, Tensor | None, int, float, bool, str);
            returns a Tensor or a tuple of Tensors that alias neither each other nor an input.
        fake: same signature, returns empty tensors of the right shape, dtype and device.
    """

    def __init__(self, name: str, function: Callable[..., Any], fake: Callable[..., Any]) -> None:
        self.name = name
        self.function = _on_its_device(function)
        schema = torch.library.infer_schema(function, mutates_args=())
        self.op = torch.library.custom_op(f"fastformer::{name}", self.function, mutates_args=(), schema=schema)
        self.op.register_fake(fake)

    def __call__(self, *args: Any) -> Any:
        return self.function(*args) if is_plain(args) else self.op(*args)


class Operator(Kernel):
    """A kernel with a derivative.

    Args:
        setup_context: `(ctx, inputs, output)`, saves what backward needs.
        backward: `(ctx, *grad_outputs)`, returns one gradient (or None) for every argument; it calls `Kernel`s.
        second: like backward, made of differentiable operations only; runs in its place when a second derivative was
            asked for (create_graph=True). Without one that raises RuntimeError: a silent wrong result is worse.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        fake: Callable[..., Any],
        setup_context: Callable[..., None],
        backward: Callable[..., Any],
        second: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(name, function, fake)

        def guarded(ctx: Any, *grads: Any) -> Any:
            if not torch.is_grad_enabled():
                return backward(ctx, *grads)
            if second is None:
                raise RuntimeError(
                    f"fastformer::{name} has no second derivative (create_graph=True); set FASTFORMER_BACKEND=torch, "
                    "whose operators have one"
                )
            return second(ctx, *grads)

        # One forward with ctx: with setup_context apart, PyTorch binds every call's arguments through
        # inspect.signature, which costs more than the rest of the call.
        def forward(ctx: Any, *args: Any) -> Any:
            output = self.function(*args)
            setup_context(ctx, args, output)
            return output

        self.op.register_autograd(guarded, setup_context=setup_context)
        self.light: Any = type(
            f"{name}_light",
            (torch.autograd.Function,),
            {
                "forward": staticmethod(forward),
                "backward": staticmethod(guarded),
            },
        )
        # Function.apply only adds what functorch needs, and `is_plain` has seen that it is not at work.
        self.apply_light = super(torch.autograd.Function, self.light).apply  # type: ignore[misc]

    def __call__(self, *args: Any) -> Any:
        if not is_plain(args):
            return self.op(*args)
        # Forward-mode derivatives go there too: PyTorch then says that there are none, instead of dropping the tangent.
        if forward_ad._current_level >= 0 or (
            torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)
        ):
            return self.apply_light(*args)
        return self.function(*args)
