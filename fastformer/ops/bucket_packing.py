"""A `Packing` whose shapes are a bucket's: what a batch adds is read from device tensors only, so a CUDA graph of it
can be replayed for every batch that fits the bucket.

Rows beyond the batch's real tokens belong to no sequence: they come out of `pack` as zero, and `pad` drops them. Both
are gathers and scatters by indices of which only one spare place may repeat, and each other's gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastformer.ops.packing import Packing


@dataclass(frozen=True, eq=False)
class BucketPacking(Packing):
    """A packing of at most `rows` real tokens.

    Attributes:
        indices: int64 [rows], place of each row in the flattened padded batch; of surplus rows, `batch * seqlen`.
        real: bool [rows], which rows hold a token.
        tokens: as `rows`: how many are real is known on the device only.
    """

    real: Tensor = field(kw_only=True)

    @staticmethod
    def of_mask(mask: Tensor, rows: int, starts_real: bool = True, contiguous: bool = True) -> BucketPacking:
        """Packing of the places where `mask` is not zero. Waits for nothing.

        Args:
            mask: [batch, seqlen], of at most `rows` real places.
            starts_real, contiguous: as `Packing`; facts of the mask that the caller knows.
        """
        batch, seqlen = mask.shape
        flat = (mask != 0).flatten()
        lengths = flat.view(batch, seqlen).sum(dim=1, dtype=torch.int32)
        cu_seqlens = _boundaries(lengths)
        # A stable sort puts the real places first, in order, without the wait that nonzero() takes.
        indices = torch.argsort(flat.to(torch.uint8), descending=True, stable=True)[:rows]
        return _build(indices, cu_seqlens, batch, seqlen, rows, starts_real, contiguous)

    @staticmethod
    def of_boundaries(cu_seqlens: Tensor, seqlen: int, rows: int) -> BucketPacking:
        """Packing of sequences that lie one after another, each at most `seqlen` tokens. Waits for nothing.

        Args:
            cu_seqlens: int32 [batch + 1], from 0 to the number of real tokens, at most `rows`.
        """
        batch = cu_seqlens.shape[0] - 1
        row = torch.arange(rows, device=cu_seqlens.device, dtype=torch.int32)
        sequence = torch.searchsorted(cu_seqlens[1:], row, right=True).clamp(max=batch - 1)
        indices = sequence * seqlen + (row - cu_seqlens[sequence])
        return _build(indices, cu_seqlens, batch, seqlen, rows, True, True)

    @property
    def has_padding(self) -> bool:
        return True

    @property
    def is_whole(self) -> bool:
        return False

    def positions(self) -> Tensor:
        return torch.where(self.real, self.indices % self.seqlen, 0)[None]

    def places(self) -> Tensor:
        spread = self.real.new_zeros(self.batch * self.seqlen + 1)
        return spread.index_fill(0, self.indices, True)[:-1].view(self.batch, self.seqlen)

    def pack(self, padded: Tensor) -> Tensor:
        if padded.shape[:2] != (self.batch, self.seqlen):
            raise ValueError(f"padded must have shape ({self.batch}, {self.seqlen}, ...), got {tuple(padded.shape)}")
        return _Gather.apply(padded.flatten(0, 1), self.indices, self.real)

    def pad(self, packed: Tensor) -> Tensor:
        if packed.shape[0] != self.rows:
            raise ValueError(f"packed must have {self.rows} rows, got shape {tuple(packed.shape)}")
        return _Scatter.apply(packed, self.indices, self.real, self.batch * self.seqlen).unflatten(
            0, (self.batch, self.seqlen)
        )


def _boundaries(lengths: Tensor) -> Tensor:
    """int32 [batch + 1] of int32 [batch]."""
    return torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def _build(
    indices: Tensor, cu_seqlens: Tensor, batch: int, seqlen: int, rows: int, starts_real: bool, contiguous: bool
) -> BucketPacking:
    real = torch.arange(rows, device=indices.device) < cu_seqlens[-1]
    indices = torch.where(real, indices, batch * seqlen)
    return BucketPacking(indices, cu_seqlens, seqlen, batch, seqlen, rows, rows, starts_real, contiguous, real=real)


def _gather(flat: Tensor, indices: Tensor, real: Tensor) -> Tensor:
    """[places, ...] to [rows, ...], zero where not real; the spare place is never read."""
    rows = flat.index_select(0, indices.clamp(max=flat.shape[0] - 1))
    return torch.where(real.view(-1, *[1] * (flat.ndim - 1)), rows, 0)


def _scatter(packed: Tensor, indices: Tensor, size: int) -> Tensor:
    """[rows, ...] to [size, ...], zero where nothing lands; the spare place at the end is cut off."""
    out = packed.new_zeros(size + 1, *packed.shape[1:])
    return out.index_copy_(0, indices, packed)[:size]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(flat: Tensor, indices: Tensor, real: Tensor) -> Tensor:
        return _gather(flat, indices, real)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        flat, indices, real = inputs
        ctx.save_for_backward(indices, real)
        ctx.size = flat.shape[0]

    @staticmethod
    def backward(ctx, grad: Tensor):
        indices, real = ctx.saved_tensors
        return _Scatter.apply(grad, indices, real, ctx.size), None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(packed: Tensor, indices: Tensor, real: Tensor, size: int) -> Tensor:
        return _scatter(packed, indices, size)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(*inputs[1:3])

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _Gather.apply(grad, *ctx.saved_tensors), None, None, None
