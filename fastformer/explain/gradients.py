"""What an answer comes from, by gradients: heads (Michel et al. 2019) and tokens (Sundararajan et al. 2017)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastformer.explain.running import Score, differentiable, embedded, evaluating, places_of, run, scores_of
from fastformer.nn.recording import AttentionCall


def head_importance(
    model: torch.nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    loss: Callable[[Any], Tensor] | None = None,
    normalize: bool = False,
) -> Tensor:
    """How much the loss of a sequence changes with a head, to first order: the mean over sequences of
    |sum of out * d loss / d out| over the head's output (Michel et al. 2019, "Are Sixteen Heads Really Better than
    One?", equation 2: the derivative by a factor on the head).

    Args:
        model: patched; runs in evaluation mode.
        batches: arguments of model(...) by name, with labels unless `loss` is given; padded or packed.
        loss: from the model's output to a scalar that is a mean over the batch; by default the output's own loss.
        normalize: divide by each layer's Euclidean norm, as the paper does.

    Returns:
        fp32 (layers, heads), on the CPU.

    Raises:
        TypeError, ValueError: an argument does not fit, no batches, or attention that did not run fused.
    """
    total, sequences = None, 0
    for batch in batches:
        with torch.enable_grad(), differentiable(model):
            out, calls = run(model, batch)
            value = loss(out) if loss is not None else getattr(out, "loss", None)
            if not isinstance(value, Tensor) or value.numel() != 1:
                raise ValueError("the model must return a scalar loss (are labels in the batch?), or give loss=")
            found = torch.autograd.grad(value.sum(), [call.out for call in calls], allow_unused=True)
        if len({call.query.shape[1] for call in calls}) > 1:
            raise ValueError("head_importance needs as many heads in every layer")
        count = calls[0].query.shape[0] if calls[0].cu_seqlens_q is None else calls[0].cu_seqlens_q.shape[0] - 1
        # The loss is a mean over the batch: a sequence's own is `count` times as large.
        part = torch.stack([_of_heads(c, g) for c, g in zip(calls, found, strict=True)]) * count
        total = part if total is None else total + part
        sequences += count
    if total is None:
        raise ValueError("batches must hold at least one batch, got none")
    mean = total / sequences
    if normalize:
        mean = mean / mean.norm(dim=1, keepdim=True).clamp_min(1e-30)
    return mean.cpu()


def _of_heads(call: AttentionCall, gradient: Tensor | None) -> Tensor:
    """(H,): the sum over sequences of |sum of out * gradient|."""
    heads = call.query.shape[1]
    if gradient is None:
        return torch.zeros(heads, device=call.out.device)
    product = (call.out.detach().float() * gradient.float()).sum(-1)  # (T, H) or (B, H, S)
    if call.cu_seqlens_q is None:
        return product.sum(-1).abs().sum(0)
    lengths = call.cu_seqlens_q.diff().long()
    tokens = int(call.cu_seqlens_q[-1])
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=product.device), lengths, output_size=tokens)
    sums = torch.zeros(len(lengths), heads, device=product.device)
    return sums.index_add_(0, sequence, product[:tokens]).abs().sum(0)


@dataclass(frozen=True)
class Attribution:
    """What each token of a sequence adds to a number that the model answers.

    Attributes:
        scores: fp32 (S,), one a real token.
        target: the class whose logit is explained; None where `score` said what.
        value, baseline_value: the number for the sequence, and for the baseline in place of its word embeddings.
    """

    scores: Tensor
    target: int | None
    value: float
    baseline_value: float

    @property
    def gap(self) -> float:
        """By how much the scores' sum misses value - baseline_value: 0 but for the integral's error (completeness)."""
        return float(self.scores.double().sum()) - (self.value - self.baseline_value)


def integrated_gradients(
    model: torch.nn.Module,
    batch: Mapping[str, Any],
    target: int | list[int] | Tensor | None = None,
    *,
    steps: int = 32,
    baseline: int | None = None,
    score: Score | None = None,
) -> list[Attribution]:
    """(x - x') times the mean of d f / d x on the straight line from the baseline x' to x, summed over each embedding.

    Sundararajan et al. 2017, "Axiomatic Attribution for Deep Networks", over word embeddings, with Gauss-Legendre
    quadrature; positions and segments stay what they are.

    Args:
        model: a Hugging Face model, patched or not; runs in evaluation mode, `steps` + 2 times.
        batch: arguments of model(...) by name, padded or packed.
        target: the class whose logit is explained, one for all or one a sequence; None: the one that the model answers.
        steps: points of the quadrature.
        baseline: id of the token whose embedding is the baseline everywhere, as the mask token's; None: zero.
        score: what to explain instead of a logit: a function from the model's output to (B,).

    Returns:
        One `Attribution` a sequence. Look at its `gap`; more steps make it smaller.

    Raises:
        TypeError, ValueError: an argument does not fit.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a positive int, got {steps!r}")
    if not isinstance(batch, Mapping):
        raise TypeError(f"batch must be a mapping of the model's arguments, got {type(batch).__name__}")
    line = _Line(model, batch, baseline)
    out = line.run(1.0)
    with torch.no_grad():
        values, targets = scores_of(out, target, score)
        last, _ = scores_of(line.run(0.0), targets or None, score)
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    total: Tensor | None = None
    for node, weight in zip(nodes.tolist(), weights.tolist(), strict=True):
        with torch.enable_grad():
            here, _ = scores_of(line.run((node + 1) / 2, leaf=True), targets or None, score)
            (gradient,) = torch.autograd.grad(here.sum(), [line.point])
        part = (gradient.float() * line.difference.float()).sum(-1) * (weight / 2)  # (B, S) or packed (1, T)
        total = part if total is None else total + part
    assert total is not None
    rows = line.split(total)
    if len(rows) != len(values):
        raise ValueError(f"score must return one number a sequence, {len(rows)}, got {len(values)}")
    return [
        Attribution(row.cpu(), targets[i] if targets else None, float(values[i]), float(last[i]))
        for i, row in enumerate(rows)
    ]


class _Line:
    """The straight line from the baseline to a batch's word embeddings, on which the model can be run.

    difference: x - x', as the embeddings are looked up: (B, S, E), or (1, rows, E) where they come packed; point: the
    leaf of the last run with one.
    """

    difference: Tensor
    point: Tensor

    def __init__(self, model: torch.nn.Module, batch: Mapping[str, Any], baseline: int | None) -> None:
        if not isinstance(model, torch.nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        self._model, self._places = model, places_of(batch)
        self._batch = {name: value for name, value in batch.items() if name != "labels"}
        self._base: Tensor | None = None
        if baseline is not None:
            table = model.get_input_embeddings().weight.detach()  # type: ignore[operator]
            if not 0 <= baseline < len(table):
                raise ValueError(f"baseline must be an id from 0 to {len(table) - 1}, got {baseline}")
            self._base = table[baseline]

    def run(self, share: float, leaf: bool = False) -> Any:
        """The model's output `share` of the way; with `leaf`, differentiable by `point`."""

        def move(found: Tensor) -> Tensor:
            end = found.detach()
            base = torch.zeros_like(end) if self._base is None else self._base.expand_as(end)
            self.difference = end - base
            moved = base + share * self.difference
            if leaf:
                self.point = moved = moved.requires_grad_()
            return moved

        with evaluating(self._model), embedded(self._model, move), torch.set_grad_enabled(leaf):
            return self._model(**self._batch)

    def split(self, values: Tensor) -> list[Tensor]:
        """Values as the embeddings are laid out, as real tokens of each sequence."""
        if self._places is None:
            return list(values)
        rows = self._places.rows
        if values.shape == (len(rows), self._places.width):
            return [value[row] for value, row in zip(values, rows, strict=True)]
        # The batch came packed, or the model takes padding out before it looks embeddings up.
        lengths = [len(row) for row in rows]
        return list(values[0, : sum(lengths)].split(lengths))
