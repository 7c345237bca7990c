"""`graphed` and `ungraphed`: a patched model whose steps are replayed as CUDA graphs, in place and back."""

from __future__ import annotations

import functools
import time
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastformer.graphs import capture
from fastformer.graphs.buckets import Arrival, Bucket, CannotCapture, read
from fastformer.graphs.step import CapturedStep, Pending, Shared
from fastformer.integrations.families.batch import named_arguments
from fastformer.integrations.swap import ORIGINAL, UNDO
from fastformer.nn.parts import has_hooks

_STATE, _BASE = "_fastformer_graphs", "_fastformer_base"


@dataclass
class GraphReport:
    """What `graphed` has captured and replayed so far; it keeps itself up to date. Print it.

    Attributes:
        model: class name of the model.
        captured: (bucket, "training" or "evaluation", seconds the capture took).
        replays: calls that were replayed.
        eager: calls that ran without a graph, by reason.
    """

    model: str
    captured: list[tuple[Bucket, str, float]] = field(default_factory=list)
    replays: int = 0
    eager: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        lines = [f"fastformer graphs of {self.model}: {len(self.captured)} captured, {self.replays} calls replayed"]
        lines += [f"  {bucket} ({use}): captured in {took:.1f} s" for bucket, use, took in self.captured]
        lines += [f"  {n} calls without a graph: {why}" for why, n in self.eager.most_common()]
        return "\n".join(lines)


def graphed(
    model: torch.nn.Module,
    token_budget: int = 16384,
    max_seqlen: int = 512,
    *,
    max_buckets: int = 16,
    progress: Callable[[str], None] | None = print,
) -> GraphReport:
    """Replay a patched model's forward and backward as CUDA graphs, in place; the training loop stays as it is.

    A batch runs in a bucket: its number of real tokens, its longest sequence and its number of sequences, each rounded
    up. A bucket's forward and backward are captured the first time a batch falls into it and replayed from then on;
    all buckets share one memory pool. Losses, gradients and outputs are those of the patched model; outputs have
    memory of their own. Gradients are handed to autograd, so hooks of parameters, DDP, GradScaler and accumulation
    work. Parameters may be changed in place (optimizers, load_state_dict, EMA); moved ones are captured anew.

    Calls that cannot be replayed run as before and are counted with their reason in the report: on a CPU, beyond the
    limits given here, with hooks inside the model, with outputs a graph cannot hold (attention weights), or before an
    earlier forward's backward.

    Args:
        model: a model that `ff.patch` has made able to run without padding (BERT-class, decoders and encoder-decoders).
        token_budget: the most real tokens a captured batch may have.
        max_seqlen: the longest sequence of a captured batch, in tokens.
        max_buckets: how many steps may be captured, training and evaluation apart; further batches take the smallest
            captured bucket that holds them, or none.
        progress: called with a line at each capture; None for silence.

    Raises:
        TypeError: `model` is not a torch.nn.Module.
        ValueError: it is not patched, trains with gradient checkpointing (whose recomputation reads random states on
            the host), or a limit is not positive.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for name, value in (("token_budget", token_budget), ("max_seqlen", max_seqlen), ("max_buckets", max_buckets)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")
    if not any(getattr(m, "fastformer_unpad", False) for m in model.modules()):
        raise ValueError(
            f"model must be patched by ff.patch and able to run without padding, got {type(model).__name__}"
        )
    checkpointed = _checkpointed(model)
    if checkpointed:
        raise ValueError(
            f"model must train without gradient checkpointing, which cannot be captured; it is on in {checkpointed}"
        )
    ungraphed(model)
    report = GraphReport(type(model).__name__)
    state = _Graphs(report, token_budget, max_seqlen, max_buckets, progress)
    model.__dict__[_STATE] = state
    cls: Any = type(model)
    model.__class__ = _graphed_class(cls)
    return report


def ungraphed(model: torch.nn.Module) -> bool:
    """Undo `graphed`, and free its memory; whether there was anything to undo.

    Raises:
        TypeError: `model` is not a torch.nn.Module.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if _STATE not in model.__dict__:
        return False
    state = model.__dict__.pop(_STATE)
    model.__class__ = type(model).__dict__[_BASE]
    # A gradient that lies in a sink keeps it alive by itself; everything else goes.
    state.forget()
    return True


@functools.cache
def _graphed_class(base: Any) -> Any:
    """`base` with a forward that replays; copies and pickles of its instances are of `base`."""

    # Trainers read the signature of forward, to drop columns it does not take.
    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__[_STATE].call(self, base.forward.__get__(self), args, kwargs)

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        # Graphs hold addresses of this process and of this instance.
        make, arguments, state, *rest = base.__reduce_ex__(self, max(int(protocol), 2))
        if arguments[0] is graphed_class:
            make, arguments = _make, (base,)
        return (make, arguments, {name: value for name, value in state.items() if name != _STATE}, *rest)

    body: dict[str, Any] = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
    body |= {"forward": forward, "__reduce_ex__": __reduce_ex__, _BASE: base, UNDO: staticmethod(ungraphed)}
    if ORIGINAL in base.__dict__:
        body[ORIGINAL] = base.__dict__[ORIGINAL]  # the root itself is patched, and stays so
    graphed_class = type(base.__name__, (base,), body)
    return graphed_class


def _make(base: Any) -> Any:
    return base.__new__(base)


def _checkpointed(model: torch.nn.Module) -> str:
    """Name of a module that checkpoints activations, or ""."""
    for name, module in model.named_modules():
        if getattr(module, "gradient_checkpointing", False):
            return name or type(module).__name__
    return ""


class _Graphs:
    """The captured steps of one model."""

    def __init__(
        self,
        report: GraphReport,
        token_budget: int,
        max_seqlen: int,
        max_buckets: int,
        progress: Callable[[str], None] | None,
    ) -> None:
        self.report, self.progress = report, progress
        self.token_budget, self.max_seqlen, self.max_buckets = token_budget, max_seqlen, max_buckets
        self.recorder: capture.Recorder | None = None
        self.forget()

    def forget(self) -> None:
        self.steps: dict[tuple[Any, ...], dict[Bucket, CapturedStep]] = {}
        self.refused: dict[tuple[Any, ...], str] = {}
        self.shared: Shared | None = None
        self.addresses: tuple[Any, ...] = ()
        self.pending: weakref.ref[Pending] | None = None

    def call(self, model: torch.nn.Module, run: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        try:
            step, arrival = self._find(model, run, named_arguments(model, args, kwargs))
        except CannotCapture as reason:
            self.report.eager[str(reason)] += 1
            return run(*args, **kwargs)
        pending = Pending()
        if step.trains:
            self.pending = weakref.ref(pending)
        self.report.replays += 1
        return step(arrival, pending)

    def _find(
        self, model: torch.nn.Module, run: Callable[..., Any], call: dict[str, Any]
    ) -> tuple[CapturedStep, Arrival]:
        device = next(model.parameters()).device
        if self.recorder is None or self.recorder.device != device:
            self.recorder = capture.recorder_for(device)
            if self.recorder is None:
                raise CannotCapture(f"the model is on {device}")
        if torch.compiler.is_compiling():
            raise CannotCapture("inside torch.compile")
        pending = None if self.pending is None else self.pending()
        if pending is not None and not pending.done:
            raise CannotCapture("an earlier forward still waits for its backward")
        modes, addresses = _look(model)
        writes = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        arrival = read(call, self.token_budget, self.max_seqlen, writes)
        for name, (_, value) in arrival.tensors.items():
            if value.device != device:
                raise CannotCapture(f"{name} is on {value.device}, the model on {device}")
        if addresses != self.addresses:
            self.forget()
            self.addresses = addresses
        if self.shared is None:
            self.shared = Shared(self.recorder, [p for p in model.parameters() if p.requires_grad])
        trains = torch.is_grad_enabled() and bool(self.shared.parameters)
        key = (trains, modes, _autocast(device), arrival.signature)
        return self._step(model, run, key, arrival, trains), arrival

    def _step(
        self, model: torch.nn.Module, run: Callable[..., Any], key: tuple[Any, ...], arrival: Arrival, trains: bool
    ) -> CapturedStep:
        steps = self.steps.setdefault(key, {})
        step = steps.get(arrival.bucket)
        if step is not None:
            return step
        if key in self.refused:
            raise CannotCapture(self.refused[key])
        if sum(len(found) for (kind, *_), found in self.steps.items() if kind == trains) >= self.max_buckets:
            fitting = [bucket for bucket in steps if bucket.holds(arrival.bucket)]
            if not fitting:
                raise CannotCapture(f"all {self.max_buckets} buckets are taken by others")
            return steps[min(fitting)]
        use = "training" if trains else "evaluation"
        if self.progress is not None:
            self.progress(f"fastformer: capturing {arrival.bucket} ({use})")
        assert self.shared is not None
        began = time.perf_counter()
        pad = getattr(getattr(model, "config", None), "pad_token_id", None)
        try:
            step = CapturedStep(run, model, self.shared, arrival.bucket, arrival, pad or 0, trains)
        except CannotCapture as reason:
            self.refused[key] = str(reason)
            raise
        except capture.CaptureFailed as error:
            refused, cause = self.refused, error.__cause__
            self.forget()  # whatever the cause, the earlier captures are void
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from None
            why = str(cause) if isinstance(cause, CannotCapture) else f"capture failed: {error}"
            self.refused = {**refused, key: why}
            raise CannotCapture(why) from error
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.refused[key] = f"capture failed: {str(error).splitlines()[0]}"
            raise CannotCapture(self.refused[key]) from error
        # Rehearsing may have moved parameters to where they are wanted.
        self.addresses = _look(model)[1]
        steps[arrival.bucket] = step
        self.report.captured.append((arrival.bucket, use, time.perf_counter() - began))
        return step


def _look(model: torch.nn.Module) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """(modes, addresses): what a captured step assumes of the model beside the batch.

    Modes say which of several steps to take; other addresses make all of them useless.

    Raises:
        CannotCapture: a module inside has hooks, which a replay would not run, or checkpoints activations.
    """
    modes: list[Any] = []
    for module in model.modules():
        state = module.__dict__
        modes.append(state["training"])
        if "p" in state:  # of a Dropout
            modes.append(state["p"])
        if "_disable_adapters" in state:  # of a PEFT layer
            modes.append((state["_disable_adapters"], tuple(state.get("merged_adapters", ()))))
            modes.append(tuple(module.active_adapters))  # type: ignore[arg-type]
        if state.get("gradient_checkpointing") and state["training"]:
            raise CannotCapture("gradient checkpointing")
        if module is not model and has_hooks(module):
            raise CannotCapture(f"a hook on a {type(module).__name__} inside the model")
    places: list[Any] = []
    for parameter in model.parameters():
        if type(parameter) is not torch.nn.Parameter and type(parameter) is not Tensor:
            raise CannotCapture(f"parameters of type {type(parameter).__name__}")
        places.append((parameter.data_ptr(), parameter.requires_grad))
    places.extend(buffer.data_ptr() for buffer in model.buffers())
    return tuple(modes), tuple(places)


def _autocast(device: torch.device) -> Any:
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
