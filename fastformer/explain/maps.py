"""Attention maps of a fused model, each computed when it is asked for.

A flash attention keeps no probabilities. Its queries and keys suffice to have them again, P = exp(scale Q K^T - LSE),
and with its values and the gradient of its output their gradient, dP = dO V^T. So what is kept is what a layer holds
anyway, O(S) a head, and what a call computes is the one map that it returns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastformer import ops
from fastformer.explain.running import Score, Sides, differentiable, run, scores_of, sides_of
from fastformer.nn.recording import AttentionCall

_APART = ("attn_mask", "dropout_p", "enable_gqa", "sinks")  # options that a single head without dropout does not have


class AttentionMaps:
    """The attention of a batch: `len(maps)` layers, `maps.sequences` sequences, `maps.heads(layer)` heads.

    Maps are of real tokens only, padding left out, whether the batch was packed, padded or had its padding removed
    inside the model. Layers are counted in the order in which they ran: an encoder-decoder's encoder, then the
    decoder's own attention and its cross-attention in turn.
    """

    def __init__(
        self, calls: list[AttentionCall], sides: list[Sides], gradients: list[Tensor | None] | None = None
    ) -> None:
        self._calls, self._sides, self._gradients = calls, sides, gradients

    def __len__(self) -> int:
        return len(self._calls)

    @property
    def sequences(self) -> int:
        call = self._calls[0]
        return call.query.shape[0] if call.cu_seqlens_q is None else call.cu_seqlens_q.shape[0] - 1

    def heads(self, layer: int) -> int:
        return self._calls[layer].query.shape[1]

    def weights(self, layer: int, sequence: int = 0, head: int | None = None) -> Tensor:
        """Attention probabilities, before dropout.

        Args:
            layer, sequence: which; negative ones count from the end.
            head: which; None: the mean over all heads, which takes the memory of one.

        Returns:
            fp32 (S_q, S_k), rows sum to 1 (to less with attention sinks).

        Raises:
            IndexError: there is no such layer, sequence or head.
        """
        part = self._part(layer, sequence)
        return _mean(part.weights, self._chosen(layer, head))

    def gradient_times_weights(self, layer: int, sequence: int = 0, head: int | None = None) -> Tensor:
        """P * d score / d P, what each attention probability adds to the score to first order; arguments as `weights`.

        Returns:
            fp32 (S_q, S_k).

        Raises:
            ValueError: the maps were made without `gradients=True`.
        """
        part = self._part(layer, sequence)
        if self._gradients is None:
            raise ValueError("gradient_times_weights needs attention_maps(..., gradients=True)")
        gradient = self._gradients[layer]
        return _mean(lambda h: part.weights(h) * part.gradient(h, gradient), self._chosen(layer, head))

    def rollout(self, sequence: int = 0, residual: float = 0.5) -> Tensor:
        """Attention through all layers: the product of (1 - residual) P + residual I, P the mean over heads.

        Abnar and Zuidema 2020, "Quantifying Attention Flow in Transformers", with residual = 1/2.

        Returns:
            fp32 (S, S); row i says from which tokens of the input place i of the last layer comes; rows sum to 1.

        Raises:
            ValueError: residual outside [0, 1], or cross-attention among the layers.
        """
        if not 0 <= residual <= 1:
            raise ValueError(f"residual must be from 0 to 1, got {residual}")
        joint: Tensor | None = None
        for layer in range(len(self)):
            weights = self.weights(layer, sequence)
            if weights.shape[0] != weights.shape[1] or (joint is not None and weights.shape != joint.shape):
                raise ValueError("rollout needs self-attention of one stack in every layer, got cross-attention")
            total = weights.sum(-1, keepdim=True)  # sinks take some of it, and a row that sees nothing has none
            weights = torch.where(total > 0, weights / total.clamp_min(1e-30), 0.0)
            one = (1 - residual) * weights + residual * torch.eye(len(weights), device=weights.device)
            one = one / one.sum(-1, keepdim=True).clamp_min(1e-30)
            joint = one if joint is None else one @ joint
        assert joint is not None
        return joint

    def _part(self, layer: int, sequence: int) -> _Part:
        if not -len(self) <= layer < len(self):
            raise IndexError(f"layer must be from {-len(self)} to {len(self) - 1}, got {layer}")
        if not -self.sequences <= sequence < self.sequences:
            raise IndexError(f"sequence must be from {-self.sequences} to {self.sequences - 1}, got {sequence}")
        return _Part(self._calls[layer], sequence % self.sequences, self._sides[layer])

    def _chosen(self, layer: int, head: int | None) -> list[int]:
        heads = self.heads(layer)
        if head is None:
            return list(range(heads))
        if not -heads <= head < heads:
            raise IndexError(f"head must be from {-heads} to {heads - 1}, got {head}")
        return [head % heads]


class _Part:
    """One sequence of an attention call, one head of which is computed at a time."""

    def __init__(self, call: AttentionCall, sequence: int, sides: Sides) -> None:
        self._call, self._sequence, self._sides = call, sequence, sides
        self._options = {k: v for k, v in call.options.items() if k not in _APART}
        self._groups = call.query.shape[1] // call.key.shape[1]
        self._mask = call.options.get("attn_mask")
        if self._mask is not None:
            self._mask = _mask_of(self._mask, call, sequence)

    def weights(self, head: int) -> Tensor:
        """(S_q, S_k) of a head."""
        query = self._of(self._call.query, head, self._call.cu_seqlens_q)
        key = self._of(self._call.key, head // self._groups, self._call.cu_seqlens_k)
        sinks = self._call.options.get("sinks")
        options = {**self._options, "attn_mask": None if self._mask is None else self._mask[head][None, None]}
        with torch.no_grad():
            _, lse = ops.scaled_dot_product_attention(
                query, key, key, sinks=None if sinks is None else sinks[head : head + 1], return_lse=True, **options
            )
            return self._real(ops.attention_weights(query, key, lse, average_heads=False, **options)[0, 0])

    def gradient(self, head: int, gradient: Tensor | None) -> Tensor:
        """(S_q, S_k) of a head: d score / d P, from the gradient of the call's output (None: it has no part in it)."""
        value = self._of(self._call.value, head // self._groups, self._call.cu_seqlens_k).float()
        out = self._of(self._call.out if gradient is None else gradient, head, self._call.cu_seqlens_q).float()
        product = (out @ value.transpose(-1, -2))[0, 0]
        return self._real(product if gradient is not None else torch.zeros_like(product))

    def _of(self, tensor: Tensor, head: int, cu_seqlens: Tensor | None) -> Tensor:
        """(1, 1, S, D) of the sequence and a head."""
        if cu_seqlens is None:
            return tensor.detach()[self._sequence, head][None, None]
        first, last = cu_seqlens[self._sequence : self._sequence + 2].tolist()
        return tensor.detach()[first:last, head][None, None]

    def _real(self, weights: Tensor) -> Tensor:
        for dim, places in enumerate(self._sides):
            if places is not None:
                weights = places.select(weights, self._sequence, dim)
        return weights


def _mask_of(mask: Tensor, call: AttentionCall, sequence: int) -> Tensor:
    """The mask (H, S_q, S_k) of a sequence; packed calls have theirs as for sequences padded at the end."""
    mask = mask[(None,) * (4 - mask.ndim)]
    mask = mask[sequence if mask.shape[0] > 1 else 0].expand(call.query.shape[1], -1, -1)
    lengths = call.query.shape[-2], call.key.shape[-2]
    if call.cu_seqlens_q is not None and call.cu_seqlens_k is not None:
        sides = (call.cu_seqlens_q, call.cu_seqlens_k)
        lengths = tuple(int(cu[sequence + 1] - cu[sequence]) for cu in sides)  # type: ignore[assignment]
    rows, columns = (size if size == 1 else length for size, length in zip(mask.shape[1:], lengths, strict=True))
    return mask[:, :rows, :columns].expand(-1, *lengths)


def _mean(compute: Callable[[int], Tensor], heads: list[int]) -> Tensor:
    total = compute(heads[0])
    for head in heads[1:]:
        total += compute(head)
    return total / len(heads)


def attention_maps(
    model: torch.nn.Module,
    batch: Mapping[str, Any],
    *,
    gradients: bool = False,
    target: int | list[int] | Tensor | None = None,
    score: Score | None = None,
) -> AttentionMaps:
    """Run a patched model on a batch and keep what its attention maps are computed from: queries, keys and values.

    Args:
        model: patched with `ff.patch`: Hugging Face or torch.nn. Runs in evaluation mode; its mode is put back.
        batch: arguments of model(...) by name, padded or as PackedCollator makes them.
        gradients: keep the gradients as well that `gradient_times_weights` needs.
        target: with gradients, the class whose logit is explained, one for all or one a sequence; None: the answer.
        score: with gradients, what to explain instead of a logit: a function from the model's output to (B,).

    Returns:
        AttentionMaps; nothing of size S_q * S_k is computed yet.

    Raises:
        TypeError, ValueError: an argument does not fit, or the model's attention did not run fused.
    """
    if not gradients:
        if target is not None or score is not None:
            raise ValueError("target and score need gradients=True")
        with torch.no_grad():
            _, calls = run(model, batch)
        return AttentionMaps(calls, sides_of(model, batch, len(calls)))
    with torch.enable_grad(), differentiable(model):
        out, calls = run(model, batch)
        values, _ = scores_of(out, target, score)
        found = torch.autograd.grad(values.sum(), [call.out for call in calls], allow_unused=True)
    return AttentionMaps(calls, sides_of(model, batch, len(calls)), list(found))
