"""One line of a family's table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastformer.integrations.families.interface import uses_interface
from fastformer.integrations.swap import class_path


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
        needs: class paths of attention modules, of which there must be some below this one: a base model may hand down
            packed rows only if its attention modules are known.
        routed: whether it needs attention modules that go through transformers' interface.
        owns_norms: whether the norms below it are dealt with by the behaviours of its parts.
    """

    behaviour: type
    what: str
    why_not: Callable[[torch.nn.Module], str] = _always
    removes_padding: bool = False
    needs: tuple[str, ...] = ()
    routed: bool = False
    owns_norms: bool = False

    def reason_against(self, module: torch.nn.Module) -> str:
        """Why this instance cannot be replaced, or ""."""
        if self.needs and not any(class_path(child) in self.needs for child in module.modules()):
            return "its attention modules are none of " + ", ".join(path.rsplit(".", 1)[1] for path in self.needs)
        if self.routed and not any(uses_interface(child) for child in module.modules()):
            return "its attention does not go through transformers' interface"
        return self.why_not(module)
