"""Packing and padding back."""

import pytest
import torch

from fastformer.ops.packing import Packing


@pytest.mark.parametrize("rows", [[[1, 1, 0], [1, 0, 0], [1, 1, 1]], [[0, 1], [0, 0]], [[0, 1, 0, 1]], [[1]], [[0, 0]]])
def test_round_trip(rows, device):
    mask = torch.tensor(rows, device=device)
    packing = Packing.from_mask(mask)
    real = mask.bool()
    assert packing.tokens == int(real.sum())
    assert packing.cu_seqlens.tolist() == [0, *real.sum(1).cumsum(0).tolist()]
    assert packing.cu_seqlens.dtype == torch.int32
    assert packing.max_seqlen == int(real.sum(1).max())
    x = torch.randn(*mask.shape, 5, device=device)
    packed = packing.pack(x)
    assert packed.shape == (packing.rows, 5)
    assert torch.equal(packed[: packing.tokens], x[real])
    assert torch.all(packed[packing.tokens :] == 0)
    assert torch.equal(packing.pad(packed), torch.where(real[..., None], x, 0))
    places = torch.arange(mask.shape[1], device=device).expand(mask.shape)
    assert torch.equal(packing.positions()[0, : packing.tokens], places[real])


def test_gradients(device):
    mask = torch.tensor([[1, 0, 1], [0, 1, 0]], device=device)
    packing = Packing.from_mask(mask)
    x = torch.randn(2, 3, 2, dtype=torch.float64, device=device, requires_grad=True)
    y = torch.randn(packing.rows, 2, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(packing.pack, x)
    assert torch.autograd.gradgradcheck(packing.pack, x)
    assert torch.autograd.gradcheck(packing.pad, y)


def test_rows_beyond_the_tokens_are_zero_and_take_no_gradient(device):
    packing = Packing.from_mask(torch.ones(2, 3, device=device))
    wide = Packing(packing.indices, packing.cu_seqlens, 3, 2, 3, 6, 8)
    x = torch.randn(2, 3, 4, device=device, requires_grad=True)
    packed = wide.pack(x)
    assert packed.shape == (8, 4)
    assert torch.all(packed[6:] == 0)
    wide.pad(packed).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_wrong_shapes():
    packing = Packing.from_mask(torch.ones(2, 3))
    with pytest.raises(ValueError, match="mask must have shape"):
        Packing.from_mask(torch.ones(3))
    with pytest.raises(ValueError, match="padded must have shape"):
        packing.pack(torch.ones(3, 2))
    with pytest.raises(ValueError, match="packed must have 6 rows"):
        packing.pad(torch.ones(5, 2))
