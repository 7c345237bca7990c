"""Compression that follows validation quality: the rate rises while the metric holds and falls back when not."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastformer.compress.checking import check_count, check_share
from fastformer.compress.compacting import compact
from fastformer.compress.gate import Gate
from fastformer.compress.ladder import check_rungs, climb
from fastformer.compress.loops import from_first, is_capturing, torch_optimizer
from fastformer.compress.pruner import Pruner
from fastformer.compress.report import CompressionReport, Evaluation
from fastformer.compress.search import RateSearch
from fastformer.compress.sites import count_parameters, require_sites
from fastformer.compress.snapshot import Snapshot
from fastformer.compress.target import Aim, Target


@dataclass(frozen=True)
class _Good:
    """A state that held."""

    snapshot: Snapshot
    masks: list[Tensor]
    importance: list[Tensor]
    rate: float
    metric: float
    step: int


class AdaptiveCompressor:
    """Prunes heads and channels during fine-tuning, in any training loop, as far as a validation metric allows.

    >>> compressor = AdaptiveCompressor(model, optimizer, eval_size=len(validation))
    >>> for batch in loader:
    ...     model(**batch).loss.backward()
    ...     optimizer.step()                               # importance and masks ride on the optimizer's hooks
    ...     optimizer.zero_grad()
    ...     if time_to_evaluate:
    ...         compressor.update(accuracy(model))         # the rate rises, holds, or falls back
    ...         if compressor.done:
    ...             break
    >>> report = compressor.finish()                       # pruned units are gone: smaller, faster, stock names

    It waits until the dense model has converged: until `patience` evaluations in a row were no better than the best
    before by a standard error. The best state becomes the reference. Then the rate rises by `rise` at a time, the least
    important units first; each rate has `recovery` evaluations to come within the tolerance of the reference. One that
    does is kept; for one that does not, weights, optimizer state and random generators go back to what they were at the
    last rate that held, and the search bisects. The learning rate is the loop's own and runs on.

    Pruned units are zeros in ordinary weights, so checkpoints and state_dict are stock's at any time. With several
    processes, rank 0's metric and importance decide for all. A run cannot be resumed from a checkpoint in the middle,
    and the optimizer's step cannot be part of a CUDA graph. The last good state takes as much memory as the weights and
    the optimizer's moments.

    Args:
        model: a Hugging Face or torch.nn model, patched or not, on one device or replicated (DDP: pass model.module).
        optimizer: one of torch.optim's, or a wrapper that has it as `optimizer`.
        tolerance: loss of metric that counts as held; None: two standard errors. A smaller one is raised to that, with
            a warning, since it could not be told from chance.
        eval_size: number of validation examples, from which the standard error of a mean of values between 0 and 1
            (accuracy) follows: √(m(1 − m)/n).
        standard_error: of any other metric, in its unit. One of the two must be given.
        greater_is_better: False for a loss.
        reference: metric of the converged dense model, if it is known; pruning then begins with the first evaluation
            that comes within the tolerance of it.
        patience: evaluations without progress after which the dense model counts as converged.
        recovery: evaluations that a new rate gets.
        rise: how much the rate rises at a time; resolution: where bisection ends; max_rate: where the search stops.
            All in shares of the prunable parameters, met to within half a head.
        target: a hard target. The search stops there; if the metric forbids it, the model is brought to it all the
            same, at the end, and the report says that the tolerance is not held.
        test: called with the model on the dense and on the final one, for the report alone: a metric on data that
            decides nothing.
        snapshot_device: where the last good state is kept; None: with the model.
        keep_heads, keep_channels, multiple_of, uniform: as `Pruner`.

    Attributes:
        phase: "dense", "search", "target", "done", then "finished" or "failed".
        history: every evaluation.

    Raises:
        TypeError: model or optimizer is of another kind.
        ValueError: an argument out of range, a model without anything to prune, a target out of reach, or a tolerance
            below two given standard errors.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: Any,
        *,
        tolerance: float | None = None,
        eval_size: int | None = None,
        standard_error: float | None = None,
        greater_is_better: bool = True,
        reference: float | None = None,
        patience: int = 2,
        recovery: int = 3,
        rise: float = 0.1,
        resolution: float = 0.05,
        max_rate: float = 0.9,
        target: Target | None = None,
        test: Callable[[torch.nn.Module], float] | None = None,
        snapshot_device: str | torch.device | None = None,
        keep_heads: int = 1,
        keep_channels: int = 8,
        multiple_of: int = 8,
        uniform: bool = False,
    ) -> None:
        sites = require_sites(model)
        self.optimizer = torch_optimizer(optimizer)
        self.gate = Gate(tolerance, eval_size, standard_error, greater_is_better, reference)
        for name, value in (("patience", patience), ("recovery", recovery)):
            check_count(name, value)
        for name, share in (("rise", rise), ("resolution", resolution), ("max_rate", max_rate)):
            check_share(name, share)
        if target is not None and not isinstance(target, Target):
            raise TypeError(f"target must be a Target, got {type(target).__name__}")
        self.model, self.sites, self.test = model, sites, test
        self.pruner = Pruner(model, sites, keep_heads, keep_channels, multiple_of, uniform)
        self.patience, self.recovery = patience, recovery
        self.snapshot_device = snapshot_device
        self.search = RateSearch(rise, min(max_rate, self.pruner.highest_rate), resolution)
        self._highest = self.search.highest
        self.phase = "dense"
        self.history: list[Evaluation] = []
        self.notes: list[str] = []
        self._good: _Good | None = None
        self._mark: float | None = None
        self._stale = self._left = self._step = 0
        self._trial = 0.0
        self._bad_step: Tensor | None = None
        self._dense_test: float | None = None
        self._sizes = count_parameters(model, sites)
        self._aim = None if target is None else Aim(target, self.pruner)
        self._hooks = [
            self.optimizer.register_step_pre_hook(self._before_step),
            self.optimizer.register_step_post_hook(self._after_step),
        ]

    @property
    def rate(self) -> float:
        """Share of the prunable parameters that is gone now."""
        return self.pruner.rate

    @property
    def done(self) -> bool:
        """Whether the search has ended; more training does no harm, and `finish` takes the best state."""
        return self.phase not in ("dense", "search", "target")

    # The loop's calls

    def update(self, metric: float) -> Evaluation:
        """Take an evaluation of the model as it is, and decide.

        Args:
            metric: of the validation data, which must not be the test data.

        Returns:
            What was decided. The model may have other weights afterwards.

        Raises:
            FloatingPointError: the metric, or a gradient since the last evaluation, is not finite. The last good state
                is back in place.
            ValueError: called after `finish`, or before any training step.
        """
        if self.phase in ("finished", "failed"):
            raise ValueError(f"update needs a running compression, got one that has {self.phase}")
        metric = from_first(float(metric))
        bad = -1 if self._bad_step is None else int(self._bad_step)
        if bad >= 0:
            self._fail(f"gradients were not finite at optimizer step {bad}")
        if not math.isfinite(metric):
            self._fail(f"the metric is {metric} at optimizer step {self._step}")
        self.gate.error(metric)  # raises for a metric that has none
        phase, rate = self.phase, self.rate
        decide = {
            "dense": self._in_dense,
            "search": self._in_search,
            "target": self._in_target,
            "done": self._when_done,
        }
        self.history.append(Evaluation(self._step, phase, rate, metric, decide[phase](metric)))
        return self.history[-1]

    def finish(
        self,
        rungs: tuple[str, ...] = (),
        evaluate: Callable[[torch.nn.Module], float] | None = None,
    ) -> CompressionReport:
        """Take the best state that held, remove what is pruned, and try the further rungs.

        Args:
            rungs: of "low_rank" and "int8" (or "int8_dynamic"), in the order to try; each is kept if the metric stays
                within the tolerance. See `ladder`.
            evaluate: the metric of a model on the validation data; needed for rungs.

        Returns:
            The report. If the dense model never converged nothing is pruned; a warning and the report say so.

        Raises:
            ValueError: called twice, an unknown rung, or rungs without `evaluate`.
            ImportError: a rung needs torchao, which is missing.
        """
        if self.phase in ("finished", "failed"):
            raise ValueError(f"finish needs a running compression, got one that has {self.phase}")
        if rungs and evaluate is None:
            raise ValueError("rungs need evaluate, a function from a model to its metric, got None")
        check_rungs(rungs)
        for hook in self._hooks:
            hook.remove()
        if self.phase == "dense":
            warnings.warn(
                f"nothing was pruned: after {len(self.history)} evaluations the dense model had not converged; "
                "train longer, or give the metric of a converged model as reference",
                stacklevel=2,
            )
            self.phase = "finished"
            return self._report()
        known = self._good is not None
        if self.phase == "search" and self._aim is not None:
            self._go_back()
            if not self._aim.is_met():
                self._force(self._aim)
                self.notes.append(
                    "the target was forced at the end, without training after it; the metric is not known"
                )
                known = False
        elif known:
            self._go_back()
        self.phase = "finished"
        metric = self._good.metric if known and self._good is not None else None
        layers = {s.name: (s.kind, int(k.sum()), s.units) for s, k in zip(self.sites, self.pruner.kept, strict=True)}
        rate = self.rate
        compact(self.model, self.optimizer)
        if rungs:
            assert evaluate is not None
            notes, after = climb(self.model, rungs, evaluate, self.gate.holds)
            self.notes += notes
            metric = metric if after is None else after
        report = self._report(layers, rate, metric)
        if self._dense_test is not None:
            assert self.test is not None
            report.test = (self._dense_test, float(self.test(self.model)))
        return report

    # Phases

    def _in_dense(self, metric: float) -> str:
        if self._good is None or self.gate.gain(metric, self._good.metric) > 0:
            self._keep(metric)
        if self.gate.reference is not None:
            converged = self.gate.gain(metric, self.gate.reference) >= -self.gate.allowed()
        else:
            progress = self._mark is None or self.gate.gain(metric, self._mark) > self.gate.error(metric)
            self._mark = metric if progress else self._mark
            self._stale = 0 if progress else self._stale + 1
            converged = self._stale >= self.patience
        self.pruner.forget()
        if not converged:
            return "train"
        good = self._go_back()
        if self.gate.reference is None or self.gate.gain(good.metric, self.gate.reference) > 0:
            self.gate.reference = good.metric
        used = self.gate.allowed()
        if self.gate.tolerance is not None and self.gate.tolerance < used:
            self._note(
                f"a tolerance of {self.gate.tolerance:.4f} is below two standard errors of the metric: {used:.4f} "
                "takes its place"
            )
        if self.test is not None:
            self._dense_test = float(self.test(self.model))
        self.phase = "search"
        self._try_next()
        return "converged"

    def _in_search(self, metric: float) -> str:
        reference = self.gate.reference
        assert reference is not None
        if self.gate.holds(metric):
            self._keep(metric)
            self.search.accept(self._trial)
            if self.gate.gain(metric, reference) > self.gate.allowed():
                self._note(
                    f"the dense reference had not converged: at a rate of {self.rate:.1%} the metric is {metric:.4f}, "
                    f"better than {reference:.4f}, and takes its place"
                )
                self.gate.reference = metric
            self.pruner.forget()
            self._try_next()
            return "accept"
        self.pruner.forget()
        self._left -= 1
        if self._left > 0:
            return "recover"
        self._go_back()
        self.search.reject(self._trial)
        self._try_next()
        return "reject"

    def _in_target(self, metric: float) -> str:
        if self._good is None or self.gate.gain(metric, self._good.metric) > 0:
            self._keep(metric)
        self._left -= 1
        self.phase = "target" if self._left else "done"
        return "recover" if self._left else "keep"

    def _when_done(self, metric: float) -> str:
        assert self._good is not None
        if self.gate.gain(metric, self._good.metric) <= 0:
            return "train"
        self._keep(metric)
        return "keep"

    def _note(self, note: str) -> None:
        warnings.warn(note, stacklevel=4)
        self.notes.append(note)

    def _try_next(self) -> None:
        """Prune to the next rate, from the last good state, or end the search."""
        assert self._good is not None
        met = self._aim is not None and self._aim.is_met()
        if self._aim is not None and not met:
            self.search.highest = min(self._highest, self._aim.rate(self._good.importance))
        rate = None if met else self.search.next()
        if rate is not None:
            self._trial, self._left = rate, self.recovery
            self.pruner.apply(self.pruner.choose(rate, self._good.importance), self.optimizer)
        elif self._aim is not None and not met:
            self._note(f"the metric did not allow the target ({self._aim}); the model is brought to it all the same")
            self._force(self._aim)
            self._good, self.phase, self._left = None, "target", self.recovery
        else:
            self._go_back()
            self.phase = "done"

    def _force(self, aim: Aim) -> None:
        """Prune to the target, from the last good state."""
        importance = self._go_back().importance
        self.pruner.apply(self.pruner.choose(aim.rate(importance), importance), self.optimizer)

    # States

    def _keep(self, metric: float) -> None:
        try:
            importance = from_first(self.pruner.importance())
        except ValueError:
            if self._good is None:
                raise
            importance = self._good.importance
        snapshot = Snapshot.take(self.model, self.optimizer, self.snapshot_device)
        masks = [mask.clone() for mask in self.pruner.kept]
        self._good = _Good(snapshot, masks, importance, self.rate, metric, self._step)

    def _go_back(self) -> _Good:
        """The last good state, exactly."""
        assert self._good is not None
        self._good.snapshot.restore(self.model, self.optimizer)
        self.pruner.apply(self._good.masks, self.optimizer)
        return self._good

    def _fail(self, what: str) -> None:
        """Stop: the last good state comes back, and FloatingPointError says what happened and where."""
        for hook in self._hooks:
            hook.remove()
        where = f"{what}, in phase {self.phase} at a rate of {self.rate:.1%}"
        state = "there is no good state to go back to yet"
        if self._good is not None:
            self._go_back()
            state = (
                f"weights and optimizer are back at step {self._good.step} "
                f"(rate {self._good.rate:.1%}, metric {self._good.metric:.4f})"
            )
        self.phase = "failed"
        raise FloatingPointError(f"{where}; {state}")

    # Hooks of the optimizer

    def _before_step(self, optimizer: Any, *_: Any) -> None:
        if is_capturing():
            raise RuntimeError(
                "adaptive compression cannot run inside a CUDA graph: leave the optimizer's step out of it"
            )
        self._step += 1
        finite = self.pruner.observe()
        if finite is None or getattr(optimizer, "found_inf", None) is not None:
            return  # a gradient scaler deals with overflow itself
        if finite.device.type == "cpu":
            if not bool(finite):
                self._fail(f"gradients are not finite at optimizer step {self._step}, which was not taken")
            return
        # On a GPU nothing waits: update() asks.
        if self._bad_step is None:
            self._bad_step = torch.full((), -1, device=finite.device)
        self._bad_step = torch.where(~finite & (self._bad_step < 0), self._step, self._bad_step)

    def _after_step(self, *_: Any) -> None:
        self.pruner.hold()

    def _report(
        self,
        layers: dict[str, tuple[str, int, int]] | None = None,
        rate: float = 0.0,
        metric: float | None = None,
    ) -> CompressionReport:
        reference = None if layers is None else self.gate.reference
        target = None if self._aim is None else (str(self._aim), self._aim.holds(self.model))
        parameters, encoder_parameters = zip(self._sizes, count_parameters(self.model, self.sites), strict=True)
        return CompressionReport(
            history=self.history,
            reference=reference,
            tolerance=None if reference is None else self.gate.allowed(),
            standard_error=None if reference is None else self.gate.error(reference),
            metric=metric,
            rate=rate,
            parameters=parameters,
            encoder_parameters=encoder_parameters,
            layers=layers or {},
            skipped=self.sites.skipped,
            greater_is_better=self.gate.greater_is_better,
            target=target,
            notes=self.notes,
        )
