"""The two routes to an operator: device guard, hidden results, second derivatives, what is plain."""

import contextlib
import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fastformer.ops import operator
from fastformer.ops.operator import Operator, differentiate, is_plain


@pytest.fixture(scope="module")
def product():
    """x * y with a second result, x + y, that only backward is to see."""

    def run(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x * y, x + y

    def setup(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, output[1])

    def backward(ctx, dz, _=None):
        x, y, total = ctx.saved_tensors
        return dz * (total - x), dz * (total - y)

    def second(ctx, dz, _=None):
        x, y, _total = ctx.saved_tensors
        return tuple(differentiate("test_product", lambda x, y: x * y, (x, y), (dz,)))

    def fake(x, y):
        return torch.empty_like(x), torch.empty_like(x)

    return Operator("test_product", run, fake, setup, backward, second, visible=1)


def test_hidden_results_stay_hidden(product):
    x, y = (torch.randn(3, requires_grad=True) for _ in range(2))
    light = product(x, y)
    assert isinstance(light, Tensor)
    with torch.no_grad():
        assert torch.equal(product(x, y), light)
    full = product.shown(product.op(x, y))
    assert torch.equal(full, light)
    assert not product.op(x, y)[1].requires_grad
    for out in (light, full):
        dx, dy = torch.autograd.grad(out.sum(), (x, y))
        torch.testing.assert_close(dx, y.detach())
        torch.testing.assert_close(dy, x.detach())


def test_compiled_it_hands_out_the_same(product):
    x, y = (torch.randn(3, requires_grad=True) for _ in range(2))
    out = torch.compile(lambda x, y: product(x, y).sin(), backend="aot_eager", fullgraph=True)(x, y)
    torch.testing.assert_close(out, (x * y).sin())


def test_second_derivative_of_tensors_that_depend_on_each_other(product):
    """What reaches x by way of y belongs to y here: autograd adds it further up, once."""
    x = torch.tensor([2.0, 3.0], dtype=torch.float64, requires_grad=True)
    operator.say_once.cache_clear()
    with pytest.warns(UserWarning, match="no kernel computes a second derivative"):
        (first,) = torch.autograd.grad(product(x, x.square()).sum(), x, create_graph=True)
    torch.testing.assert_close(first, 3 * x.square())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        torch.testing.assert_close(torch.autograd.grad(first.sum(), x)[0], 6 * x)
        (first,) = torch.autograd.grad(product(x, x).sum(), x, create_graph=True)
    torch.testing.assert_close(first, 2 * x)


class OnGPU(Tensor):
    """A CPU tensor that says it lies on a GPU."""

    is_cuda = True
    index = 0

    def get_device(self):
        return self.index


def test_launches_go_to_the_tensors_device(monkeypatch):
    entered, current = [], [0]

    @contextlib.contextmanager
    def device(index):
        entered.append(index)
        before, current[0] = current[0], index
        yield
        current[0] = before

    monkeypatch.setattr(torch, "cuda", SimpleNamespace(current_device=lambda: current[0], device=device))
    seen = []
    run = operator.on_its_device(lambda *args: seen.append(current[0]))
    tensor = torch.zeros(1).as_subclass(OnGPU)
    for index in (0, 1):
        tensor.index = index
        run(None, tensor, torch.zeros(1))
    run(torch.zeros(1), tensor)  # the first tensor decides
    run(3, None)
    assert seen == [0, 1, 0, 0]
    assert entered == [1]
    assert current == [0]


def test_plain_is_plain():
    x = torch.zeros(2)
    assert is_plain((x, torch.nn.Parameter(x), None, 1, 2.0, "a", True, torch.float32))
    assert not is_plain((x, x.as_subclass(OnGPU)))
    with torch._subclasses.FakeTensorMode():
        assert not is_plain((x,))
    assert torch.func.vmap(lambda t: torch.tensor(is_plain((x, 1))) | (t > 0))(torch.zeros(2)).tolist() == [False] * 2
