"""Rotary position embedding."""

import random

import pytest
import torch
from checking import compare, fenced

from fastformer.ops import rotary
from fastformer.ops.rotary import rotary_embedding


def tables(positions, half, device, dtype=torch.float32):
    angle = torch.arange(positions)[:, None] * 10000.0 ** -(torch.arange(half) / max(half, 1))
    return angle.cos().to(device, dtype), angle.sin().to(device, dtype)


def random_case(number, device, dtypes):
    pick = random.Random(number)
    generator = torch.Generator().manual_seed(number)
    batch, length = pick.choice([(1, 1), (2, 5), (3, 4)])
    width = pick.choice([4, 16, 24, 80])
    half = pick.choice([width // 2, max(width // 4, 1)])
    dtype = pick.choice(dtypes)
    packed, heads_first = pick.random() < 0.3, pick.random() < 0.5

    def rows(heads):
        if packed:
            return fenced((batch * length, heads, width), dtype, generator, device, pick.choice([0, 3]))
        if heads_first:
            return fenced((batch, heads, length, width), dtype, generator, device).transpose(1, 2)
        return fenced((batch, length, heads, width), dtype, generator, device, pick.choice([0, 3]))

    tensors = {"query": rows(pick.choice([1, 3, 4]))}
    if pick.random() < 0.7:
        tensors["key"] = rows(pick.choice([1, 2, 20]))
    lead = tensors["query"].shape[:-2]
    cos, sin = tables(30, half, device)
    position = None
    choice = pick.choice(["ids", "ids", "none", "token"])
    if choice == "ids":
        position = torch.randint(0, 30, lead, generator=generator).to(device)
    elif choice == "token":
        count = lead if len(lead) == 2 else (1, *lead)
        rows_of = torch.randint(0, 30, count, generator=generator).to(device)
        cos, sin = cos[rows_of], sin[rows_of]
    interleaved = pick.random() < 0.5

    def call(query, key=None):
        turned = rotary_embedding(query, key, cos, sin, position, interleaved=interleaved)
        return turned if key is not None else turned[0]

    return call, tensors


@pytest.mark.parametrize("number", range(40))
def test_fuzz(number, device, interpreting, monkeypatch, poisoned):
    dtypes = [torch.float32, torch.float16] + ([] if interpreting else [torch.bfloat16])
    compare(*random_case(number, device, dtypes), monkeypatch, number)


def test_hugging_face_layout(device):
    """The half-split form against the usual x * cos + rotate_half(x) * sin with doubled tables."""
    x = torch.randn(2, 3, 5, 16, device=device)
    cos, sin = tables(5, 8, device)
    doubled_cos, doubled_sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
    rotated = torch.cat((-x[..., 8:], x[..., :8]), -1)
    expected = x * doubled_cos + rotated * doubled_sin
    ours, none = rotary_embedding(x.transpose(1, 2), None, doubled_cos[:, :8], doubled_sin[:, :8])
    assert none is None
    torch.testing.assert_close(ours.transpose(1, 2), expected)


def test_layouts_are_permutations_of_each_other(device):
    x = torch.randn(2, 5, 3, 16, device=device)
    cos, sin = tables(5, 8, device)
    order = torch.arange(16, device=device).view(2, 8).t().flatten()
    half, _ = rotary_embedding(x, None, cos, sin)
    neighbours, _ = rotary_embedding(x[..., order], None, cos, sin, interleaved=True)
    torch.testing.assert_close(neighbours, half[..., order])


def test_gradient_of_one_output(device):
    q, k = (torch.randn(2, 5, 3, 16, device=device, requires_grad=True) for _ in range(2))
    cos, sin = tables(5, 8, device)
    turned, other = rotary_embedding(q, k, cos, sin)
    (dk,) = torch.autograd.grad(other.sum(), k, retain_graph=True)
    (dq,) = torch.autograd.grad(turned.sum(), q)
    torch.testing.assert_close(dq, dk)


def test_position_beyond_the_table_is_never_a_number(device, interpreting):
    x, (cos, sin) = torch.randn(2, 1, 4, device=device), tables(3, 2, device)
    position = torch.tensor([2, 3], device=device)
    if device.type == "cpu" and not interpreting:
        with pytest.raises(IndexError):
            rotary_embedding(x, None, cos, sin, position)
    else:
        turned, _ = rotary_embedding(x, None, cos, sin, position)
        assert turned[0].isfinite().all()
        assert turned[1].isnan().all()


@pytest.mark.parametrize("shape", [(0, 2, 8), (2, 0, 2, 8), (2, 3, 0, 8)])
def test_empty(shape, device):
    x = torch.randn(shape, device=device, requires_grad=True)
    y, _ = rotary_embedding(x, None, *tables(3, 4, device))
    y.sum().backward()
    assert y.shape == x.shape == x.grad.shape


def test_bad_arguments(device):
    x, (cos, sin) = torch.randn(2, 5, 3, 16, device=device), tables(5, 8, device)
    with pytest.raises(ValueError, match=r"query must be \(B, S, H, D\) or \(T, H, D\)"):
        rotary_embedding(x[0, 0], None, cos, sin)
    with pytest.raises(ValueError, match=r"key must have shape \(2, 5, any, 16\)"):
        rotary_embedding(x, x[:1], cos, sin)
    with pytest.raises(ValueError, match="cos must be"):
        rotary_embedding(x, None, torch.ones(5, 9, device=device), sin)
    with pytest.raises(ValueError, match="sin must be"):
        rotary_embedding(x, None, cos, sin[:4])
    with pytest.raises(ValueError, match="cos must have a row for each of 5 positions, got 4"):
        rotary_embedding(x, None, cos[:4], sin[:4])
    with pytest.raises(TypeError, match="position_ids must be one of int64, int32"):
        rotary_embedding(x, None, cos, sin, torch.zeros(2, 5, device=device))
    ids = torch.zeros(2, 5, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="position_ids must be None"):
        rotary_embedding(x, None, cos[None], sin[None], ids)
    with pytest.raises(ValueError, match="cos takes no gradient"):
        rotary_embedding(x, None, cos.clone().requires_grad_(), sin)


def test_full_route(device, interpreting):
    if not interpreting and device.type == "cpu":
        pytest.skip("the CPU backend registers no operator")
    q = torch.randn(2, 5, 3, 16, device=device, requires_grad=True)
    k = torch.randn(2, 2, 5, 16, device=device, requires_grad=True)
    args = (q, k.transpose(1, 2), *tables(5, 8, device), None, False, False)
    torch.library.opcheck(rotary._rotary_op.op, args)


def test_compile(device):
    q, k = (torch.randn(2, 5, 3, 16, device=device, requires_grad=True) for _ in range(2))
    cos, sin = tables(5, 8, device)

    def step(q, k):
        a, b = rotary_embedding(q, k, cos, sin, interleaved=True)
        return (a * b).sum()

    eager = torch.autograd.grad(step(q, k), (q, k))
    compiled = torch.autograd.grad(torch.compile(step, backend="aot_eager", fullgraph=True)(q, k), (q, k))
    for a, c in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, c)
