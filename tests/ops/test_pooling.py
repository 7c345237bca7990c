"""Pooling of packed sequences."""

import random
import warnings

import pytest
import torch
from checking import compare, fenced

from fastformer.ops import pooling
from fastformer.ops.pooling import pool_packed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("width", [1, 5, 100])
@pytest.mark.parametrize("masked", [False, True])
def test_mean(dtype, width, masked, device, monkeypatch, poisoned):
    """Sequences of 1, 0, 33 and 70 tokens, then four that belong to none."""
    generator = torch.Generator().manual_seed(width)
    cu = torch.tensor([0, 1, 1, 34, 104], dtype=torch.int32, device=device)
    mask = (torch.rand(108, generator=generator) < 0.6).to(device) if masked else None
    tensors = {"input": fenced((108, width), dtype, generator, device, 3)}
    compare(lambda input: pool_packed(input, cu, mask=mask), tensors, monkeypatch)


def random_case(number, device, dtypes):
    pick = random.Random(number)
    generator = torch.Generator().manual_seed(number)
    lengths = torch.tensor([pick.choice([0, 1, 2, 17, 64, 130]) for _ in range(pick.choice([1, 2, 7]))])
    bounds = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    cu = bounds.to(device, pick.choice([torch.int32, torch.int64]))
    # Not one or two columns: a sum of numbers that cancel may by chance be off by nothing in stock.
    tokens, width = int(bounds[-1]) + pick.choice([0, 3]), pick.choice([17, 64, 257])
    mode = pick.choice(["mean", "mean", "cls"])
    mask = None
    if mode == "mean" and pick.random() < 0.5:
        mask = (torch.rand(tokens, generator=generator) < pick.choice([0.1, 0.6])).to(device)
    tensors = {"input": fenced((tokens, width), pick.choice(dtypes), generator, device, pick.choice([0, 3]))}
    return (lambda input: pool_packed(input, cu, mode, mask=mask)), tensors


@pytest.mark.slow
@pytest.mark.parametrize("batch", range(1, 6))
def test_fuzz_long(batch, device, interpreting, monkeypatch, poisoned):
    dtypes = [torch.float32, torch.float16] + ([] if interpreting else [torch.bfloat16])
    for number in range(batch * 1000, batch * 1000 + 60):
        compare(*random_case(number, device, dtypes), monkeypatch, number)


def test_mean_by_hand(device):
    x = torch.arange(12.0, device=device).view(6, 2).requires_grad_()
    mask = torch.tensor([True, False, True, True, False, True], device=device)
    y = pool_packed(x, torch.tensor([0, 3, 5], device=device), mask=mask)
    assert y.tolist() == [[2.0, 3.0], [6.0, 7.0]]
    y.sum().backward()
    assert x.grad[:, 0].tolist() == [0.5, 0.0, 0.5, 1.0, 0.0, 0.0]


def test_masked_tokens_may_hold_anything(device, interpreting):
    if device.type == "cpu" and not interpreting:
        pytest.skip("the tokens of no sequence are summed there, into a row that is dropped")
    x = torch.ones(4, 3, device=device)
    x[1], x[3] = float("nan"), float("inf")
    mask = torch.tensor([True, False, True, True], device=device)
    assert (pool_packed(x, torch.tensor([0, 3], device=device), mask=mask) == 1).all()


def test_first_token(device):
    x = torch.randn(6, 2, device=device, requires_grad=True)
    y = pool_packed(x, torch.tensor([0, 4, 6], dtype=torch.int32, device=device), "cls")
    assert torch.equal(y, x[[0, 4]])
    y.sum().backward()
    assert x.grad[:, 0].tolist() == [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]


def test_first_token_of_an_empty_sequence_is_zero(device):
    x = torch.full((3, 2), float("nan"), device=device)
    x[:2] = 1.0
    x.requires_grad_()
    y = pool_packed(x, torch.tensor([0, 0, 2, 2, 3, 3], device=device), "cls")
    assert torch.equal(y.isnan()[:, 0].cpu(), torch.tensor([False, False, False, True, False]))
    assert y[[0, 1, 2, 4], 0].tolist() == [0.0, 1.0, 0.0, 0.0]
    y.sum().backward()
    assert x.grad[:, 0].tolist() == [1.0, 0.0, 1.0]
    none = x.detach()[:0].requires_grad_()
    y = pool_packed(none, torch.tensor([0, 0], device=device), "cls")
    y.sum().backward()
    assert y.tolist() == [[0.0, 0.0]]


def test_no_sequences(device):
    assert pool_packed(torch.randn(3, 2, device=device), torch.zeros(1, dtype=torch.int64, device=device)).shape == (
        0,
        2,
    )


def test_bad_arguments(device):
    x, cu = torch.randn(6, 2, device=device), torch.tensor([0, 6], device=device)
    with pytest.raises(ValueError, match='mode must be "mean" or "cls", got \'max\''):
        pool_packed(x, cu, "max")
    with pytest.raises(ValueError, match="mask must be None"):
        pool_packed(x, cu, "cls", torch.ones(6, dtype=torch.bool, device=device))
    with pytest.raises(TypeError, match="mask must be one of bool"):
        pool_packed(x, cu, mask=torch.ones(6, device=device))
    with pytest.raises(ValueError, match="input must have 2 dimensions"):
        pool_packed(x[None], cu)
    with pytest.raises(ValueError, match="cu_seqlens must have at least one element"):
        pool_packed(x, cu[:0])


def test_full_route(device, interpreting):
    if not interpreting and device.type == "cpu":
        pytest.skip("the CPU backend registers no operator")
    x, cu = torch.randn(6, 2, device=device, requires_grad=True), torch.tensor([0, 4, 6], device=device)
    torch.library.opcheck(pooling._mean_op.op, (x, cu, torch.ones(6, dtype=torch.bool, device=device)))


def test_second_derivative(device):
    """Pooling is linear: the first derivative hands on what is sent, and so does its own."""
    x = torch.randn(7, 3, device=device, requires_grad=True)
    bounds, mask = torch.tensor([0, 2, 2, 6], device=device), torch.tensor([1, 1, 0, 1, 1, 1, 1], device=device) != 0
    sent = torch.randn(3, 3, device=device, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (dx,) = torch.autograd.grad(pool_packed(x, bounds, mask=mask), x, sent, create_graph=True)
    (ds,) = torch.autograd.grad(dx.square().sum(), sent)
    torch.testing.assert_close(ds, 2 * sent.detach() * torch.tensor([1 / 2, 0.0, 1 / 3], device=device)[:, None])
    assert (dx[2] == 0).all()
    assert (dx[6] == 0).all()
