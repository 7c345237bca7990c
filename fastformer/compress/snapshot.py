"""The last good state of a training: weights, optimizer state, random generators."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Snapshot:
    """Copies from which a training goes on as if nothing had happened since.

    Learning rates are not among them: they belong to the schedule, which does not run backwards.

    Attributes:
        tensors: trainable parameters and all buffers, by name.
        optimizer: state (moments, step counts) by parameter name.
        random: states of Python's, NumPy's, PyTorch's and the GPUs' generators.
    """

    tensors: dict[str, Tensor]
    optimizer: dict[str, dict[str, Any]]
    random: dict[str, Any]

    @classmethod
    @torch.no_grad()
    def take(cls, model: torch.nn.Module, optimizer: Any, device: str | torch.device | None = None) -> Snapshot:
        """Copy the state of a training.

        Args:
            optimizer: one of torch.optim's, or a wrapper with its `state`.
            device: where copies are kept; None: where their originals are.
        """

        def copy(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return value.detach().to(device, copy=True) if device is not None else value.detach().clone()

        tensors = {name: copy(tensor) for name, tensor in _tensors(model)}
        state = {
            name: {key: copy(value) for key, value in optimizer.state[p].items()}
            for name, p in model.named_parameters()
            if p in optimizer.state
        }
        return cls(tensors, state, _random_state())

    @torch.no_grad()
    def restore(self, model: torch.nn.Module, optimizer: Any) -> None:
        """Bring model, optimizer and random generators back; the snapshot stays good for another time."""
        for name, tensor in _tensors(model):
            tensor.copy_(self.tensors[name])
        for name, p in model.named_parameters():
            saved = self.optimizer.get(name)
            if saved is None:
                optimizer.state.pop(p, None)
                continue
            now = optimizer.state[p]
            for key, value in saved.items():
                if not isinstance(value, Tensor):
                    now[key] = value
                elif isinstance(now.get(key), Tensor) and now[key].shape == value.shape:
                    now[key].copy_(value)  # in place: a captured or fused optimizer keeps the address
                else:
                    now[key] = value.to(p.device, copy=True) if value.ndim else value.clone()
            for key in set(now) - set(saved):
                del now[key]
        _restore_random(self.random)


def _tensors(model: torch.nn.Module) -> list[tuple[str, Tensor]]:
    return [*((n, p) for n, p in model.named_parameters() if p.requires_grad), *model.named_buffers()]


def _random_state() -> dict[str, Any]:
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def _restore_random(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])
