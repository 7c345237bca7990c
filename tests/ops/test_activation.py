"""Activations with bias, gate, dropout and residual."""

import random
import warnings

import pytest
import torch
import torch.nn.functional as F
from checking import compare, fenced

from fastformer.ops import activation
from fastformer.ops.activation import bias_dropout_add, bias_gelu, geglu, relu_squared, swiglu
from fastformer.ops.random import philox_keep


def random_case(number, device, dtypes):
    pick = random.Random(number)
    generator = torch.Generator().manual_seed(number)
    n = pick.choice([1, 3, 16, 17, 64, 100, 257, 1500])
    lead = pick.choice([(), (1,), (5,), (2, 3), (9,), (0,)])
    dtype = pick.choice(dtypes)
    name = pick.choice(["bias_gelu", "geglu", "swiglu", "relu_squared", "bias_dropout_add"])

    def rows(kind=dtype):
        return fenced((*lead, n), kind, generator, device, pick.choice([0, 0, 5]), pick.choice([0.1, 1.0, 5.0]))

    bias = {"bias": fenced((n,), dtype, generator, device)} if pick.random() < 0.7 else {}
    approximate = pick.choice(["none", "tanh"])
    if name == "bias_gelu":
        return (lambda **leaves: bias_gelu(**leaves, approximate=approximate)), {"input": rows(), **bias}
    if name == "geglu":
        return (lambda **leaves: geglu(**leaves, approximate=approximate)), {"gate": rows(), "up": rows()}
    if name == "swiglu":
        return swiglu, {"gate": rows(), "up": rows()}
    if name == "relu_squared":
        return relu_squared, {"input": rows()}
    p, seed = pick.choice([0.0, 0.1, 0.5, 1.0]), torch.tensor([number * 991], device=device)
    tensors = {"input": rows(), "residual": rows(pick.choice([dtype, torch.float32])), **bias}
    return (lambda bias=None, **leaves: bias_dropout_add(**leaves, bias=bias, dropout_p=p, dropout_seed=seed)), tensors


@pytest.mark.parametrize("number", range(40))
def test_fuzz(number, device, interpreting, monkeypatch, poisoned):
    dtypes = [torch.float32, torch.float16] + ([] if interpreting else [torch.bfloat16])
    compare(*random_case(number, device, dtypes), monkeypatch, number)


@pytest.mark.slow
@pytest.mark.parametrize("batch", range(1, 11))
def test_fuzz_long(batch, device, interpreting, monkeypatch, poisoned):
    dtypes = [torch.float32, torch.float16] + ([] if interpreting else [torch.bfloat16])
    for number in range(batch * 1000, batch * 1000 + 60):
        compare(*random_case(number, device, dtypes), monkeypatch, number)


def test_halves_of_one_projection(device, monkeypatch):
    """gate and up as strided halves; the gradient reaches the whole."""
    joint = torch.randn(4, 5, 2 * 24, generator=torch.Generator().manual_seed(0)).to(device)
    compare(lambda joint: swiglu(*joint.chunk(2, -1)), {"joint": joint}, monkeypatch)


def test_torch_backend_is_stock_bit_for_bit(monkeypatch):
    monkeypatch.setenv("FASTFORMER_BACKEND", "torch")
    x, u, b = torch.randn(3, 50), torch.randn(3, 50), torch.randn(50)
    assert torch.equal(bias_gelu(x, b), F.gelu(x + b))
    assert torch.equal(geglu(x, u, "tanh"), F.gelu(x, approximate="tanh") * u)
    assert torch.equal(swiglu(x, u), F.silu(x) * u)
    assert torch.equal(relu_squared(x), F.relu(x).square())
    torch.manual_seed(0)
    ours = bias_dropout_add(x, b, u, 0.1)
    torch.manual_seed(0)
    assert torch.equal(ours, F.dropout(x + b, 0.1) + u)


def test_bias_is_rounded_to_the_inputs_dtype(device):
    x, b = torch.randn(4, 32, device=device).half(), torch.randn(32, device=device, requires_grad=True)
    y = bias_gelu(x, b)
    assert y.dtype == torch.float16
    y.sum().backward()
    assert b.grad.dtype == torch.float32
    torch.testing.assert_close(y, F.gelu(x + b.half()), rtol=1e-3, atol=1e-3)


def test_dropout_mask_is_the_reference(device):
    x, seed = torch.ones(6, 37, device=device), torch.tensor([77], device=device)
    y = bias_dropout_add(x, None, torch.zeros_like(x), 0.4, dropout_seed=seed)
    keep = philox_keep(77, torch.arange(37), torch.arange(6)[:, None], torch.zeros(1), 0.4, draws=4)
    assert torch.equal(y.cpu() != 0, keep)


def test_residual_in_evaluation(device):
    x, r = torch.randn(6, 37, device=device), torch.randn(6, 37, device=device)
    assert torch.equal(bias_dropout_add(x, None, r, 0.4, training=False), x + r)


def test_nan_is_not_hidden(device):
    x = torch.tensor([[float("nan"), -1.0, 2.0]], device=device)
    assert relu_squared(x).isnan().tolist() == [[True, False, False]]


def test_only_the_bias_learns(device):
    x, r = torch.randn(9, 24, device=device), torch.randn(9, 24, device=device)
    b = torch.randn(24, device=device, requires_grad=True)
    bias_dropout_add(x, b, r).sum().backward()
    torch.testing.assert_close(b.grad, torch.full_like(b, 9.0))


def test_bad_arguments(device):
    x = torch.randn(3, 8, device=device)
    with pytest.raises(ValueError, match='approximate must be "none" or "tanh"'):
        bias_gelu(x, approximate="erf")
    with pytest.raises(ValueError, match=r"bias must have shape \(8\), got \(3,\)"):
        bias_gelu(x, x[:, 0])
    with pytest.raises(TypeError, match="up must be one of float32, got float16"):
        swiglu(x, x.half())
    with pytest.raises(TypeError, match="gate must be a tensor"):
        geglu(None, x)
    with pytest.raises(ValueError, match=r"residual must have shape \(3, 8\)"):
        bias_dropout_add(x, None, x[0])
    with pytest.raises(ValueError, match="dropout_p must be between"):
        bias_dropout_add(x, None, x, -0.1)


@pytest.mark.parametrize("kind", ["gelu", "silu"])
def test_slope_keeps_its_digits(kind, device, monkeypatch):
    """Where the sigmoid is near 1, 1 - sigmoid has none left: GELU's tanh form lost nine ulps there."""
    x = torch.linspace(-9, 9, 4001, device=device)
    if kind == "gelu":
        compare(lambda input: bias_gelu(input, approximate="tanh"), {"input": x}, monkeypatch)
    else:
        compare(lambda gate: swiglu(gate, torch.ones_like(gate)), {"gate": x}, monkeypatch)


def test_second_derivative(device):
    """A gradient penalty, against stock in float64; the gate of `geglu` depends on `up`."""
    generator = torch.Generator().manual_seed(3)
    x, b, r = (torch.randn(s, generator=generator).to(device) for s in ((4, 9), (9,), (4, 9)))

    def ours(x, b, r):
        return bias_dropout_add(geglu(x * r, r), b, swiglu(bias_gelu(x, b), r))

    def stock(x, b, r):
        return F.gelu(x * r) * r + b + F.silu(F.gelu(x + b)) * r

    def penalty(call, *leaves):
        leaves = [t.clone().requires_grad_() for t in leaves]
        first = torch.autograd.grad(call(*leaves).sin().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = penalty(ours, x, b, r)
    for a, e in zip(found, penalty(stock, x.double(), b.double(), r.double()), strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-4)


def test_full_route(device, interpreting):
    if not interpreting and device.type == "cpu":
        pytest.skip("the CPU backend registers no operator")
    x, u = (torch.randn(3, 20, device=device, requires_grad=True) for _ in range(2))
    b = torch.randn(20, device=device, requires_grad=True)
    args = (x, u, b, None, None, "silu", 0.0, torch.float32)
    torch.library.opcheck(activation._activation_op.op, args)
    light = torch.autograd.grad(activation._activation_op(*args).sin().sum(), (x, u, b))
    full = torch.autograd.grad(activation._activation_op.op(*args).sin().sum(), (x, u, b))
    assert all(map(torch.equal, light, full))


def test_compile(device):
    x, r = (torch.randn(3, 20, device=device, requires_grad=True) for _ in range(2))
    b, seed = torch.randn(20, device=device, requires_grad=True), torch.tensor([5], device=device)

    def layer(x, r):
        return bias_dropout_add(bias_gelu(x, b), b, r, 0.2, dropout_seed=seed).sin().sum()

    eager = torch.autograd.grad(layer(x, r), (x, r, b))
    compiled = torch.autograd.grad(torch.compile(layer, backend="aot_eager", fullgraph=True)(x, r), (x, r, b))
    for a, c in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-6)
