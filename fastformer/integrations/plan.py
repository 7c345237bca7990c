"""How a patched model tells its attention modules which tokens belong together.

- The patched base model makes one `Plan` a batch and hands it down where layers expect the attention mask. Layers pass
  it through untouched, activation checkpointing included, so the recomputation sees the same plan.
- `PlanMask` is a plan dressed as a four-dimensional tensor, for models whose own forward prepares masks: transformers
  returns a mask that already has four dimensions as it is.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastformer.nn.counters import count_host_read
from fastformer.ops.packing import Packing


@dataclass(frozen=True, eq=False)
class Plan:
    """What layers receive in place of the attention mask.

    Attributes:
        packing: where the packed tokens come from, or None if the batch keeps its padding.
        mask: bool [batch, seqlen], True at real keys, for a batch that keeps its padding; None if it has none.
        keys: where packed keys come from, for cross-attention; None: from the same packing as the queries.
        causal: whether a query sees only itself and what is before it; None: as the attention module says.
        window: (left, right), how far from itself a query sees; None: as the attention module says.
        weights: attention modules append their weights here if it is a list (`output_attentions`).
    """

    packing: Packing | None = None
    mask: Tensor | None = None
    keys: Packing | None = None
    causal: bool | None = None
    window: tuple[int, int] | None = None
    weights: list[Tensor] | None = None

    def pad(self, hidden: Tensor) -> Tensor:
        """[1, rows, ...] back to [batch, seqlen, ...]; without a packing, `hidden` itself."""
        return hidden if self.packing is None else self.packing.pad(hidden.squeeze(0))

    @property
    def begins_all(self) -> bool:
        """Whether every row is known to begin with a real token."""
        return self.packing is not None and self.packing.begins_all

    def first(self, hidden: Tensor) -> Tensor:
        """[1, rows, ...] to [batch, 1, ...], the first token of every sequence; `begins_all` must hold."""
        assert self.packing is not None
        return self.packing.first(hidden.squeeze(0)).unsqueeze(1)

    def repack(self, hidden: Tensor) -> Tensor:
        """[batch, seqlen, ...] to [1, rows, ...]; without a packing, `hidden` itself."""
        return hidden if self.packing is None else self.packing.pack(hidden)[None]


class PlanMask(Tensor):
    """A four-dimensional tensor without meaning that carries a `Plan`."""

    plan: Plan

    @staticmethod
    def carrying(plan: Plan, device: torch.device) -> PlanMask:
        mask = torch.Tensor._make_subclass(PlanMask, torch.empty(1, 1, 1, 1, device=device))
        mask.plan = plan
        return mask

    # Activation checkpointing detaches what it hands to the recomputation, and moving a batch to its device calls to().
    def detach(self) -> PlanMask:
        return self

    def to(self, *args: Any, **kwargs: Any) -> PlanMask:
        return self


def plan_in(attention_mask: Any) -> Plan | None:
    """The plan that an attention mask is or carries."""
    if isinstance(attention_mask, Plan):
        return attention_mask
    return attention_mask.plan if isinstance(attention_mask, PlanMask) else None


def packing_from_mask(mask: Tensor) -> Packing | None:
    """As `packing_of`, but None if the mask hides nothing, or for a graph to export, which serves any mask."""
    if torch.compiler.is_exporting():
        return None
    packing = packing_of(mask)
    return packing if packing.has_padding else None


def packing_of(mask: Tensor) -> Packing:
    """Packing of a [batch, seqlen] mask.

    Waits for the device once a batch, and counts that: the packing is kept on the mask, until that is written to.
    """
    version, packing = getattr(mask, "fastformer_packing", (None, None))
    # Tensors made in inference mode count no versions; they are not remembered but where a batch came packed.
    if packing is None or version != (None if mask.is_inference() else mask._version):
        if mask.device.type != "cpu":
            count_host_read()
        packing = Packing.from_mask(mask)
        if not mask.is_inference():
            remember(mask, packing)
    return packing


def remember(mask: Tensor, packing: Packing) -> Tensor:
    """The mask, with its packing kept on it."""
    mask.fastformer_packing = (None if mask.is_inference() else mask._version, packing)  # type: ignore[attr-defined]
    return mask


def packing_from_lengths(cu_seqlens: Tensor, max_seqlen: int, rows: int) -> Packing:
    """Packing of a batch that came packed: `rows` tokens, sequence i from `cu_seqlens[i]` on. Waits for nothing.

    Args:
        cu_seqlens: [batch + 1] integers, from 0 to `rows`.
        max_seqlen: length of the longest sequence.
        rows: number of tokens.
    """
    cu_seqlens = cu_seqlens.to(torch.int32)
    lengths = cu_seqlens.diff().to(torch.int64)
    batch = lengths.shape[0]
    sequence = torch.repeat_interleave(torch.arange(batch, device=lengths.device), lengths, output_size=rows)
    place = torch.arange(rows, device=lengths.device) - cu_seqlens[sequence]
    # On a GPU nobody waits to learn whether a sequence is empty.
    begins_all = lengths.device.type == "cpu" and not torch.compiler.is_compiling() and bool((lengths > 0).all())
    return Packing(
        sequence * max_seqlen + place,
        cu_seqlens,
        max_seqlen,
        batch,
        max_seqlen,
        rows,
        rows,
        begins_all=begins_all,
    )


def packing_from_positions(position_ids: Tensor | None) -> Packing | None:
    """Packing told by positions that start again: [1, tokens], each one more than the last or as small as the first.

    Any other positions are somebody's own and give None. Waits for the device once.
    """
    if position_ids is None or position_ids.ndim != 2 or position_ids.shape[0] != 1 or position_ids.shape[1] < 2:
        return None
    if torch.compiler.is_exporting():
        return None  # an exported graph cannot tell a packed row from another
    if position_ids.device.type != "cpu":
        count_host_read()
    row = position_ids[0].cpu()
    starts = row[1:] == row[0]
    if not bool(starts.any()) or not bool((starts | (row.diff() == 1)).all()):
        return None
    bounds = [0, *(starts.nonzero().squeeze(1) + 1).tolist(), len(row)]
    longest = max(b - a for a, b in itertools.pairwise(bounds))
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32).to(position_ids.device)
    return packing_from_lengths(cu_seqlens, longest, len(row))
