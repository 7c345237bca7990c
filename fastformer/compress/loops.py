"""What training loops wrap around models and optimizers."""

from __future__ import annotations

from typing import Any

import torch


def torch_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer of torch.optim that was given, or that a wrapper (Accelerate's, Lightning's) has inside.

    Raises:
        TypeError: there is none.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(inner, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be one of torch.optim's or wrap one, got {type(optimizer).__name__}")
    return inner


def from_first(value: Any) -> Any:
    """Rank 0's value on every process."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def is_capturing() -> bool:
    """Whether a CUDA graph is being recorded."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
