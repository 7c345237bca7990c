"""Checks of plain arguments."""

from __future__ import annotations

import math
from typing import Any

import torch


def check_share(name: str, value: Any) -> None:
    """Raises ValueError unless `value` is a number above 0, up to 1."""
    if not is_number(value) or not 0 < value <= 1:
        raise ValueError(f"{name} must lie between 0 and 1, got {value!r}")


def check_count(name: str, value: Any) -> None:
    """Raises ValueError unless `value` is a positive integer."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")


def check_model(model: Any) -> None:
    """Raises TypeError unless `model` is a torch.nn.Module."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
