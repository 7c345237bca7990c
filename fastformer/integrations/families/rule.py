"""One line of a family's table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


def _always(module: torch.nn.Module) -> str:
    return ""


@dataclass(frozen=True)
class Rule:
    """What replaces a class.

    Attributes:
        behaviour: class with the new forward; it calls super().forward for the stock arithmetic.
        what: a few words for the report.
        why_not: reason why this instance cannot be replaced, or "".
        removes_padding: whether the behaviour reads `fastformer_unpad`.
    """

    behaviour: type
    what: str
    why_not: Callable[[torch.nn.Module], str] = _always
    removes_padding: bool = False
