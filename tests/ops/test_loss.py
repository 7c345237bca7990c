"""Cross-entropy and linear_cross_entropy."""

import random
import warnings

import pytest
import torch
import torch.nn.functional as F
from checking import compare, fenced

from fastformer.ops import linear_loss, loss, loss_rows, operator
from fastformer.ops.linear_loss import linear_cross_entropy
from fastformer.ops.loss import cross_entropy


def random_options(pick, classes, lead, generator, device):
    """Target and options of either loss."""
    target = torch.randint(0, classes, lead, generator=generator)
    ignore = pick.choice([-100, 0])
    if pick.random() < 0.5 and target.numel() > 1:
        target.flatten()[:: pick.choice([2, 3])] = ignore
    if target.numel():
        target.flatten()[-1] = classes - 1
    options = {
        "ignore_index": ignore,
        "reduction": pick.choice(["mean", "sum", "none"]),
        "label_smoothing": pick.choice([0.0, 0.0, 0.1, 1.0]),
        "z_loss": pick.choice([0.0, 0.0, 1e-2]),
        "softcap": pick.choice([None, None, 5.0]),
    }
    weights = torch.rand(classes, generator=generator).to(device) if pick.random() < 0.4 else None
    return target.to(device), options, weights


def random_case(number, device, dtypes):
    pick = random.Random(number)
    generator = torch.Generator().manual_seed(number)
    classes = pick.choice([2, 3, 16, 33, 100, 515])
    lead = pick.choice([(1,), (5,), (2, 3), (17,)])
    target, options, weights = random_options(pick, classes, lead, generator, device)
    scale, slack = pick.choice([1.0, 8.0]), pick.choice([0, 5])
    logits = fenced((*lead, classes), pick.choice(dtypes), generator, device, slack, scale)
    return (lambda logits: cross_entropy(logits, target, weights, **options)), {"logits": logits}


@pytest.mark.parametrize("number", range(40))
def test_fuzz(number, device, interpreting, monkeypatch, poisoned):
    dtypes = [torch.float32, torch.float16] + ([] if interpreting else [torch.bfloat16])
    compare(*random_case(number, device, dtypes), monkeypatch, number)


def random_linear_case(number, device, dtypes):
    pick = random.Random(number)
    generator = torch.Generator().manual_seed(number)
    classes, width = pick.choice([2, 33, 100]), pick.choice([8, 24])
    lead = pick.choice([(1,), (5,), (2, 3), (40,)])
    target, options, weights = random_options(pick, classes, lead, generator, device)
    dtype = pick.choice(dtypes)
    tensors = {
        "input": fenced((*lead, width), dtype, generator, device),
        "weight": fenced((classes, width), dtype, generator, device, scale=0.2),
    }
    if pick.random() < 0.5:
        tensors["bias"] = fenced((classes,), dtype, generator, device)

    def call(input, weight, bias=None):
        return linear_cross_entropy(input, weight, target, bias, weights, **options)

    def stock(input, weight, bias=None):
        return cross_entropy(F.linear(input, weight, bias), target, weights, **options)

    return call, stock, tensors


@pytest.mark.parametrize("number", range(30))
def test_linear_fuzz(number, device, interpreting, monkeypatch, poisoned):
    """Blocks of few rows, so that gradients are summed over several."""
    monkeypatch.setattr(linear_loss, "BLOCK_BYTES", 2000)
    dtypes = [torch.float32, torch.float16] + ([] if interpreting else [torch.bfloat16])
    call, stock, tensors = random_linear_case(number, device, dtypes)
    compare(call, tensors, monkeypatch, number, stock=stock)


@pytest.mark.slow
@pytest.mark.parametrize("batch", range(1, 11))
def test_fuzz_long(batch, device, interpreting, monkeypatch, poisoned):
    monkeypatch.setattr(linear_loss, "BLOCK_BYTES", 2000)
    dtypes = [torch.float32, torch.float16] + ([] if interpreting else [torch.bfloat16])
    for number in range(batch * 1000, batch * 1000 + 30):
        compare(*random_case(number, device, dtypes), monkeypatch, number)
        call, stock, tensors = random_linear_case(number, device, dtypes)
        compare(call, tensors, monkeypatch, number, stock=stock)


def test_several_column_blocks(device, monkeypatch):
    kernels = pytest.importorskip("fastformer.kernels.loss")
    monkeypatch.setattr(kernels, "BLOCK_COLUMNS", 32)
    # What was derived with wider blocks is not to be used here, nor what is with these anywhere else.
    monkeypatch.setattr(loss, "_kinds", operator.Kinds())
    for derived in ("_forward_of", "_backward_of"):
        monkeypatch.setattr(kernels, derived, getattr(kernels, derived).__wrapped__)
    generator = torch.Generator().manual_seed(0)
    target, weights = torch.tensor([0, 99, 31, -100], device=device), torch.rand(100, generator=generator).to(device)
    tensors = {"logits": fenced((4, 100), torch.float32, generator, device)}
    compare(lambda logits: cross_entropy(logits, target, weights, label_smoothing=0.1), tensors, monkeypatch)


def test_torch_backend_is_stock_bit_for_bit(monkeypatch):
    monkeypatch.setenv("FASTFORMER_BACKEND", "torch")
    x, t = torch.randn(6, 11), torch.tensor([1, 2, -100, 4, 10, 0])
    assert torch.equal(cross_entropy(x, t), F.cross_entropy(x, t))
    assert torch.equal(cross_entropy(x, t, label_smoothing=0.1), F.cross_entropy(x, t, label_smoothing=0.1))


def test_masked_classes(device):
    """Logits of -inf (also a whole first block of them) are classes that cannot be."""
    x = torch.randn(3, 70, device=device)
    x[:, :40] = float("-inf")
    x.requires_grad_()
    target = torch.tensor([41, 69, 50], device=device)
    value = cross_entropy(x, target)
    value.backward()
    torch.testing.assert_close(value, F.cross_entropy(x[:, 40:], target - 40))
    assert (x.grad[:, :40] == 0).all()
    assert x.grad.isfinite().all()


def test_ignored_rows_may_hold_anything(device, interpreting):
    if device.type == "cpu" and not interpreting:
        pytest.skip("stock lets the NaN through")
    x = torch.randn(3, 20, device=device)
    x[1] = float("nan")
    x.requires_grad_()
    target = torch.tensor([3, -100, 4], device=device)
    value = cross_entropy(x, target, reduction="sum")
    value.backward()
    assert value.isfinite()
    assert (x.grad[1] == 0).all()


def test_all_ignored_is_nan_as_stock(device):
    x, target = torch.randn(3, 20, device=device), torch.full((3,), -100, device=device)
    assert cross_entropy(x, target).isnan()
    assert cross_entropy(x, target, reduction="sum") == 0


def test_target_out_of_range_is_never_a_number(device, interpreting):
    x, target = torch.randn(2, 20, device=device), torch.tensor([3, 20], device=device)
    if device.type == "cpu" and not interpreting:
        with pytest.raises(IndexError):
            cross_entropy(x, target)
    else:
        assert cross_entropy(x, target).isnan()


def test_linear_scales_with_the_gradient_sent(device, monkeypatch):
    monkeypatch.setattr(linear_loss, "BLOCK_BYTES", 1000)
    x, w = torch.randn(30, 8, device=device, requires_grad=True), torch.randn(20, 8, device=device, requires_grad=True)
    target = torch.randint(0, 20, (30,), device=device)
    one = torch.autograd.grad(linear_cross_entropy(x, w, target), (x, w))
    three = torch.autograd.grad(3 * linear_cross_entropy(x, w, target), (x, w))
    for a, b in zip(one, three, strict=True):
        torch.testing.assert_close(3 * a, b)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_linear_without_rows(reduction, device):
    x, w = (
        torch.randn(2, 0, 8, device=device, requires_grad=True),
        torch.randn(20, 8, device=device, requires_grad=True),
    )
    loss = linear_cross_entropy(x, w, torch.zeros(2, 0, dtype=torch.int64, device=device), reduction=reduction)
    assert loss.shape == ((2, 0) if reduction == "none" else ())
    assert bool(loss.isnan().all()) == (reduction != "sum")
    loss.sum().backward()
    assert x.grad.shape == x.shape
    assert not w.grad.any()


def test_without_classes(device):
    none = torch.zeros(3, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match=r"logits must have at least one class, got shape \(3, 0\)"):
        cross_entropy(torch.randn(3, 0, device=device), none)
    with pytest.raises(ValueError, match=r"weight must have at least one row, a class, got shape \(0, 8\)"):
        linear_cross_entropy(torch.randn(3, 8, device=device), torch.randn(0, 8, device=device), none)


def test_linear_frozen_head(device):
    x, w = torch.randn(9, 8, device=device, requires_grad=True), torch.randn(20, 8, device=device)
    target = torch.randint(0, 20, (9,), device=device)
    linear_cross_entropy(x, w, target).backward()
    expected = x.detach().requires_grad_()
    F.cross_entropy(F.linear(expected, w), target).backward()
    torch.testing.assert_close(x.grad, expected.grad)


def test_linear_never_holds_all_logits(device, monkeypatch):
    """The largest tensor made on the way is a block, not (rows, classes)."""
    monkeypatch.setattr(linear_loss, "BLOCK_BYTES", 16 * 1000 * 4)
    x, w = torch.randn(320, 4, device=device, requires_grad=True), torch.randn(1000, 4, device=device)
    target = torch.randint(0, 1000, (320,), device=device)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else [out]:
                if isinstance(t, torch.Tensor):
                    largest = max(largest, t.numel())
            return out

    with Watch():
        linear_cross_entropy(x, w, target).backward()
    assert 0 < largest <= 16 * 1000


def test_linear_makes_gradients_over_logits(device, interpreting):
    """One block: its logits, and little beside them; PyTorch's own operators hold three times as much."""
    if device.type != "cpu" or interpreting:
        pytest.skip("counts PyTorch's own allocations on the CPU")
    peak_bytes = pytest.importorskip("bench.operators").peak_bytes
    x, w = torch.randn(64, 4, requires_grad=True), torch.randn(8192, 4, requires_grad=True)
    target = torch.randint(0, 8192, (64,))
    logits = 64 * 8192 * 4
    ours, stock = (
        peak_bytes(lambda loss=loss: loss().backward())
        for loss in (lambda: linear_cross_entropy(x, w, target), lambda: F.cross_entropy(F.linear(x, w), target))
    )
    assert logits <= ours < 1.5 * logits < stock


def test_autocast(device, interpreting):
    x, w = torch.randn(9, 8, device=device), torch.randn(20, 8, device=device)
    target = torch.randint(0, 20, (9,), device=device)
    dtype = torch.float16 if interpreting or device.type == "cuda" else torch.bfloat16
    with torch.autocast(device.type, dtype=dtype):
        value = linear_cross_entropy(x, w, target)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, F.cross_entropy(F.linear(x, w), target), rtol=2e-2, atol=2e-2)


def test_empty(device):
    x = torch.randn(0, 8, device=device, requires_grad=True)
    target = torch.zeros(0, dtype=torch.int64, device=device)
    assert cross_entropy(x, target, reduction="sum") == 0
    assert cross_entropy(x, target, reduction="none").shape == (0,)
    assert linear_cross_entropy(x, torch.randn(5, 8, device=device), target, reduction="none").shape == (0,)


def test_bad_arguments(device):
    x, t = torch.randn(3, 8, device=device), torch.zeros(3, dtype=torch.int64, device=device)
    with pytest.raises(TypeError, match="target must be one of int64, got float32"):
        cross_entropy(x, t.float())
    with pytest.raises(ValueError, match=r"target must have shape \(3\)"):
        cross_entropy(x, t[:2])
    with pytest.raises(ValueError, match="reduction must be one of mean, sum, none, got 'avg'"):
        cross_entropy(x, t, reduction="avg")
    with pytest.raises(ValueError, match="label_smoothing must be between 0 and 1"):
        cross_entropy(x, t, label_smoothing=2.0)
    with pytest.raises(ValueError, match="softcap must be positive"):
        cross_entropy(x, t, softcap=0.0)
    with pytest.raises(TypeError, match="softcap must be a number, got str"):
        cross_entropy(x, t, softcap="30")
    with pytest.raises(TypeError, match="ignore_index must be an integer, got float"):
        cross_entropy(x, t, ignore_index=0.5)
    with pytest.raises(ValueError, match="z_loss must be at least 0, got -1"):
        cross_entropy(x, t, z_loss=-1.0)
    with pytest.raises(ValueError, match=r"weight must have shape \(8\)"):
        cross_entropy(x, t, torch.ones(3, device=device))
    with pytest.raises(ValueError, match=r"weight must have shape \(any, 8\)"):
        linear_cross_entropy(x, torch.ones(5, 7, device=device), t)
    with pytest.raises(TypeError, match="weight and bias must be"):
        linear_cross_entropy(x, torch.ones(5, 8, device=device).half(), t)


def test_second_derivative(device, interpreting):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(5, 9, generator=generator).to(device)
    target = torch.tensor([1, 8, -100, 0, 3], device=device)

    def penalty(call, x):
        x = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(call(x), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    def ours(x):
        return cross_entropy(x, target, label_smoothing=0.1, z_loss=0.01)

    def stock(x):
        lse = x.logsumexp(-1)[target != -100]
        return F.cross_entropy(x, target, label_smoothing=0.1) + 0.01 * lse.square().mean()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = penalty(ours, x)
    torch.testing.assert_close(found.double(), penalty(stock, x.double()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_second_derivative_of_the_linear_loss(reduction, device):
    generator = torch.Generator().manual_seed(4)
    leaves = [torch.randn(shape, generator=generator).to(device) for shape in ((6, 4), (7, 4), (7,))]
    target = torch.tensor([1, 6, -100, 0, 3, 3], device=device)

    def penalty(call, leaves):
        leaves = [leaf.clone().requires_grad_() for leaf in leaves]
        first = torch.autograd.grad(call(*leaves), leaves, create_graph=True)
        return torch.autograd.grad(sum(f.square().sum() for f in first), leaves)

    def ours(x, weight, bias):
        return linear_cross_entropy(x, weight, target, bias, reduction=reduction, label_smoothing=0.1)

    def stock(x, weight, bias):
        return F.cross_entropy(F.linear(x, weight, bias), target, reduction=reduction, label_smoothing=0.1)

    operator.say_once.cache_clear()
    with pytest.warns(UserWarning, match="linear_cross_entropy: no kernel computes a second derivative"):
        found = penalty(ours, leaves)
    for mine, theirs in zip(found, penalty(stock, [leaf.double() for leaf in leaves]), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-5)


def test_full_route(device, interpreting):
    if not interpreting and device.type == "cpu":
        pytest.skip("the CPU backend registers no operator")
    x, t = torch.randn(3, 20, device=device, requires_grad=True), torch.tensor([1, -100, 3], device=device)
    torch.library.opcheck(loss_rows.rows_op.op, (x, t, None, -100, 0.1, 0.0, 0.0))
    for mean in (True, False):
        torch.library.opcheck(loss_rows.reduced_op.op, (x, t, None, -100, 0.1, 0.0, 0.0, mean, torch.float32))


def test_linear_full_route(device):
    x, w = (torch.randn(6, 8, device=device, requires_grad=True) for _ in range(2))
    t = torch.tensor([1, -100, 3, 2, 0, 5], device=device)
    args = (x, w, None, t, None, True, -100, 0.0, 0.0, 0.0, True, True, False)
    torch.library.opcheck(linear_loss._linear_op.op, args)


def test_compile(device):
    x, w = (torch.randn(6, 8, device=device, requires_grad=True) for _ in range(2))
    t = torch.tensor([1, -100, 3, 2, 0, 5], device=device)

    def step(x, w):
        return linear_cross_entropy(x, w, t) + cross_entropy(x, t, label_smoothing=0.1)

    eager = torch.autograd.grad(step(x, w), (x, w))
    compiled = torch.autograd.grad(torch.compile(step, backend="aot_eager", fullgraph=True)(x, w), (x, w))
    for a, c in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, c)


def test_fp16_gradients_survive_a_large_vocabulary(device, interpreting):
    """p / rows underflows in fp16, and the loss scale that should save it comes with backward only."""
    rows, classes = (64, 300) if interpreting else (512, 4096)
    torch.manual_seed(0)
    x, w = torch.randn(rows, 8, device=device), torch.randn(classes, 8, device=device) * 0.1
    target = torch.randint(0, classes, (rows,), device=device)
    scale = 2.0**14  # of a loss in fp16; larger ones overflow before they come here
    results = []
    for dtype in (torch.float64, torch.float16):
        leaves = [t.half().to(dtype).requires_grad_() for t in (x, w)]
        if dtype == torch.float64:
            loss = F.cross_entropy(leaves[0] @ leaves[1].t(), target)
        else:
            loss = linear_cross_entropy(*leaves, target)
        results.append(torch.autograd.grad(loss * scale, leaves))
    for exact, half in zip(*results, strict=True):
        assert (half.double() - exact).norm() < 3e-3 * exact.norm()
