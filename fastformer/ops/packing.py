"""Removing padding from a batch and putting it back.

- A padded batch is [batch, seqlen, ...] with a mask; a packed one is [tokens, ...], the real tokens of all sequences
  one after another, with `cu_seqlens` (cumulated lengths) saying where each begins.
- `Packing` is computed once per batch from the mask and used by every layer. On a GPU that costs one host read (the
  lengths): shapes of packed tensors live on the host. It is the only one.
- Packing and padding are each other's gradient: both are copies by unique indices, so no atomic additions.
- Where kernels run, `fastformer.kernels.packing` does it in a launch each.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from fastformer.ops.backend import backend_for
from fastformer.ops.operator import is_plain, kernels, light, on_its_device
from fastformer.ops.validate import FLOATS

# On a GPU, matrix products want a token count that is a multiple of a tile; the surplus rows belong to no sequence.
GPU_TOKEN_MULTIPLE = 64


@dataclass(frozen=True, eq=False)
class Packing:
    """Where the tokens of a packed batch come from.

    Attributes:
        indices: int64 [tokens], place of each packed token in the flattened [batch * seqlen] batch.
        cu_seqlens: int32 [batch + 1], first packed token of each sequence, then the number of tokens.
        max_seqlen: the longest sequence, in tokens.
        batch, seqlen: shape of the padded batch.
        tokens: number of real tokens, `cu_seqlens[-1]` as a host number.
        rows: rows of a packed tensor, `tokens` rounded up; rows from `tokens` on belong to no sequence.
        starts_real: whether the first place of every padded row that has real tokens is one of them.
        contiguous: whether the real tokens of every padded row stand side by side.
        begins_all: whether every row begins with a real token, as far as that is known on the host.
        inverse: int64 [batch * seqlen], packed token of each place or -1; None where nobody has made it.
        place: what `positions` gives; None where nobody has made it.
    """

    indices: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    batch: int
    seqlen: int
    tokens: int
    rows: int
    starts_real: bool = True
    contiguous: bool = True
    inverse: Tensor | None = None
    place: Tensor | None = None
    begins_all: bool = False

    @staticmethod
    def from_mask(mask: Tensor) -> Packing:
        """Packing of a batch whose real tokens are where `mask` is not zero.

        The mask may have its padding left, right or in between.

        Args:
            mask: [batch, seqlen], bool or number.

        Raises:
            ValueError: mask does not have two dimensions.
        """
        return Packing.from_masks(mask)[0]

    @staticmethod
    def from_masks(*masks: Tensor) -> list[Packing]:
        """Packings of several batches on one device (source and target of a translation), for one host read in all.

        Args:
            masks: [batch, seqlen] each, bool or number.

        Raises:
            ValueError: a mask does not have two dimensions.
        """
        for mask in masks:
            if mask.ndim != 2:
                raise ValueError(f"mask must have shape (batch, seqlen), got {tuple(mask.shape)}")
        fused = all(map(_is_for_kernels, masks))
        if not fused and all(mask.device.type == "cpu" for mask in masks):
            return [_from_facts(mask, _facts_here(mask != 0), None) for mask in masks]
        facts = [_fused_facts(mask) if fused else _facts(mask != 0) for mask in masks]
        # The one wait for the device: lengths decide the shapes of everything that follows.
        read = (facts[0] if len(facts) == 1 else torch.cat(facts)).tolist()
        packings = []
        for mask, found in zip(masks, facts, strict=True):
            packings.append(_from_facts(mask, read[: mask.shape[0]], found if fused else None))
            del read[: mask.shape[0]]
        return packings

    @staticmethod
    def whole(batch: int, seqlen: int, device: torch.device) -> Packing:
        """Packing of a batch that has no padding: packing and padding are views."""
        tokens = batch * seqlen
        cu_seqlens = torch.arange(0, tokens + 1, max(1, seqlen), dtype=torch.int32, device=device)
        if seqlen == 0:
            cu_seqlens = cu_seqlens.new_zeros(batch + 1)
        indices = torch.arange(tokens, device=device)
        return Packing(indices, cu_seqlens, seqlen, batch, seqlen, tokens, tokens)

    @staticmethod
    def from_lengths(lengths: list[int], device: torch.device) -> Packing:
        """Packing of a batch of known lengths, padded on the right to the longest; nothing is read."""
        seqlen = max(lengths, default=0)
        ends = torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)
        places = [torch.arange(i * seqlen, i * seqlen + n) for i, n in enumerate(lengths)]
        indices = torch.cat(places) if places else torch.zeros(0, dtype=torch.int64)
        tokens = sum(lengths)
        return Packing(indices.to(device), ends.to(device, torch.int32), seqlen, len(lengths), seqlen, tokens, tokens)

    @property
    def has_padding(self) -> bool:
        """Whether the padded batch holds more than real tokens."""
        return self.tokens < self.batch * self.seqlen

    @property
    def is_whole(self) -> bool:
        """Whether neither the batch nor a packed tensor holds more than real tokens: both are then the same rows.

        torch.compile is told no: one graph is to serve all batches.
        """
        if torch.compiler.is_compiling():
            return False
        return self.rows == self.batch * self.seqlen and not self.has_padding

    def positions(self) -> Tensor:
        """Place of each packed token in its own sequence of the padded batch: int64 [1, rows]."""
        if self.place is not None:
            return self.place
        places = torch.zeros(1, self.rows, dtype=torch.int64, device=self.indices.device)
        places[0, : self.tokens] = self.indices % self.seqlen
        return places

    def places(self) -> Tensor:
        """Where the padded batch holds tokens: bool [batch, seqlen]."""
        real = torch.zeros(self.batch * self.seqlen, dtype=torch.bool, device=self.indices.device)
        return real.index_fill_(0, self.indices, True).view(self.batch, self.seqlen)

    def pack(self, padded: Tensor) -> Tensor:
        """[batch, seqlen, ...] to [rows, ...]; surplus rows are zero."""
        if padded.shape[:2] != (self.batch, self.seqlen):
            raise ValueError(f"padded must have shape ({self.batch}, {self.seqlen}, ...), got {tuple(padded.shape)}")
        flat = padded.flatten(0, 1)
        return flat if self.is_whole else _pack(flat, self.indices, self.inverse, self.rows)

    def pad(self, packed: Tensor) -> Tensor:
        """[rows, ...] to [batch, seqlen, ...]; places without a token are zero."""
        if packed.shape[0] != self.rows:
            raise ValueError(f"packed must have {self.rows} rows, got shape {tuple(packed.shape)}")
        size = self.batch * self.seqlen
        flat = packed if self.is_whole else _pad(packed, self.indices, self.inverse, size)
        return flat.unflatten(0, (self.batch, self.seqlen))

    def first(self, packed: Tensor) -> Tensor:
        """[rows, ...] to [batch, ...], the first token of every sequence; `begins_all` must hold."""
        return _pack(packed, self.cu_seqlens[:-1].long(), None, self.batch)


def _facts(real: Tensor) -> Tensor:
    """int64 [batch, 3] of bool [batch, seqlen]: real tokens, whether the first place is one, how often a run begins
    after it."""
    rises = real[:, 1:] & ~real[:, :-1]
    return torch.stack((real.sum(dim=1), real[:, :1].sum(dim=1), rises.sum(dim=1)), dim=1)


def _facts_here(real: Tensor) -> list[list[int]]:
    """What `_facts` says, on the host: padding is mostly on the right, where lengths tell all."""
    lengths = real.sum(dim=1)
    if torch.equal(real, torch.arange(real.shape[1]) < lengths[:, None]):
        return [[length, int(length > 0), 0] for length in lengths.tolist()]
    return _facts(real).tolist()


def _is_for_kernels(mask: Tensor) -> bool:
    if torch.compiler.is_compiling() or not is_plain((mask,)) or not mask.numel():
        return False
    return backend_for(mask.device) == "triton" and mask.shape[0] <= kernels("packing").MOST_SEQUENCES


@on_its_device
def _fused_facts(mask: Tensor) -> Tensor:
    return kernels("packing").mask_facts(mask)


@on_its_device
def _fused_places(mask: Tensor, facts: Tensor, tokens: int, rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return kernels("packing").mask_places(mask, facts, tokens, rows)


@on_its_device
def _fused_move(source: Tensor, places: Tensor, rows: int) -> Tensor:
    return kernels("packing").move_rows(source, places, rows)


def _from_facts(mask: Tensor, read: list[list[int]], facts: Tensor | None) -> Packing:
    """Packing of a mask of whose rows `_facts` is known on the host; facts: for the kernels, None to do without."""
    batch, seqlen = mask.shape
    lengths = [length for length, _, _ in read]
    starts_real = all(first or not length for length, first, _ in read)
    contiguous = all(first + risen <= 1 for _, first, risen in read)
    tokens = sum(lengths)
    multiple = GPU_TOKEN_MULTIPLE if mask.device.type == "cuda" else 1
    rows = -(-tokens // multiple) * multiple
    inverse = place = None
    if facts is not None:
        indices, inverse, cu_seqlens, place = _fused_places(mask, facts, tokens, rows)
    else:
        flat = (mask != 0).flatten()
        cu_seqlens = torch.tensor([*itertools.accumulate(lengths, initial=0)], dtype=torch.int32)
        if mask.device.type == "cpu":
            indices = flat.nonzero().squeeze(1)
        else:
            # A stable sort puts the real places first, in order; nonzero() would wait for the device once more.
            indices = torch.argsort(flat.to(torch.uint8), descending=True, stable=True)[:tokens]
            cu_seqlens = cu_seqlens.to(mask.device, non_blocking=True)
    return Packing(
        indices,
        cu_seqlens,
        max(lengths, default=0),
        batch,
        seqlen,
        tokens,
        rows,
        starts_real,
        contiguous,
        inverse,
        place,
        begins_all=all(first for _, first, _ in read),
    )


def _is_for_moving(source: Tensor, places: Tensor | None) -> bool:
    if places is None or not is_plain((source, places)) or not source.numel() or source.dtype not in _MOVED:
        return False
    return backend_for(source.device) == "triton"


_MOVED = (*FLOATS, torch.int64, torch.int32)


def _gather(flat: Tensor, indices: Tensor, rows: int) -> Tensor:
    if _is_for_moving(flat, indices):
        return _fused_move(flat, indices, rows)
    if rows == indices.shape[0]:
        return flat.index_select(0, indices)
    out = flat.new_zeros(rows, *flat.shape[1:])
    torch.index_select(flat.detach(), 0, indices, out=out[: indices.shape[0]])
    return out


def _scatter(packed: Tensor, indices: Tensor, inverse: Tensor | None, size: int) -> Tensor:
    if inverse is not None and _is_for_moving(packed, inverse):
        return _fused_move(packed, inverse, size)
    out = packed.new_zeros(size, *packed.shape[1:])
    return out.index_copy_(0, indices, packed[: indices.shape[0]])


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(flat: Tensor, indices: Tensor, inverse: Tensor | None, rows: int) -> Tensor:
        return _gather(flat, indices, rows)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        flat, indices, inverse, _ = inputs
        ctx.save_for_backward(indices, inverse)
        ctx.size = flat.shape[0]

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _pad(grad, *ctx.saved_tensors, ctx.size), None, None, None


class _Pad(torch.autograd.Function):
    @staticmethod
    def forward(packed: Tensor, indices: Tensor, inverse: Tensor | None, size: int) -> Tensor:
        return _scatter(packed, indices, inverse, size)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        packed, indices, inverse, _ = inputs
        ctx.save_for_backward(indices, inverse)
        ctx.rows = packed.shape[0]

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _pack(grad, *ctx.saved_tensors, ctx.rows), None, None, None


_pack, _pad = light(_Pack), light(_Pad)
