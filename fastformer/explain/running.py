"""Running a model to explain it: in evaluation mode, with a number a sequence to explain, and its real tokens known."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastformer.nn.counters import count
from fastformer.nn.recording import AttentionCall, recording

Score = Callable[[Any], Tensor]


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Every module in evaluation mode, and afterwards as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def run(model: torch.nn.Module, batch: Mapping[str, Any]) -> tuple[Any, list[AttentionCall]]:
    """What the model returns for a batch, and its attention calls in the order of the layers.

    Raises:
        TypeError: `model` is no module, or `batch` no mapping.
        ValueError: attention that did not run fused, so that there is nothing to look at.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(batch, Mapping):
        raise TypeError(f"batch must be a mapping of the model's arguments, got {type(batch).__name__}")
    if batch.get("output_attentions"):
        raise ValueError(
            "batch must not ask for output_attentions, which takes the stock path; maps need the fused one"
        )
    before = count().fallback
    with evaluating(model), recording() as calls:
        out = model(**batch)
    layers = getattr(_config(model), "num_hidden_layers", 1)
    if len(calls) < layers:
        reasons = [f"{name}: {why}" for (name, why), n in count().fallback.items() if n > before[name, why]]
        raise ValueError(
            f"model must be patched and run fused attention in each of {layers} layers, got {len(calls)} such calls "
            f"({'; '.join(reasons) or 'is it patched?'})"
        )
    return out, calls


def scores_of(out: Any, target: int | list[int] | Tensor | None, score: Score | None) -> tuple[Tensor, list[int]]:
    """One number a sequence, (B,), to explain, and the classes they are of ([] where `score` says what they are).

    target: a class for all sequences or one each; None: the class that the model answers.
    score: what to explain instead, from the model's output to (B,).

    Raises:
        ValueError: outputs that are no logits (B, classes) and no `score`; a target or score of another shape.
    """
    if score is not None:
        values = score(out)
        if not isinstance(values, Tensor) or values.ndim != 1:
            raise ValueError("score must return a tensor of one number a sequence, (B,)")
        return values, []
    logits = out if isinstance(out, Tensor) else getattr(out, "logits", None)
    if logits is None or logits.ndim != 2:
        shape = None if logits is None else tuple(logits.shape)
        raise ValueError(f"score must say what to explain where the model gives no logits (B, classes), got {shape}")
    batch, classes = logits.shape
    chosen = logits.detach().argmax(-1) if target is None else torch.as_tensor(target, device=logits.device)
    if chosen.is_floating_point() or chosen.ndim > 1 or (chosen.ndim == 1 and len(chosen) != batch):
        raise ValueError(f"target must be a class or {batch} of them, got {target!r}")
    chosen = chosen.expand(batch)
    if int(chosen.min()) < 0 or int(chosen.max()) >= classes:
        raise ValueError(f"target must be from 0 to {classes - 1}, got {target!r}")
    return logits.gather(1, chosen[:, None]).squeeze(1), chosen.tolist()


@dataclass(frozen=True)
class Places:
    """Real places of a padded batch. rows: int64 (S,) each, the places; width: of the padded batch."""

    rows: list[Tensor]
    width: int

    def select(self, values: Tensor, sequence: int, dim: int) -> Tensor:
        """The real places of a sequence along a dimension, unless its padding is gone already."""
        return values.index_select(dim, self.rows[sequence]) if values.shape[dim] == self.width else values


def places_of(batch: Mapping[str, Any], name: str = "attention_mask") -> Places | None:
    """The real places of a padded batch, or of a packed one where the model pads it; None where nothing says which
    they are."""
    bounds = batch.get("cu_seq_lens_q")
    if isinstance(bounds, Tensor):
        return Places([torch.arange(n, device=bounds.device) for n in bounds.diff().tolist()], batch["max_length_q"])
    mask = batch.get(name)
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return None
    return Places([row.nonzero().squeeze(1) for row in mask != 0], mask.shape[1])


Sides = tuple[Places | None, Places | None]  # of the queries and of the keys


def sides_of(model: torch.nn.Module, batch: Mapping[str, Any], calls: int) -> list[Sides]:
    """For each attention call the real places of its queries and of its keys."""
    source, config = places_of(batch), _config(model)
    if not getattr(config, "is_encoder_decoder", False):
        return [(source, source)] * calls
    target = places_of(batch, "decoder_attention_mask")
    encoder: list[Sides] = [(source, source)] * config.num_hidden_layers
    # Every layer of a decoder looks at itself and then across.
    decoder: list[Sides] = [(target, target), (target, source)] * ((calls - len(encoder)) // 2)
    return [*encoder, *decoder]


@contextlib.contextmanager
def embedded(model: torch.nn.Module, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Word embeddings go through `change` the first time that they are looked up (an encoder's, of an encoder-decoder).

    Raises:
        ValueError: the model does not say where its embeddings are (get_input_embeddings).
    """
    find = getattr(model, "get_input_embeddings", None)
    table = None if find is None else find()
    if table is None:
        raise ValueError(f"model must have get_input_embeddings(), as Hugging Face's do, got {type(model).__name__}")
    seen = False

    def hook(module: torch.nn.Module, args: Any, out: Tensor) -> Tensor:
        nonlocal seen
        if seen:
            return out
        seen = True
        return change(out)

    handle = table.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def differentiable(model: torch.nn.Module) -> contextlib.AbstractContextManager[None]:
    """Gradients reach attention even where every parameter is frozen."""
    if any(p.requires_grad for p in model.parameters()) or not hasattr(model, "get_input_embeddings"):
        return contextlib.nullcontext()
    return embedded(model, lambda out: out.detach().requires_grad_())


def _config(model: torch.nn.Module) -> Any:
    return getattr(model, "config", None)
