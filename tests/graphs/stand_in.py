"""What captures and replays on a CPU, as strictly as CUDA graphs do, so that bookkeeping is tested without a GPU.

- A capture runs its work once and writes down every operator below autograd; a host read during it is an error.
- A replay runs the operators again on the very tensors of the capture and puts the results where they were, and nothing
  else: Python code is not run again.
- All graphs of a recorder share their memory, as in one pool: a replay first poisons everything that other graphs have
  made, and everything it will write itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

_READS = {"_local_scalar_dense", "nonzero", "item", "equal", "is_nonzero", "masked_select", "unique_dim", "_unique2"}


class HostRead(RuntimeError):
    """Work under capture looked at a value."""


class _NoReads(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") in ("tolist", "item", "numpy", "__bool__", "__int__", "__float__"):
            raise HostRead(f"Tensor.{function.__name__} during a capture")
        return function(*args, **(kwargs or {}))


class _Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.entries: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]] = []
        self.outside: dict[int, tuple[Tensor, Tensor]] = {}  # what work writes to beside its own results: (it, before)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function._schema.name.split("::")[1]
        if name in _READS:
            raise HostRead(f"{name} during a capture")
        own = {_address(t) for t in _results(self)}
        for argument, value in zip(function._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                for tensor in _tensors(value):
                    if _address(tensor) not in own and id(tensor) not in self.outside:
                        self.outside[id(tensor)] = (tensor, tensor.detach().clone())
        result = function(*args, **kwargs)
        aliased = any(r.alias_info is not None for r in function._schema.returns)
        writes = any(a.alias_info is not None and a.alias_info.is_write for a in function._schema.arguments)
        if aliased and not writes:
            return result  # a view: it lies where its base does
        self.entries.append((function, args, kwargs, [] if writes else _tensors(result)))
        return result


class StandIn:
    """A recorder for `fastformer.graphs`."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cpu")
        self.graphs: list[_Tape] = []

    def rehearse(self, work: Callable[[], Any]) -> Any:
        return work()

    def record(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        tape = _Tape()
        with _NoReads(), tape:
            result = work()
        # A backward graph reads what the forward graph of its step has left.
        read = {_address(t) for _, args, kwargs, _ in tape.entries for t in _tensors((args, kwargs))}
        sources = [other for other in self.graphs if read & {_address(t) for t in _results(other)}]
        self.graphs.append(tape)

        def replay() -> None:
            for graph in self.graphs:
                if graph not in sources:
                    _poison(graph)
            with torch.no_grad():
                for function, args, kwargs, fresh in tape.entries:
                    if "empty" in function._schema.name:
                        continue  # allocates only: what nobody writes stays poison
                    again = _tensors(function(*args, **kwargs))
                    for kept, new in zip(fresh, again, strict=bool(fresh)):
                        kept.data.copy_(new)

        # A capture on a GPU computes nothing.
        for tensor, before in tape.outside.values():
            tensor.data.copy_(before)
        return replay, result


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _results(tape: _Tape) -> Iterator[Tensor]:
    for _, _, _, fresh in tape.entries:
        yield from fresh


def _poison(tape: _Tape) -> None:
    for tensor in _results(tape):
        if tensor.is_floating_point():
            tensor.data.fill_(float("nan"))
        else:
            tensor.data.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max // 2)


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **options: Any,
) -> Tensor:
    """`ops.attention_varlen` of [T, H, D] written out, without the look at lengths that the CPU's own path takes."""
    # Sequences attend to themselves, where both alignments are one.
    unknown = {name for name, value in options.items() if value} - {"causal_alignment", "enable_gqa"}
    assert not unknown, unknown
    owner_q, real_q = _owner(cu_q, query.shape[0])
    owner_k, real_k = _owner(cu_k, key.shape[0])
    seen = (owner_q[:, None] == owner_k[None]) & real_q[:, None] & real_k[None]
    if is_causal:
        seen = seen & (torch.arange(len(owner_q))[:, None] >= torch.arange(len(owner_k))[None])
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores.masked_fill(~seen, -torch.inf)
    peak = scores.amax(-1, keepdim=True).clamp(min=-1e30)
    weights = torch.exp(scores - peak)
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-30)
    weights = torch.nn.functional.dropout(weights, dropout_p)
    return torch.einsum("hqk,khd->qhd", weights, value)


def _owner(boundaries: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    row = torch.arange(rows, dtype=torch.int32)
    owner = torch.searchsorted(boundaries[1:].contiguous(), row, right=True)
    return owner, row < boundaries[-1]
