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


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float32])
def test_any_mask_says_what_it_says_place_by_place(kind, device):
    """Longer than a block of the kernels, any strides, every sort of padding; a packing written out by hand."""
    torch.manual_seed(0)
    masks = torch.rand(5, 1500, device=device) < torch.tensor([[0.5], [2.0], [0.0], [0.9], [0.1]], device=device)
    masks[3] = torch.arange(1500, device=device) >= 700
    for chosen in ([0, 1, 2, 3, 4], [1, 2], [3], [2]):
        real = masks[chosen].cpu()
        wide = torch.zeros(1500, 2 * len(chosen), dtype=kind, device=device)
        wide[:, ::2] = masks[chosen].t().to(kind)
        packing = Packing.from_mask(wide[:, ::2].t())
        places = [(i, j) for i in range(len(chosen)) for j in real[i].nonzero().flatten().tolist()]
        assert packing.indices.tolist() == [i * 1500 + j for i, j in places]
        assert packing.positions()[0, : packing.tokens].tolist() == [j for _, j in places]
        assert packing.positions()[0, packing.tokens :].abs().sum() == 0
        assert packing.starts_real == all(bool(r[0]) or not r.any() for r in real)
        runs = [(r.int().diff() == 1).sum() + r[0] for r in real]
        assert packing.contiguous == all(n <= 1 for n in runs)


def test_surplus_rows_and_lone_places_of_the_kernels(device, interpreting):
    if device.type != "cuda" and not interpreting:
        pytest.skip("of the kernels")
    from fastformer.kernels.packing import mask_facts, mask_places, move_rows

    mask = torch.tensor([[0, 1, 1], [1, 0, 0]], device=device)
    indices, inverse, boundaries, positions = mask_places(mask, mask_facts(mask), 3, 7)
    assert indices.tolist() == [1, 2, 3]
    assert inverse.tolist() == [-1, 0, 1, 2, -1, -1]
    assert boundaries.tolist() == [0, 2, 3]
    assert positions.tolist() == [[1, 2, 0, 0, 0, 0, 0]]
    for x in (torch.full((6, 3), torch.nan, dtype=torch.float16), torch.full((6,), -5)):
        x[1:4] = torch.arange(3).view(3, *[1] * (x.ndim - 1))
        rows = move_rows(x.to(device), indices, 5)
        assert torch.equal(rows[:3].cpu(), x[1:4])
        assert not rows[3:].any()
        back = move_rows(rows, inverse, 6)
        assert torch.equal(back[1:4].cpu(), x[1:4])
        assert not back[[0, 4, 5]].any()
