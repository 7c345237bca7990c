"""What counts as held: a metric, its standard error, the dense reference and the tolerance."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastformer.compress.checking import check_count, is_number

ERRORS = 2.0  # a loss of fewer standard errors than this cannot be told from chance


@dataclass
class Gate:
    """Compares metrics with a reference.

    Attributes:
        tolerance: loss that counts as held; None: two standard errors.
        eval_size: number of examples whose values between 0 and 1 the metric is the mean of.
        standard_error: of any other metric. Exactly one of the two is given.
        greater_is_better: False for a loss.
        reference: the dense model's metric, None as long as it is not known.

    Raises:
        ValueError: an attribute is out of range, or the tolerance is below two given standard errors.
    """

    tolerance: float | None = None
    eval_size: int | None = None
    standard_error: float | None = None
    greater_is_better: bool = True
    reference: float | None = None

    def __post_init__(self) -> None:
        if (self.eval_size is None) == (self.standard_error is None):
            raise ValueError("give exactly one of eval_size and standard_error: the tolerance is measured against them")
        if self.eval_size is not None:
            check_count("eval_size", self.eval_size)
        for name in ("tolerance", "standard_error"):
            amount = getattr(self, name)
            if amount is not None and not (is_number(amount) and amount >= 0):
                raise ValueError(f"{name} must be a finite number of 0 or more, got {amount!r}")
        if self.reference is not None and not is_number(self.reference):
            raise ValueError(f"reference must be a finite number, got {self.reference!r}")
        least = ERRORS * (self.standard_error or 0.0)
        if self.tolerance is not None and self.tolerance < least:
            raise ValueError(
                f"tolerance must be at least two standard errors ({least:g}), got {self.tolerance:g}: "
                "a smaller loss cannot be told from chance"
            )

    def error(self, metric: float) -> float:
        """Standard error of a metric: the one given, or √(m(1 − m)/n).

        Raises:
            ValueError: eval_size was given for a metric that is no mean of values between 0 and 1.
        """
        if self.standard_error is not None:
            return self.standard_error
        assert self.eval_size is not None
        if not 0 <= metric <= 1:
            raise ValueError(
                f"eval_size tells the standard error of a mean of values between 0 and 1, got a metric of {metric}; "
                "give standard_error instead"
            )
        return math.sqrt(metric * (1 - metric) / self.eval_size)

    def allowed(self, reference: float | None = None) -> float:
        """Loss of metric that counts as held: the tolerance, but two standard errors of the reference at least."""
        reference = self.reference if reference is None else reference
        assert reference is not None
        return max(self.tolerance or 0.0, ERRORS * self.error(reference))

    def gain(self, metric: float, over: float) -> float:
        """How much better `metric` is, positive if it is."""
        return metric - over if self.greater_is_better else over - metric

    def holds(self, metric: float) -> bool:
        """Whether a metric is within the tolerance of the reference."""
        assert self.reference is not None
        return self.gain(metric, self.reference) >= -self.allowed()
