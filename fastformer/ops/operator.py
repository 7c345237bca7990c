"""One definition of an operator, two routes to it.

- The *light* route, for plain tensors in eager mode: the launcher under a `torch.autograd.Function`.
- The *full* route, everywhere else (torch.compile, export, fake tensors, tensor subclasses, dispatch modes):
  `torch.library.custom_op` with its fake and autograd registrations.
- Both share the same forward, backward and `setup_context`, so they cannot drift apart.
- A repeated call on the light route finds what the first one of its kind has checked, chosen and prepared (`Kind`), and
  goes straight to the launch.

At BERT widths a layer's operators take a few us of GPU time each, so the host side of a call decides: the light route
is written for it, and `bench/host.py` measures it.
"""

from __future__ import annotations

import functools
import importlib
import operator
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType, NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from fastformer.ops import backend

_PLAIN = frozenset({Tensor, Parameter})
# Asking a class is a third of the cost of isinstance, which for tensors runs Python.
_NO_TENSOR = frozenset({NoneType, bool, int, float, str, torch.dtype})
_is_compiling = torch.compiler.is_compiling
_grad_enabled = torch.is_grad_enabled
_dispatch_modes = torch._C._len_torch_dispatch_stack
_functorch_level = torch._C._functorch.maybe_current_level
_autocasts = torch._C._is_any_autocast_enabled
_saved_tensors_hooks = torch._C._autograd._top_saved_tensors_default_hooks
# Kinds of calls that an operator remembers; a training step makes a few of each.
KEPT = 1024


@functools.cache
def kernels(name: str) -> ModuleType:
    """Module `name` of fastformer.kernels, imported (and triton with it) when a launcher is first needed."""
    return importlib.import_module(f"fastformer.kernels.{name}")


def _is_watched() -> bool:
    """Whether more than eager autograd is to see a call. A mode that stands in for launches sees them by itself."""
    return _is_compiling() or _functorch_level() is not None or (_dispatch_modes() > 0 and not backend.is_standing_in())


class Kind:
    """One kind of call of an operator: what its calls share, derived by the first of them.

    Attributes:
        operator: whose calls they are.
        run: launches forward, `run(*tensors)` → the function's results; tensors are its leading arguments.
        recorded: whether autograd is to see the call.
        needs: whether each tensor takes a gradient; `given` picks those that do. autograd is handed no others: an
            argument more costs it 0.5 µs.
        numbers: what else backward needs to know, which no tensor tells.
        shown: picks the results that a call hands out; `several` says that these are a tuple.
        bound: of the last backward the dtypes and strides of its gradients; what launches it for such ones,
            `back(*grads, *saved)`, None where the operator's own backward runs; and what picks the gradients of the
            tensors that `given` picks from its result.
        hooked: whether hooks hold saved tensors elsewhere meanwhile, which may lay them out anew; `bound` covers them.
    """

    __slots__ = (
        "bound", "given", "hooked", "needs", "numbers", "operator", "recorded", "run", "several", "shown",
    )  # fmt: skip

    def __init__(
        self,
        operator: Operator,
        run: Callable[..., Any],
        tensors: Sequence[Tensor | None],
        numbers: Any,
        visible: int | None = None,
    ) -> None:
        """tensors: of the first call; visible: how many results a call hands out, as `Operator` takes it."""
        self.operator, self.run, self.numbers = operator, run, numbers
        self.needs = [t is not None and t.requires_grad for t in tensors]
        self.recorded = torch.is_grad_enabled() and any(self.needs)
        self.given = _picker([place for place, need in enumerate(self.needs) if need])
        self.shown, self.several = _first_ones(visible), visible not in (None, 1)
        self.bound: tuple[Any, Any, Any] = None, None, None
        self.hooked = _saved_tensors_hooks(True) is not None

    def __call__(self, *tensors: Tensor | None) -> Any:
        if self.recorded:
            return self.operator.apply_kind(*self.given(tensors), (self, tensors))
        return self.shown(self.run(*tensors))

    def bind(
        self, layout: Any, grads: tuple[Tensor | None, ...], saved: tuple[Tensor | None, ...]
    ) -> tuple[Any, Any, Any]:
        """Make `bound` for tensors laid out like these."""
        found = self.operator.bind(self.numbers, self.needs, grads, saved)
        if found is None:
            self.bound = layout, None, None
        else:
            back, places = found
            picks = _picker([place for place, need in zip(places, self.needs, strict=True) if need])
            self.bound = layout, back, picks
        return self.bound


class _Context(NamedTuple):
    """What an operator's own backward reads of autograd's context, for a call that had a kind."""

    saved_tensors: tuple[Tensor | None, ...]
    needs_input_grad: list[bool]
    numbers: Any


class Kinds:
    """The kinds of calls of one function, found by all that decides on checks, route and launches. Where nothing has a
    derivative, any function of a call's tensors can stand for a `Kind`."""

    __slots__ = ("found",)

    def __init__(self) -> None:
        self.found: dict[Any, Callable[..., Any]] = {}

    def find(self, numbers: Any, *tensors: Tensor | None) -> tuple[Any, Callable[..., Any] | None]:
        """(key of a call, its kind if that is known); (None, None) for calls that take no kind's way: watched ones,
        those with forward-mode derivatives, those whose arguments are wrong or strange. The first tensor's device
        decides on autocast."""
        if (
            _is_compiling()
            or _functorch_level() is not None
            or forward_ad._current_level >= 0
            or (_dispatch_modes() > 0 and not backend.is_standing_in())
        ):
            return None, None
        try:
            # PyTorch's operators need no preparation.
            if tensors[0].is_cpu and backend.backend_for(tensors[0].device) == "torch":  # type: ignore[union-attr]
                return None, None
            key = (
                numbers,
                _grad_enabled(),
                _saved_tensors_hooks(True) is None,
                _autocasts() and backend.autocast_dtype(tensors[0].device),  # type: ignore[union-attr]
                backend.state(),
                *[
                    None if t is None else (type(t), t.shape, t.stride(), t.dtype, t.device, t.requires_grad)
                    for t in tensors
                ],
            )  # fmt: skip
            return key, self.found.get(key)
        except (AttributeError, RuntimeError, TypeError):
            # No tensor, or one without strides: the checks that follow say so.
            return None, None

    def keep(self, key: Any, kind: Callable[..., Any]) -> Callable[..., Any]:
        """Remember a kind of call whose arguments are right and all of `is_plain`."""
        if len(self.found) >= KEPT:
            self.found.clear()
        self.found[key] = kind
        return kind


def is_plain(args: Sequence[Any]) -> bool:
    """Whether a call may take the light route: eager mode, ordinary tensors, no dispatch mode watching."""
    if _is_watched():
        return False
    for a in args:
        kind = type(a)
        if kind not in _NO_TENSOR and kind not in _PLAIN and isinstance(a, Tensor):
            return False
    return True


def on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with its first tensor's GPU as the current one, on which Triton launches whatever it is given."""

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        for a in args:
            if type(a) not in _NO_TENSOR and isinstance(a, Tensor):
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
        mutates: names of the arguments that the function writes to.
    """

    def __init__(
        self, name: str, function: Callable[..., Any], fake: Callable[..., Any], mutates: tuple[str, ...] = ()
    ) -> None:
        self.name = name
        self.function = on_its_device(function)
        schema = torch.library.infer_schema(function, mutates_args=mutates)
        self.op = torch.library.custom_op(f"fastformer::{name}", self.function, mutates_args=mutates, schema=schema)
        self.op.register_fake(fake)

    def __call__(self, *args: Any) -> Any:
        return self.function(*args) if is_plain(args) else self.op(*args)


class Operator(Kernel):
    """A kernel with a derivative.

    Args:
        setup_context: `(ctx, inputs, output)`, saves what backward needs.
        backward: `(ctx, *grad_outputs)`, returns one gradient (or None) for every argument; it calls `Kernel`s. It may
            get fewer gradients than there are results: see `visible`.
        second: like backward, made of differentiable operations only (`differentiate` helps); runs in its place when a
            second derivative was asked for (create_graph=True). Without one that raises RuntimeError: a silent wrong
            result is worse.
        visible: how many of the function's results, the first ones, a call hands out (one: as a tensor); the rest are
            for backward alone and have no derivative. On the light route they are no outputs, which saves their
            bookkeeping. None: all of them.
        saved: `(numbers, tensors, results)`, what setup_context saves, for calls of a `Kind`; backward and second then
            find the kind's numbers in `ctx.numbers`.
        bind: `(numbers, needs, grads, saved)`, of a kind its `back` for tensors laid out like these, and where in that
            one's result the gradient of each tensor stands (None: nowhere); or None.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        fake: Callable[..., Any],
        setup_context: Callable[..., None],
        backward: Callable[..., Any],
        second: Callable[..., Any] | None = None,
        visible: int | None = None,
        saved: Callable[..., tuple[Tensor | None, ...]] | None = None,
        bind: Callable[..., tuple[Callable[..., Any], Sequence[int | None]] | None] | None = None,
    ) -> None:
        super().__init__(name, function, fake)
        self.bind = bind or (lambda *_: None)
        shown = self.shown = _first_ones(visible)

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
            return shown(output)

        def setup(ctx: Any, inputs: Any, output: Any) -> None:
            setup_context(ctx, inputs, output)
            if visible is not None:
                ctx.mark_non_differentiable(*(ctx.non_differentiable or ()), *output[visible:])

        self.op.register_autograd(guarded, setup_context=setup)
        self.apply_light = _apply(f"{name}_light", forward, guarded)
        if saved is not None:

            def forward_of_kind(ctx: Any, *args: Any) -> Any:
                kind, tensors = args[-1]
                ctx.kind = kind
                results = kind.run(*tensors)
                ctx.save_for_backward(*saved(kind.numbers, tensors, results))
                if kind.several:
                    ctx.set_materialize_grads(False)
                return kind.shown(results)

            def backward_of_kind(ctx: Any, *grads: Any) -> Any:
                kind, tensors = ctx.kind, ctx.saved_tensors
                if not _grad_enabled() and not _is_watched():
                    if len(grads) == 1 and grads[0] is not None and not kind.hooked:
                        layout: Any = grads[0].dtype, grads[0].stride()
                    else:
                        laid = (*grads, *tensors) if kind.hooked else grads
                        layout = [None if t is None else (t.dtype, t.stride()) for t in laid]
                    bound = kind.bound
                    if layout != bound[0]:
                        bound = kind.bind(layout, grads, tensors)
                    _, back, picks = bound
                    if back is not None:
                        return *picks(back(*grads, *tensors)), None
                found = guarded(_Context(tensors, kind.needs, kind.numbers), *grads)
                return *kind.given(found), None

            self.apply_kind = _apply(f"{name}_kind", forward_of_kind, backward_of_kind)

    def __call__(self, *args: Any) -> Any:
        if _is_watched():
            return self.shown(self.op(*args))
        needs = False
        for a in args:
            kind = type(a)
            if kind in _PLAIN:
                needs = needs or a.requires_grad
            elif kind not in _NO_TENSOR and isinstance(a, Tensor):
                return self.shown(self.op(*args))
        # Forward-mode derivatives go there too: PyTorch then says that there are none, instead of dropping the tangent.
        if (needs and torch.is_grad_enabled()) or forward_ad._current_level >= 0:
            return self.apply_light(*args)
        return self.shown(self.function(*args))


def _apply(name: str, forward: Callable[..., Any], backward: Callable[..., Any]) -> Callable[..., Any]:
    """`apply` of an autograd Function, without what it does for functorch: callers have seen that it is not at work."""
    function: Any = type(
        name, (torch.autograd.Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    )
    # Called as it is, without BackwardCFunction's choice between backward and vjp.
    function._backward_cls.apply = backward
    return super(torch.autograd.Function, function).apply


def _picker(places: Sequence[int | None]) -> Callable[[Any], tuple[Any, ...]]:
    """Picks these places of a tuple or list, in C where there are several; None where a place is None."""
    if len(places) > 1 and None not in places:
        return operator.itemgetter(*places)
    return lambda items: tuple([None if place is None else items[place] for place in places])


def light(function: Any) -> Callable[..., Any]:
    """`function.apply` of an autograd Function with a setup_context of its own, which makes PyTorch bind every call's
    arguments through inspect.signature: in plain eager mode the same forward and backward run without that."""

    def forward(ctx: Any, *args: Any) -> Any:
        output = function.forward(*args)
        function.setup_context(ctx, args, output)
        return output

    apply = _apply(f"{function.__name__}_light", forward, function.backward)

    def call(*args: Any) -> Any:
        return function.apply(*args) if _is_watched() else apply(*args)

    return call


def _first_ones(count: int | None) -> Callable[[Any], Any]:
    if count is None:
        return lambda output: output
    if count == 1:
        return lambda output: output[0]
    return lambda output: tuple(output[:count])


def differentiate(
    name: str,
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    tensors: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """The backward of operator `name` with a graph of its own, for `Operator`'s `second`.

    Args:
        function: the reference, `function(*tensors)`, in differentiable operations.
        tensors: what the derivative is with respect to, as backward unpacked it.
        grads: of the function's results, None where there is none.

    Returns:
        the gradient of each tensor, None where it takes none.
    """
    say_once(name)
    # Views, so that what reaches one tensor by way of another (b = f(a)) is not counted for it here as well.
    views = [None if t is None else t.view_as(t) for t in tensors]
    results = function(*views)
    pairs = zip(results if isinstance(results, tuple) else (results,), grads, strict=True)
    used = [(r, g) for r, g in pairs if g is not None and r.requires_grad]
    wanted = [v for v in views if v is not None and v.requires_grad]
    if not used or not wanted:
        return [None] * len(views)
    outputs, sent = zip(*used, strict=True)
    found = iter(torch.autograd.grad(outputs, wanted, sent, create_graph=True, allow_unused=True))
    return [next(found) if v is not None and v.requires_grad else None for v in views]


@functools.cache
def say_once(name: str) -> None:
    """Warn, once an operator, that PyTorch's operators compute a backward that has a derivative of its own."""
    warnings.warn(
        f"fastformer::{name}: no kernel computes a second derivative (create_graph=True); PyTorch's operators compute "
        "this backward (the same result, slower and in more memory)",
        stacklevel=2,
    )
