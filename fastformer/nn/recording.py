"""Looking on while a model attends: `recording()` collects the arguments of every fused attention call inside it.

Nothing is computed and nothing copied; the calls hold the tensors that were there anyway.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One call of an attention operator.

    Attributes:
        query, key, value, out: (B, H, S, D) each, or packed (T, H, D); key and value may have fewer heads.
        options: keyword arguments of the operator, attn_mask among them.
        cu_seqlens_q, cu_seqlens_k: int32 (B + 1,) where the tensors are packed, else None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    options: dict[str, Any]
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None


_CALLS: ContextVar[list[AttentionCall] | None] = ContextVar("fastformer_attention_calls", default=None)


@contextlib.contextmanager
def recording() -> Iterator[list[AttentionCall]]:
    """The list that attention calls of this thread are added to, in the order in which they run."""
    calls: list[AttentionCall] = []
    token = _CALLS.set(calls)
    try:
        yield calls
    finally:
        _CALLS.reset(token)


def is_recording() -> bool:
    """Whether somebody looks on in this thread."""
    return _CALLS.get() is not None


def record(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    options: dict[str, Any],
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> Tensor:
    """`out`, after the call was added to the list of the `recording` that runs, if one does."""
    if not torch.compiler.is_compiling() and (calls := _CALLS.get()) is not None:
        calls.append(AttentionCall(query, key, value, out, options, cu_seqlens_q, cu_seqlens_k))
    return out
