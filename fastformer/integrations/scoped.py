"""A value that one call sets for everything that it calls."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Generic, TypeVar

import torch

_Value = TypeVar("_Value")


class Scoped(Generic[_Value]):
    """A ContextVar, so that threads do not see each other's; but torch.compile traces none.

    While a graph is being traced the value is a plain attribute instead: tracing runs in one thread, and what it sets
    it takes back before the graph ends.
    """

    def __init__(self, name: str, default: _Value) -> None:
        self._variable: ContextVar[_Value] = ContextVar(name, default=default)
        self._traced = default

    def get(self) -> _Value:
        return self._traced if torch.compiler.is_compiling() else self._variable.get()

    def during(self, value: _Value, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """function(*args, **kwargs), inside which `get` returns `value`."""
        if torch.compiler.is_compiling():
            before, self._traced = self._traced, value
            try:
                return function(*args, **kwargs)
            finally:
                self._traced = before
        token = self._variable.set(value)
        try:
            return function(*args, **kwargs)
        finally:
            self._variable.reset(token)
