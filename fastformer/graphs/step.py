"""One captured step: a forward graph and, for training, a backward graph, between which autograd sees one operation.

Gradients of parameters leave the backward graph in tensors that all buckets of a model share (`Shared.sinks`); autograd
hands them on to `.grad`, so hooks of parameters, DDP, GradScaler and accumulation work as without graphs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils import _pytree as pytree

from fastformer.graphs.buckets import Arrival, Bucket, CannotCapture, StaticBatch
from fastformer.graphs.capture import Recorder


class Shared:
    """What all captured steps of a model share.

    Attributes:
        recorder: what captures; its graphs share one memory pool.
        generation: number of forward replays so far; a backward needs that none came after its own forward.
    """

    def __init__(self, recorder: Recorder, parameters: Sequence[Tensor]) -> None:
        self.recorder, self.generation = recorder, 0
        self.parameters = list(parameters)
        # Outside the pool: `.grad` may lie here until the next backward.
        self.sinks = [torch.empty_like(p, requires_grad=False) for p in self.parameters]

    def free_sinks(self) -> None:
        """Before sinks are written: a `.grad` that still lies in one, because steps accumulate, gets its own memory."""
        lying = [
            (p, p.grad)
            for p, sink in zip(self.parameters, self.sinks, strict=True)
            if p.grad is not None and p.grad.data_ptr() == sink.data_ptr()
        ]
        if lying:
            kept = [torch.empty_like(grad) for _, grad in lying]
            torch._foreach_copy_(kept, [grad for _, grad in lying])
            for (p, _), grad in zip(lying, kept, strict=True):
                p.grad = grad


class Pending:
    """A replayed forward whose backward has not run; alive as long as autograd may still run it."""

    done = False


class CapturedStep:
    """The model on one bucket.

    Args:
        run: the model's forward without graphs, on keyword arguments.
        model: whose buffers and random state the rehearsal must leave as they are.
        shared: what captures, and where gradients go.
        bucket: shapes to capture.
        like: the first batch, of whose signature all others are.
        pad_token_id: the id at places without a token.
        trains: whether to capture a backward.

    Raises:
        CannotCapture: the outputs cannot be cut back to a batch's shape, or none depends on a trained parameter.
        RuntimeError: from PyTorch, for what a CUDA graph does not allow.
    """

    def __init__(
        self,
        run: Callable[..., Any],
        model: torch.nn.Module,
        shared: Shared,
        bucket: Bucket,
        like: Arrival,
        pad_token_id: int,
        trains: bool,
    ) -> None:
        self.bucket, self.shared, self.trains = bucket, shared, trains
        device = shared.recorder.device
        self.batch = StaticBatch(bucket, like, pad_token_id, device)
        self.batch.fill(like)
        # One sequence more, one token more to read and two more to write tell the dimensions of outputs apart.
        wide = Bucket(bucket.rows, bucket.batch + 1, bucket.seqlen + 1, bucket.target and bucket.target + 2)
        wider = StaticBatch(wide, like, pad_token_id, device)
        wider.fill(like)
        with _unchanged(model, device), _uncached_autocast(device), contextlib.ExitStack() as aliased:
            # Parameters move to where they are wanted, before others stand for them.
            with torch.no_grad():
                shared.recorder.rehearse(lambda: run(**self.batch.arguments()) and None)
            self.parameters = aliased.enter_context(_aliased(model, shared.parameters)) if trains else []
            # Grad mode decides which kernels run: a captured evaluation is one without gradients.
            aliased.enter_context(torch.set_grad_enabled(trains))
            self.dims = _counting(*(self._rehearse(run, batch) for batch in (self.batch, wider)))
            del wider
            self._replay, result = shared.recorder.record(lambda: run(**self.batch.arguments()))
            leaves, self.structure = pytree.tree_flatten(result)
            self.constants = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            outputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            self.places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
            self.differentiable = [trains and out.requires_grad for out in outputs]
            if trains:
                self._record_backward([out for out in outputs if out.requires_grad])
        # Without their history, so that what it kept returns to the pool, for other buckets.
        self.outputs = [out.detach() for out in outputs]
        self.parameters = []

    def _rehearse(self, run: Callable[..., Any], batch: StaticBatch) -> list[torch.Size]:
        """Shapes of the outputs, from a run that also compiles and sets up what a capture may not."""

        def work() -> list[torch.Size]:
            outputs = [out for out in pytree.tree_leaves(run(**batch.arguments())) if isinstance(out, Tensor)]
            trained = [out for out in outputs if out.requires_grad]
            if trained:
                _check_leaves(trained, self.shared.parameters)
                grads = [torch.zeros_like(out) for out in trained]
                torch.autograd.grad(trained, self.parameters, grads, allow_unused=True)
            return [out.shape for out in outputs]

        return self.shared.recorder.rehearse(work)

    def _record_backward(self, outputs: list[Tensor]) -> None:
        if not outputs:
            raise CannotCapture("no output depends on a trained parameter")
        shared = self.shared
        self.grads = [torch.zeros_like(out, memory_format=torch.contiguous_format) for out in outputs]
        self.dirty = [False] * len(outputs)

        def backward() -> list[int]:
            grads = torch.autograd.grad(outputs, self.parameters, self.grads, allow_unused=True)
            used = [i for i, grad in enumerate(grads) if grad is not None]
            torch._foreach_copy_([shared.sinks[i] for i in used], [grad for grad in grads if grad is not None])
            return used

        self._replay_backward, used = shared.recorder.record(backward)
        self.used = set(used)

    def __call__(self, arrival: Arrival, pending: Pending) -> Any:
        """The model's outputs for a batch of this bucket, shaped as without graphs, in memory of their own."""
        self.batch.fill(arrival)
        if self.trains:
            outputs = _Replay.apply(self, arrival, pending, *self.shared.parameters)
        else:
            outputs = self.forward(arrival)
        leaves = list(self.constants)
        for place, out in zip(self.places, outputs, strict=True):
            leaves[place] = out
        return pytree.tree_unflatten(leaves, self.structure)

    def forward(self, arrival: Arrival) -> tuple[Tensor, ...]:
        self.shared.generation += 1
        self._replay()
        return tuple(
            _cut(out, dims, arrival.batch, (arrival.seqlen, arrival.target))
            for out, dims in zip(self.outputs, self.dims, strict=True)
        )

    def backward(self, grads: Iterable[Tensor | None]) -> list[Tensor | None]:
        """Gradients of the parameters, each in its sink, for those of the differentiable outputs."""
        self.shared.free_sinks()
        for i, (buffer, grad) in enumerate(zip(self.grads, grads, strict=True)):
            # A part that no gradient reaches must be zero; it is unless an earlier batch left something.
            whole = grad is not None and grad.shape == buffer.shape
            if self.dirty[i] and not whole:
                buffer.zero_()
            self.dirty[i] = grad is not None
            if grad is not None:
                common = tuple(slice(0, min(a, b)) for a, b in zip(grad.shape, buffer.shape, strict=True))
                buffer[common].copy_(grad[common])
        self._replay_backward()
        return [sink.detach() if i in self.used else None for i, sink in enumerate(self.shared.sinks)]


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, step: CapturedStep, arrival: Arrival, pending: Pending, *parameters: Tensor) -> Any:
        outputs = step.forward(arrival)
        ctx.mark_non_differentiable(*(o for o, d in zip(outputs, step.differentiable, strict=True) if not d))
        ctx.set_materialize_grads(False)
        ctx.step, ctx.pending, ctx.generation = step, pending, step.shared.generation
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        step = ctx.step
        if ctx.generation != step.shared.generation:
            raise RuntimeError(
                "backward of a graphed step whose memory a later forward has used; call backward() before the next "
                "forward, or run this model without ff.graphed"
            )
        ctx.pending.done = True
        return None, None, None, *step.backward(g for g, d in zip(grads, step.differentiable, strict=True) if d)


def _counting(here: list[torch.Size], there: list[torch.Size]) -> list[tuple[bool, int]]:
    """Of every output, whether its first dimension counts sequences, and whether its second one counts tokens that are
    read (1) or written (2).

    Args:
        here, there: shapes for a bucket and for one of one more sequence, one more token to read and two to write.
    """
    found = []
    for a, b in zip(here, there, strict=True):
        grown = [y - x for x, y in zip(a, b, strict=True)]
        if any(grown[2:]) or grown[:1] not in ([], [0], [1]) or grown[1:2] not in ([], [0], [1], [2]):
            raise CannotCapture(f"an output of shape {tuple(a)} grows in other dimensions than batch and sequence")
        found.append((grown[:1] == [1], grown[1] if len(grown) > 1 else 0))
    return found


def _cut(out: Tensor, dims: tuple[bool, int], batch: int, lengths: tuple[int, int]) -> Tensor:
    """A copy of a bucket's output in the shape it has for a batch; places past the bucket's are zero.

    Args:
        dims: as `_counting` says. lengths: tokens of the padded batch that are read, and written.
    """
    if dims[0]:
        out = out[:batch]
    seqlen = lengths[dims[1] - 1]
    if not dims[1] or out.shape[1] == seqlen:
        return out.clone(memory_format=torch.contiguous_format)
    if out.shape[1] > seqlen:
        return out[:, :seqlen].clone(memory_format=torch.contiguous_format)
    wide = out.new_zeros(out.shape[0], seqlen, *out.shape[2:])
    wide[:, : out.shape[1]] = out
    return wide


@contextlib.contextmanager
def _unchanged(model: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """Random state and buffers as they were before, so that a run repeats whether or not it captures."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with torch.random.fork_rng([device] if device.type == "cuda" else [], device_type="cuda"):
        yield
    with torch.no_grad():
        for buffer, kept in buffers:
            buffer.copy_(kept)


def _check_leaves(outputs: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
    """See that outputs depend on aliases alone.

    Raises:
        CannotCapture: they depend on one of `parameters` itself, which something has kept outside its module.
    """
    real, seen = {id(p) for p in parameters}, set()
    found: list[Any] = [out.grad_fn for out in outputs]
    while found:
        node = found.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if id(getattr(node, "variable", None)) in real:
            raise CannotCapture("a parameter that is read from outside its module")
        found.extend(following for following, _ in node.next_functions)


@contextlib.contextmanager
def _aliased(model: torch.nn.Module, parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Other leaves of autograd in the place of `parameters`, of the same memory, in their order.

    A parameter's own node of accumulation lives as long as any loss of an earlier step, has hooks, and remembers the
    stream on which it was made; a capture must not wait for that one.
    """
    aliases: dict[int, Tensor] = {id(p): torch.nn.Parameter(p.detach()) for p in parameters}
    held: list[tuple[dict[str, Any], str, Any]] = [
        (module._parameters, name, p)
        for module in model.modules()
        for name, p in module._parameters.items()
        if id(p) in aliases
    ]
    try:
        for holder, name, p in held:
            holder[name] = aliases[id(p)]
        yield list(aliases.values())
    finally:
        for holder, name, p in held:
            holder[name] = p


@contextlib.contextmanager
def _uncached_autocast(device: torch.device) -> Iterator[None]:
    """Autocast as it is, but without its cache of cast weights: those of a capture would be the pool's, and stale."""
    if not torch.is_autocast_enabled(device.type):
        yield
        return
    dtype = torch.get_autocast_dtype(device.type)
    with torch.autocast(device.type, dtype, cache_enabled=False):
        yield
