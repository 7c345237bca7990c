"""The search for the highest rate that holds the metric: up in steps, then bisection."""

from __future__ import annotations

from dataclasses import dataclass

_ROUNDING = 1e-9


@dataclass
class RateSearch:
    """What was tried, and what comes next.

    Attributes:
        step: how far the rate rises while nothing has failed.
        highest: the rate to stop at.
        resolution: the search ends when a good and a bad rate are this close.
        good: highest rate that held; bad: lowest that did not, None so far.
    """

    step: float
    highest: float
    resolution: float
    good: float = 0.0
    bad: float | None = None

    def next(self) -> float | None:
        """The rate to try next, None at the end."""
        if self.bad is None:
            return None if self.good >= self.highest - _ROUNDING else min(self.good + self.step, self.highest)
        return None if self.bad - self.good <= self.resolution + _ROUNDING else (self.good + self.bad) / 2

    def accept(self, rate: float) -> None:
        self.good = rate

    def reject(self, rate: float) -> None:
        self.bad = rate
