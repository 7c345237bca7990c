"""Rotary position embedding."""

import random
import warnings

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

    def call(query, key=None, inplace=False):
        turned = rotary_embedding(query, key, cos, sin, position, interleaved=interleaved, inplace=inplace)
        return turned if key is not None else turned[0]

    return call, tensors


@pytest.mark.parametrize("number", range(40))
def test_fuzz(number, device, interpreting, monkeypatch, poisoned):
    dtypes = [torch.float32, torch.float16] + ([] if interpreting else [torch.bfloat16])
    compare(*random_case(number, device, dtypes), monkeypatch, number)


@pytest.mark.slow
@pytest.mark.parametrize("batch", range(1, 6))
def test_fuzz_long(batch, device, interpreting, monkeypatch, poisoned):
    dtypes = [torch.float32, torch.float16] + ([] if interpreting else [torch.bfloat16])
    for number in range(batch * 1000, batch * 1000 + 60):
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


@pytest.mark.parametrize("inplace", [False, True])
def test_second_derivative(inplace, device):
    """Rotation is linear and keeps lengths."""
    x = torch.randn(2, 5, 3, 16, device=device, requires_grad=True)
    sent = torch.randn(2, 5, 3, 16, device=device, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        turned, _ = rotary_embedding(x * 1.0, None, *tables(5, 8, device), inplace=inplace)
        (dx,) = torch.autograd.grad(turned, x, sent, create_graph=True)
    (ds,) = torch.autograd.grad(dx.square().sum(), sent)
    torch.testing.assert_close(ds, 2 * sent.detach())


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


@pytest.mark.parametrize("number", range(100, 116))
def test_in_place_is_the_same(number, device, interpreting):
    """Bits, gradients and objects: what comes back is what went in, and no other element of its buffer changed."""
    dtypes = [torch.float32, torch.float16] + ([] if interpreting else [torch.bfloat16])
    pick = random.Random(number)
    call, tensors = random_case(number, device, dtypes)
    leaves = {k: v.detach().clone(memory_format=torch.preserve_format).requires_grad_() for k, v in tensors.items()}
    expected = call(**leaves)
    expected = expected if isinstance(expected, tuple) else (expected,)
    sent = [torch.randn_like(e) for e in expected]
    wanted = torch.autograd.grad(expected, list(leaves.values()), sent)

    with torch.no_grad():
        buffers = {k: v.detach().clone(memory_format=torch.preserve_format) for k, v in tensors.items()}
        turned = call(**buffers, inplace=True)
        turned = turned if isinstance(turned, tuple) else (turned,)
    for ours, result, buffer in zip(turned, expected, buffers.values(), strict=True):
        assert ours is buffer
        assert torch.equal(ours, result)

    # A result of another operation, behind a view half of the time.
    again = {k: v.detach().clone(memory_format=torch.preserve_format).requires_grad_() for k, v in tensors.items()}
    inner = {k: (v * 1.0).flatten(-2).unflatten(-1, v.shape[-2:]) if pick.random() < 0.5 else v * 1.0
             for k, v in again.items()}  # fmt: skip
    turned = call(**inner, inplace=True)
    turned = turned if isinstance(turned, tuple) else (turned,)
    for ours, result in zip(turned, expected, strict=True):
        assert torch.equal(ours, result)
    for ours, theirs in zip(torch.autograd.grad(turned, list(again.values()), sent), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3 if theirs.dtype != torch.float32 else 1e-6, atol=1e-6)


def test_in_place_halves_of_one_projection(device):
    joint = torch.randn(2, 5, 3, 4, 16, device=device)
    cos, sin = tables(5, 8, device)
    expected = [x.clone() for x in rotary_embedding(joint[:, :, 0], joint[:, :, 1], cos, sin)]
    value = joint[:, :, 2].clone()
    query, key = (joint[:, :, i] for i in (0, 1))
    with torch.no_grad():
        rotary_embedding(query, key, cos, sin, inplace=True)
    assert torch.equal(query, expected[0])
    assert torch.equal(key, expected[1])
    assert torch.equal(joint[:, :, 2], value)


def test_in_place_refuses(device):
    x, (cos, sin) = torch.randn(2, 5, 3, 16, device=device), tables(5, 8, device)
    with pytest.raises(ValueError, match="query must not be a leaf that requires a gradient with inplace=True"):
        rotary_embedding(x.clone().requires_grad_(), None, cos, sin, inplace=True)
    with pytest.raises(ValueError, match="key must hold every element once with inplace=True"):
        rotary_embedding(x, x[:, :, :1].clone().expand(2, 5, 3, 16), cos, sin, inplace=True)
    for key in (x, x[:, :, 1:], x.flatten()[8:].as_strided((2, 5, 2, 16), x.stride())):
        with pytest.raises(ValueError, match="query and key must not share memory with inplace=True"):
            rotary_embedding(x, key, cos, sin, inplace=True)
    assert rotary_embedding(x[:, :, :1], x[:, :, 1:], cos, sin, inplace=True)[1].shape == (2, 5, 2, 16)


def test_in_place_is_seen_by_autograd(device):
    """Another operation saved what is overwritten: its backward must fail, not use the new values."""
    x = torch.randn(1, 5, 3, 16, device=device, requires_grad=True)
    inner = x * 2.0
    squared = inner.square()
    rotary_embedding(inner, None, *tables(5, 8, device), inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squared.sum().backward()
    with torch.no_grad():
        before = inner._version
        rotary_embedding(inner, None, *tables(5, 8, device), inplace=True)
        assert inner._version > before


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
        c, _ = rotary_embedding(q * 1.0, None, cos, sin, inplace=True)
        return (a * b * c).sum()

    eager = torch.autograd.grad(step(q, k), (q, k))
    compiled = torch.autograd.grad(torch.compile(step, backend="aot_eager", fullgraph=True)(q, k), (q, k))
    for a, c in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, c)
