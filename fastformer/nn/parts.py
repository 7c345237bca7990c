"""Which class of this package stands for which class of torch.nn, and how a module tells what its call runs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch

_Class = TypeVar("_Class", bound=type)

# Stock class to ours. Every one of ours derives from its stock class and adds no parameter or buffer.
STANDS_FOR: dict[type, type] = {}


def stands_for(stock: type) -> Callable[[_Class], _Class]:
    """Class decorator: this one replaces `stock`, and shows its constructor's signature."""

    def register(ours: _Class) -> _Class:
        if "__init__" in vars(ours):
            functools.update_wrapper(vars(ours)["__init__"], stock.__init__)  # type: ignore[misc]
        STANDS_FOR[stock] = ours
        return ours

    return register


def use_our_parts(module: torch.nn.Module) -> None:
    """Turn the stock modules at and below one that was just built into ours; parameters stay in place."""
    for part in module.modules():
        if type(part) in STANDS_FOR:
            part.__class__ = STANDS_FOR[type(part)]


def runs(module: torch.nn.Module, ours: type) -> bool:
    """Whether a call of `module` computes what `ours`, or the torch.nn class it stands for, computes."""
    return type(module).forward is ours.__mro__[1].forward or runs_ours(module, ours)  # type: ignore[attr-defined]


def runs_ours(module: torch.nn.Module, ours: type) -> bool:
    """Whether a call of `module` comes to the forward of `ours`.

    A subclass counts as long as it leaves forward alone (FSDP2 makes such classes); a class that
    `fastformer.integrations` gave a module names its behaviour on its forward.
    """
    forward: Any = type(module).forward
    return forward is ours.forward or getattr(forward, "fastformer_behaviour", None) is ours  # type: ignore[attr-defined]


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether somebody watches or changes this module's call, so that going around it would be noticed.

    A forward put on the instance counts (Accelerate does so).
    """
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )
