"""Repeated calls: what the first of a kind has found is used by the next, and by no call of another kind."""

import pytest
import torch
import torch.nn.functional as F

from fastformer.ops import activation, norm, operator
from fastformer.ops.activation import bias_gelu, swiglu
from fastformer.ops.loss import cross_entropy
from fastformer.ops.norm import add_layer_norm, layer_norm


@pytest.fixture(autouse=True)
def kernels_run(device, interpreting, monkeypatch):
    if device.type == "cpu" and not interpreting:
        pytest.skip("no call on the CPU backend has a kind")
    for module in (norm, activation):
        monkeypatch.setattr(module, "_kinds", operator.Kinds())


def test_calls_of_one_kind_are_found_and_others_are_not(device, monkeypatch):
    leaves = [torch.randn(shape, device=device, requires_grad=True) for shape in ((6, 24), (24,), (24,))]
    first = layer_norm(*leaves)
    assert len(norm._kinds.found) == 1
    with monkeypatch.context() as patch:
        patch.setattr(norm, "_norm_anew", lambda *_: pytest.fail("checked and chosen again"))
        assert torch.equal(layer_norm(*(leaf.detach().clone().requires_grad_() for leaf in leaves)), first)
    x, weight, bias = leaves
    wide = torch.randn(6, 48, device=device)
    others = {
        "dtype": lambda: layer_norm(x.half(), weight, bias),
        "shape": lambda: layer_norm(x[:5], weight, bias),
        "strides": lambda: layer_norm(wide[:, ::2], weight, bias),
        "distance of rows": lambda: layer_norm(wide[:, :24], weight, bias),
        "no bias": lambda: layer_norm(x, weight),
        "dtype of weights": lambda: layer_norm(x, weight.half(), bias),
        "no gradient": lambda: layer_norm(x.detach(), weight, bias),
        "eps": lambda: layer_norm(x, weight, bias, 0.5),
        "dtype of the result": lambda: layer_norm(x, weight, bias, out_dtype=torch.float16),
    }
    for name, call in others.items():
        found, again = call(), call()
        assert torch.equal(found, again), name
        assert (found.grad_fn is None) == (not any(leaf.requires_grad for leaf in (x, weight, bias))), name
    assert layer_norm(wide[:, ::2], weight, bias).shape == x.shape
    torch.testing.assert_close(others["strides"](), F.layer_norm(wide[:, ::2], (24,), weight, bias))
    torch.testing.assert_close(others["distance of rows"](), F.layer_norm(wide[:, :24], (24,), weight, bias))
    with torch.no_grad():
        assert layer_norm(*leaves).grad_fn is None
    with torch.autocast(device.type, torch.bfloat16):
        assert layer_norm(x.half(), weight, bias).dtype == torch.float32
    assert layer_norm(x.half(), weight, bias).dtype == torch.float16
    with monkeypatch.context() as patch:
        patch.setenv("FASTFORMER_BACKEND", "torch")
        assert type(layer_norm(*leaves).grad_fn).__name__ == "NativeLayerNormBackward0"


def test_wrong_arguments_are_refused_after_right_ones(device):
    x, weight = torch.randn(4, 8, device=device), torch.randn(8, device=device)
    for _ in range(2):
        layer_norm(x, weight)
    with pytest.raises(ValueError, match=r"weight must have shape \(8\)"):
        layer_norm(x, weight[:7])
    with pytest.raises(TypeError, match="input must be a tensor, got list"):
        layer_norm([1.0], weight)
    with pytest.raises(TypeError, match="weight must be a tensor, got float"):
        layer_norm(x, 1.0)
    target = torch.tensor([1, 2, 3, 0], device=device)
    for _ in range(2):
        cross_entropy(x, target)
    with pytest.raises(TypeError, match="target must be one of int64"):
        cross_entropy(x, target.int())


def test_saved_tensors_may_come_back_laid_out_anew(device):
    """As from hooks that hold them elsewhere in the meantime."""
    projection = torch.randn(5, 32, device=device)
    sent = torch.randn(5, 16, device=device)

    def gradient():
        leaf = projection.clone().requires_grad_()
        return torch.autograd.grad(swiglu(*leaf.chunk(2, -1)), leaf, sent)[0]

    expected = gradient()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t.contiguous()):
        assert torch.equal(gradient(), expected)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t.mT.contiguous().mT):
        assert torch.equal(gradient(), expected)
    assert torch.equal(gradient(), expected)


def test_gradients_may_come_in_any_layout(device):
    x, bias = torch.randn(6, 8, device=device, requires_grad=True), torch.randn(8, device=device, requires_grad=True)
    for sent in (
        torch.ones((), device=device).expand(6, 8),
        torch.randn(8, 6, device=device).mT,
        x.detach(),
        x.detach(),
    ):
        found = torch.autograd.grad(bias_gelu(x, bias), (x, bias), sent)
        torch.testing.assert_close(found, torch.autograd.grad(F.gelu(x + bias), (x, bias), sent))


def test_one_of_two_results_may_get_no_gradient(device):
    x, residual = (torch.randn(6, 8, device=device, requires_grad=True) for _ in range(2))

    def ours():
        return add_layer_norm(x, residual, return_residual=True)

    def stock():
        total = x + residual
        return F.layer_norm(total, (8,)), total

    for _ in range(2):
        for pick in (lambda y, z: y.sin(), lambda y, z: z.sin(), lambda y, z: y.sin() + z.cos()):
            mine, theirs = (torch.autograd.grad(pick(*call()).sum(), (x, residual)) for call in (ours, stock))
            torch.testing.assert_close(mine, theirs)


def test_what_is_watched_takes_no_kind(device):
    x, weight = torch.randn(3, 4, 8, device=device), torch.randn(8, device=device, requires_grad=True)
    layer_norm(x[0], weight)
    before = len(norm._kinds.found)
    batched = torch.func.vmap(layer_norm, (0, None))(x, weight.detach())
    torch.testing.assert_close(batched, F.layer_norm(x, (8,), weight.detach()))
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        assert type(layer_norm(x[0], weight.detach())) is not torch.Tensor
    assert len(norm._kinds.found) == before
