"""Argument checks that every operator shares: one clear sentence naming the argument, what it got, what it needs."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_NUMBERS: Any = (numbers.Real, torch.SymInt, torch.SymFloat)
_WIDTHS = frozenset((*FLOATS, torch.float64))


def check_tensor(
    name: str,
    value: object,
    *,
    ndim: int | None = None,
    dtypes: tuple[torch.dtype, ...] | None = None,
    device: torch.device | None = None,
    shape: tuple[int | None, ...] | None = None,
) -> None:
    """Raise unless `value` is a tensor with these properties; None in `shape` stands for any size.

    Raises:
        TypeError: not a tensor, or a dtype that is not in `dtypes`.
        ValueError: another number of dimensions, shape or device.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if dtypes is not None and value.dtype not in dtypes:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name} must be one of {allowed}, got {str(value.dtype).removeprefix('torch.')}")
    if ndim is not None and value.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions, got shape {tuple(value.shape)}")
    # The comparison as a whole first: it decides most calls, at a tenth of the loop's cost.
    if (
        shape is not None
        and value.shape != shape
        and (value.ndim != len(shape) or any(w is not None and w != g for w, g in zip(shape, value.shape, strict=True)))
    ):
        wanted = ", ".join("any" if s is None else str(s) for s in shape)
        raise ValueError(f"{name} must have shape ({wanted}), got {tuple(value.shape)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name} must be on {device} like the other tensors, got {value.device}")


def matches(value: object, shape: torch.Size, device: torch.device) -> bool:
    """Whether `value` is a tensor of 16 to 64-bit floats of that shape on that device.

    True of nearly every call, and told at half of `check_tensor`'s cost, which says what is wrong when it is not.
    """
    return isinstance(value, Tensor) and value.dtype in _WIDTHS and value.shape == shape and value.device == device


def check_number(name: str, value: Any, least: float | None = None, most: float | None = None) -> None:
    """Raise unless `value` is a real number with least <= value <= most.

    Raises:
        TypeError: not a number.
        ValueError: outside these limits, or NaN.
    """
    if not isinstance(value, _NUMBERS):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if least is not None and most is not None and not least <= value <= most:
        raise ValueError(f"{name} must be between {least:g} and {most:g}, got {value}")
    if least is not None and not value >= least:
        raise ValueError(f"{name} must be at least {least:g}, got {value}")


def check_probability(name: str, p: float) -> None:
    """Raise unless 0 <= p <= 1, as `check_number` does."""
    # What every call goes through; asking for numbers.Real costs ten times as much.
    if not (isinstance(p, float | int) and 0.0 <= p <= 1.0):
        check_number(name, p, 0.0, 1.0)
