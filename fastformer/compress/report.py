"""What an adaptive compression did: its evaluations, its result, a table and a figure."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Evaluation:
    """One evaluation and what followed from it.

    Attributes:
        step: optimizer steps so far.
        phase: "dense", "search", "target" or "done".
        rate: share of the prunable parameters that was gone.
        metric: of the gate's data.
        decision: "train", "converged", "accept", "recover", "reject" or "keep".
    """

    step: int
    phase: str
    rate: float
    metric: float
    decision: str


@dataclass
class CompressionReport:
    """Outcome of an `AdaptiveCompressor`.

    Attributes:
        history: every evaluation, in order.
        reference: the dense model's metric; tolerance: how far below it counts as held; standard_error: of the metric.
        metric: of the final model, on the gate's data.
        rate: share of the prunable parameters that is gone.
        parameters, encoder_parameters: (dense, now), of the whole model and of its Transformer layers.
        layers: for each site (kind, units kept, units before).
        skipped: (path, reason) for parts that were left alone.
        target: the target as text and whether it is met, or None.
        test: (dense, now) of a metric on data that decided nothing, or None.
        notes: what else to know.
    """

    history: list[Evaluation]
    reference: float | None
    tolerance: float | None
    standard_error: float | None
    metric: float | None
    rate: float
    parameters: tuple[int, int]
    encoder_parameters: tuple[int, int]
    layers: dict[str, tuple[str, int, int]]
    skipped: list[tuple[str, str]]
    greater_is_better: bool = True
    target: tuple[str, bool] | None = None
    test: tuple[float, float] | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def converged(self) -> bool:
        """Whether there was a dense reference to hold."""
        return self.reference is not None

    @property
    def within_tolerance(self) -> bool:
        """Whether the final metric, on the gate's data, is within the tolerance of the dense reference."""
        if self.reference is None or self.tolerance is None or self.metric is None:
            return False
        loss = self.reference - self.metric if self.greater_is_better else self.metric - self.reference
        return loss <= self.tolerance

    def __str__(self) -> str:
        if self.reference is None:
            lines = ["nothing was pruned: the dense model had not converged"]
        else:
            held = "held" if self.within_tolerance else "NOT HELD"
            lines = [
                f"{self.rate:.1%} of the prunable parameters gone",
                f"  encoder parameters  {_change(self.encoder_parameters)}",
                f"  all parameters      {_change(self.parameters)}",
                f"  metric (gate)       {self.reference:.4f} → {_number(self.metric)}, tolerance {self.tolerance:.4f} "
                f"({held}); standard error {self.standard_error:.4f}",
            ]
        if self.test is not None:
            lines.append(f"  metric (test)       {self.test[0]:.4f} → {self.test[1]:.4f}, on data that decided nothing")
        if self.target is not None:
            lines.append(f"  target              {self.target[0]}: {'met' if self.target[1] else 'NOT MET'}")
        lines += [f"  {name}: {kept} of {of} {kind}" for name, (kind, kept, of) in self.layers.items()]
        lines += [f"  left alone: {path}: {reason}" for path, reason in self.skipped]
        return "\n".join(lines + [f"  note: {note}" for note in self.notes])

    def table(self) -> str:
        """The evaluations as a table in Markdown."""
        lines = ["| step | phase | rate | metric | decision |", "|---|---|---|---|---|"]
        for e in self.history:
            lines.append(f"| {e.step} | {e.phase} | {e.rate:.1%} | {e.metric:.4f} | {e.decision} |")
        return "\n".join(lines)

    def plot(self, path: str | Path) -> None:
        """Draw rate and metric over the optimizer steps into an image file.

        Raises:
            ImportError: matplotlib is missing.
            ValueError: there was no evaluation.
        """
        if not self.history:
            raise ValueError("a plot needs at least one evaluation, got none")
        from matplotlib.figure import Figure

        steps = [e.step for e in self.history]
        figure = Figure(figsize=(8, 5), layout="constrained")
        metric, rate = figure.subplots(2, 1, sharex=True)
        metric.plot(steps, [e.metric for e in self.history], color="0.6", linewidth=1)
        styles = {"accept": ("C2", "^"), "reject": ("C3", "v"), "recover": ("C1", "o"), "converged": ("C0", "*")}
        for decision in dict.fromkeys(e.decision for e in self.history):
            color, marker = styles.get(decision, ("0.4", "."))
            x, y = zip(*((e.step, e.metric) for e in self.history if e.decision == decision), strict=True)
            metric.scatter(x, y, color=color, marker=marker, label=decision, zorder=3)
        if self.reference is not None and self.tolerance is not None:
            floor = self.reference - self.tolerance * (1 if self.greater_is_better else -1)
            metric.axhline(self.reference, color="C0", linewidth=1, label="dense reference")
            metric.axhline(floor, color="C3", linewidth=1, linestyle="--", label="tolerance")
        metric.set_ylabel("metric on the gate's data")
        metric.legend(fontsize="small", ncols=3)
        # A rate holds from the evaluation before the one it is judged by.
        rate.step(steps, [e.rate * 100 for e in self.history], where="pre", color="C0")
        rate.set_ylabel("pruned, % of layers' parameters")
        rate.set_xlabel("optimizer steps")
        rate.set_ylim(0, 100)
        figure.savefig(path, dpi=120)


def _change(pair: tuple[int, int]) -> str:
    return f"{pair[0]:,} → {pair[1]:,} (−{1 - pair[1] / pair[0]:.1%})"


def _number(value: float | None) -> str:
    return "not known" if value is None else f"{value:.4f}"
