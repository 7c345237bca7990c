"""How many calls ran fused and how many fell back to stock arithmetic, and why.

A fallback is never silent: it is counted here, shown by the patch report, and a test that means the fused path asserts
the count.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch


@dataclass
class CallCount:
    """Calls since the last reset.

    Attributes:
        fused: calls by operation, e.g. {"MultiheadAttention": 12}.
        fallback: calls by (operation, reason).
        host_reads: times the host waited for the device to learn sequence lengths.
    """

    fused: Counter[str] = field(default_factory=Counter)
    fallback: Counter[tuple[str, str]] = field(default_factory=Counter)
    host_reads: int = 0

    def __str__(self) -> str:
        lines = [f"fused     {n:>8}  {name}" for name, n in sorted(self.fused.items())]
        lines += [f"fallback  {n:>8}  {name}: {why}" for (name, why), n in sorted(self.fallback.items())]
        lines.append(f"host reads {self.host_reads:>7}")
        return "\n".join(lines)


_current = CallCount()


def count() -> CallCount:
    """A copy of the counts since the last `reset_count()`. Calls inside torch.compile are not counted."""
    return CallCount(_current.fused.copy(), _current.fallback.copy(), _current.host_reads)


def reset_count() -> None:
    """Set every count to zero."""
    global _current
    _current = CallCount()


def count_fused(operation: str) -> None:
    if not torch.compiler.is_compiling():
        _current.fused[operation] += 1


def count_fallback(operation: str, reason: str) -> None:
    if not torch.compiler.is_compiling():
        _current.fallback[operation, reason] += 1


def count_host_read() -> None:
    _current.host_reads += 1
