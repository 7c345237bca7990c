"""LayerNorm, RMSNorm and their residual forms."""

import random
import warnings

import pytest
import torch
import torch.nn.functional as F
from checking import compare, fenced

from fastformer.ops import norm, norm_operator, operator
from fastformer.ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from fastformer.ops.random import philox_keep

SEED = 0x1234_5678_9ABC


def seed_tensor(device, value=SEED):
    return torch.tensor([value], dtype=torch.int64, device=device)


def random_case(number, device, dtypes):
    """Function and tensors of one random choice of every option."""
    pick = random.Random(number)
    generator = torch.Generator().manual_seed(number)
    n = pick.choice([1, 3, 16, 17, 64, 100, 257, 768])
    lead = pick.choice([(), (1,), (5,), (2, 3), (33,), (0,), (2, 0, 3)])
    dtype = pick.choice(dtypes)
    wide = pick.choice([dtype, torch.float32])

    def rows(kind):
        return fenced((*lead, n), kind, generator, device, pick.choice([0, 0, 5]), pick.choice([0.1, 1.0, 30.0]))

    rms, add = pick.random() < 0.5, pick.random() < 0.7
    if rms:
        n = max(n, 2)  # of width 1 see test_rms_norm_of_width_one
    tensors = {"input": rows(dtype)}
    if pick.random() < 0.8:
        tensors["weight"] = fenced((n,), wide, generator, device)
        if not rms and pick.random() < 0.7:
            tensors["bias"] = fenced((n,), wide, generator, device)
    options = {"eps": pick.choice([1e-5, 1e-12])}
    if rms:
        options["offset"] = pick.choice([0.0, 1.0])
    if add:
        tensors["residual"] = rows(wide)
        if pick.random() < 0.6:
            options |= {"dropout_p": pick.choice([0.1, 0.5, 1.0]), "dropout_seed": seed_tensor(device, number * 977)}
        if lead and pick.random() < 0.3:
            options["row_scale"] = torch.randint(0, 3, lead, generator=generator).to(device, torch.float32)
        options["return_residual"] = pick.random() < 0.5
    call = {(False, False): layer_norm, (True, False): rms_norm, (False, True): add_layer_norm}.get(
        (rms, add), add_rms_norm
    )
    return (lambda **leaves: call(**leaves, **options)), tensors


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


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("n", [64, 150])
def test_walked_rows(rms, p, n, device, monkeypatch, poisoned):
    """Rows wider than a program holds; the limits are lowered so that small ones are."""
    limits = {"": ("FORWARD_TILE_COLUMNS",), "_backward": ("TILE_COLUMNS", "DROPOUT_TILE_COLUMNS")}
    derived = {"": "_forward_of", "_backward": "_backward_of"}
    monkeypatch.setattr(norm, "_kinds", operator.Kinds())
    for part, names in limits.items():
        kernels = pytest.importorskip(f"fastformer.kernels.norm{part}")
        for limit in names:
            monkeypatch.setattr(kernels, limit, 16)
        monkeypatch.setattr(kernels, "LOOP_COLUMNS", 64)
        # What was derived from other limits is not to be used here, nor what is from these anywhere else.
        monkeypatch.setattr(kernels, derived[part], getattr(kernels, derived[part]).__wrapped__)
    generator = torch.Generator().manual_seed(n)
    tensors = {
        "input": fenced((9, n), torch.float16, generator, device, 3),
        "residual": fenced((9, n), torch.float32, generator, device),
        "weight": fenced((n,), torch.float32, generator, device),
    }
    call = add_rms_norm if rms else add_layer_norm
    if not rms:
        tensors["bias"] = fenced((n,), torch.float32, generator, device)
    options = {"dropout_p": p, "dropout_seed": seed_tensor(device), "return_residual": True}
    compare(lambda **leaves: call(**leaves, **options), tensors, monkeypatch)


def test_variance_far_from_zero_mean(device, monkeypatch):
    """Statistics do not cancel: a mean of 1000 with deviations of 1."""
    tensors = {"input": 1000 + torch.randn(4, 300, generator=torch.Generator().manual_seed(0)).to(device)}
    compare(lambda **leaves: layer_norm(**leaves), tensors, monkeypatch)


def test_torch_backend_is_stock_bit_for_bit(monkeypatch):
    monkeypatch.setenv("FASTFORMER_BACKEND", "torch")
    x, r, w, b = torch.randn(4, 7, 64), torch.randn(4, 7, 64), torch.randn(64), torch.randn(64)
    torch.manual_seed(1)
    ours = add_layer_norm(x, r, w, b, 1e-12, 0.1)
    torch.manual_seed(1)
    assert torch.equal(ours, F.layer_norm(F.dropout(x, 0.1) + r, (64,), w, b, 1e-12))
    assert torch.equal(layer_norm(x, w, b), F.layer_norm(x, (64,), w, b))
    assert torch.equal(rms_norm(x, w), F.rms_norm(x, (64,), w))
    assert torch.equal(add_rms_norm(x, r, w, 1e-6, offset=1.0), F.rms_norm(x + r, (64,), w + 1.0, 1e-6))


def test_dropout_mask_is_the_reference(device):
    x = torch.ones(6, 37, device=device)
    _, total = add_layer_norm(
        x, torch.zeros_like(x), dropout_p=0.4, return_residual=True, dropout_seed=seed_tensor(device)
    )
    rows, columns = torch.arange(6)[:, None], torch.arange(37)
    keep = philox_keep(SEED, columns, rows, torch.zeros(1), 0.4, draws=4)
    assert torch.equal(total.cpu() != 0, keep)
    torch.testing.assert_close(total[keep.to(device)], torch.full((int(keep.sum()),), 1 / 0.6, device=device))


def test_dropout_rate_and_fresh_seeds(device):
    x = torch.ones(64, 256, device=device)
    torch.manual_seed(3)
    masks = [add_rms_norm(x, torch.zeros_like(x), dropout_p=0.25, return_residual=True)[1] != 0 for _ in range(2)]
    assert not torch.equal(*masks)
    assert 0.73 < masks[0].double().mean().item() < 0.77
    torch.manual_seed(3)
    again = add_rms_norm(x, torch.zeros_like(x), dropout_p=0.25, return_residual=True)[1] != 0
    assert torch.equal(masks[0], again)


def test_no_dropout_in_evaluation(device):
    x, r = torch.randn(3, 20, device=device), torch.randn(3, 20, device=device)
    assert torch.equal(add_layer_norm(x, r, dropout_p=0.5, training=False), add_layer_norm(x, r))


def test_repeats_bit_for_bit(device):
    x, r = torch.randn(200, 96, device=device), torch.randn(200, 96, device=device)
    w = torch.randn(96, device=device, requires_grad=True)

    def run():
        y = add_layer_norm(x, r, w, dropout_p=0.2, dropout_seed=seed_tensor(device))
        return y, *torch.autograd.grad(y.square().sum(), w)

    assert all(map(torch.equal, run(), run()))


def test_output_does_not_depend_on_gradients(device):
    x, r = (torch.randn(5, 48, device=device).half() for _ in range(2))
    with torch.no_grad():
        plain = add_layer_norm(x, r)
    assert torch.equal(plain, add_layer_norm(x.requires_grad_(), r))


def test_leaves_own_their_gradients(device):
    x, r = (torch.randn(5, 48, device=device, requires_grad=True) for _ in range(2))
    add_layer_norm(x, r).square().sum().backward()
    assert x.grad.data_ptr() != r.grad.data_ptr()
    assert torch.equal(x.grad, r.grad)


@pytest.mark.parametrize("frozen", ["input", "residual", "weight", "bias"])
def test_partly_frozen(frozen, device):
    leaves = {k: torch.randn(4, 33, device=device) for k in ("input", "residual")}
    leaves |= {k: torch.randn(33, device=device) for k in ("weight", "bias")}
    whole = {k: v.clone().requires_grad_() for k, v in leaves.items()}
    part = {k: v.clone().requires_grad_(k != frozen) for k, v in leaves.items()}
    for call in (whole, part):
        add_layer_norm(**call).sin().sum().backward()
    assert part[frozen].grad is None
    for k in leaves.keys() - {frozen}:
        assert torch.equal(part[k].grad, whole[k].grad)


def test_gradient_through_the_residual_alone(device):
    x, r = (torch.randn(4, 33, device=device, requires_grad=True) for _ in range(2))
    add_layer_norm(x, r, return_residual=True)[1].backward(torch.full((4, 33), 2.0, device=device))
    assert torch.equal(x.grad, torch.full_like(x, 2.0))
    assert torch.equal(r.grad, torch.full_like(x, 2.0))


def test_residual_stream_dtypes(device):
    x, r = torch.randn(4, 32, device=device).half(), torch.randn(4, 32, device=device).half()
    normed, total = add_rms_norm(x, r, return_residual=True, residual_dtype=torch.float32, out_dtype=torch.float16)
    assert (normed.dtype, total.dtype) == (torch.float16, torch.float32)
    assert torch.equal(total, x.float() + r.float()) or torch.equal(total, (x + r).float())
    assert add_layer_norm(x, total).dtype == torch.float32


def test_autocast_norms_in_float32(device, interpreting):
    if device.type == "cpu" and not interpreting:
        pytest.skip("CPU autocast leaves layer_norm's dtype alone, and so does its backend here")
    x = torch.randn(4, 32, device=device).half()
    dtype = torch.float16 if device.type == "cuda" else torch.bfloat16
    with torch.autocast(device.type, dtype=dtype):
        assert layer_norm(x, torch.ones(32, device=device)).dtype == torch.float32
        assert add_layer_norm(x, torch.randn(4, 32, device=device)).dtype == torch.float32
    assert layer_norm(x, torch.ones(32, device=device)).dtype == torch.float16


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0,)])
def test_empty(shape, device):
    x = torch.randn(shape, device=device, requires_grad=True)
    w = torch.randn(shape[-1], device=device, requires_grad=True)
    layer_norm(x, w).sum().backward()
    assert x.grad.shape == x.shape
    assert torch.equal(w.grad, torch.zeros_like(w))


def test_bad_arguments(device):
    x, w = torch.randn(3, 8, device=device), torch.randn(8, device=device)
    with pytest.raises(TypeError, match="input must be a tensor, got list"):
        layer_norm([1.0])
    with pytest.raises(TypeError, match="input must be one of"):
        layer_norm(x.long())
    with pytest.raises(ValueError, match=r"weight must have shape \(8\), got \(7,\)"):
        layer_norm(x, w[:7])
    with pytest.raises(ValueError, match=r"residual must have shape \(3, 8\), got \(2, 8\)"):
        add_layer_norm(x, x[:2])
    with pytest.raises(ValueError, match=r"dropout_p must be between 0 and 1, got 1\.5"):
        add_layer_norm(x, x, dropout_p=1.5)
    with pytest.raises(TypeError, match="dropout_p must be a number, got str"):
        add_layer_norm(x, x, dropout_p="0.1")
    with pytest.raises(TypeError, match="eps must be a number, got str"):
        layer_norm(x, eps="1e-5")
    with pytest.raises(TypeError, match="offset must be a number, got str"):
        rms_norm(x, offset="1")
    with pytest.raises(TypeError, match="dropout_seed must be one of int64"):
        add_layer_norm(x, x, dropout_p=0.1, dropout_seed=torch.zeros(1, device=device))
    with pytest.raises(ValueError, match=r"row_scale must have shape \(3\)"):
        add_layer_norm(x, x, row_scale=torch.ones(2, device=device))
    with pytest.raises(ValueError, match="row_scale takes no gradient"):
        add_layer_norm(x, x, row_scale=torch.ones(3, device=device, requires_grad=True))
    with pytest.raises(ValueError, match="at least one dimension"):
        layer_norm(torch.tensor(1.0, device=device))
    with pytest.raises(ValueError, match="bias must be on"):
        layer_norm(x, w, torch.randn(8, device="meta"))


def test_full_route(device, interpreting, monkeypatch):
    """opcheck of the registered operators, and both routes give the same bits."""
    if not interpreting and device.type == "cpu":
        pytest.skip("the CPU backend registers no operator")
    x, r = torch.randn(3, 40, device=device, requires_grad=True), torch.randn(3, 40, device=device)
    w, b = (torch.randn(40, device=device, requires_grad=True) for _ in range(2))
    seed = seed_tensor(device)
    args = (x, r, w, b, None, seed, 0.2, 1e-5, 0.0, False, torch.float32, torch.float32)
    torch.library.opcheck(norm_operator.norm_op.op, (x, None, w, b, *args[4:]))
    torch.library.opcheck(norm_operator.add_norm_op.op, args)
    total, stats = (t.detach() for t in norm_operator.add_norm_op.op(*args)[1:])
    wanted = (torch.float32,) * 4
    arguments = (
        torch.randn(3, 40, device=device),
        None,
        total,
        stats,
        w.detach(),
        None,
        seed,
        0.2,
        0.0,
        False,
        *wanted,
    )
    torch.library.opcheck(norm_operator.norm_backward.op, arguments)

    def step(y):
        return y, *torch.autograd.grad(y.sin().sum(), (x, w, b))

    light, full = step(norm_operator.add_norm_op(*args)[0]), step(norm_operator.add_norm_op.op(*args)[0])
    assert all(map(torch.equal, light, full))


def test_compile(device):
    x, r = (torch.randn(3, 40, device=device, requires_grad=True) for _ in range(2))
    w = torch.randn(40, device=device, requires_grad=True)

    def layer(x, r):
        return add_layer_norm(x, r, w, dropout_p=0.2, dropout_seed=seed).sin().sum()

    seed = seed_tensor(device)
    eager = torch.autograd.grad(layer(x, r), (x, r, w))
    compiled = torch.autograd.grad(torch.compile(layer, backend="aot_eager", fullgraph=True)(x, r), (x, r, w))
    for a, c in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, c, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rms_norm_without_eps_is_stocks(dtype, device, interpreting):
    if interpreting and dtype == torch.bfloat16:
        pytest.skip("the interpreter's bf16 rounds wrongly")
    x = (0.01 * torch.randn(5, 24, device=device)).to(dtype)
    torch.testing.assert_close(rms_norm(x), F.rms_norm(x, (24,)))


def test_rms_norm_of_width_one(device):
    """Its gradient, dy * rstd * (1 - z_hat^2), is what eps leaves of two equal terms: their rounding is the measure."""
    x = torch.tensor([[0.5], [-3.0], [1e-3], [0.0]], device=device, requires_grad=True)
    exact = x.detach().double().requires_grad_()
    (ours,) = torch.autograd.grad(rms_norm(x, eps=1e-5).sum(), x)
    (theirs,) = torch.autograd.grad(F.rms_norm(exact, (1,), eps=1e-5).sum(), exact)
    rstd = torch.rsqrt(exact.detach().square() + 1e-5)
    assert ((ours.double() - theirs).abs() <= 4 * torch.finfo(torch.float32).eps * rstd).all()


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("add", [False, True])
def test_second_derivative(rms, add, device):
    """A gradient penalty, against stock in float64."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(4, 9)] + [(4, 9)] * add + [(9,)] + [(9,)] * (not rms)
    leaves = [torch.randn(s, generator=generator).to(device) for s in shapes]
    sent = torch.randn(4, 9, generator=generator).to(device)

    def penalty(call, leaves, sent):
        leaves = [t.clone().requires_grad_() for t in leaves]
        first = torch.autograd.grad(call(*leaves), leaves, sent, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves, allow_unused=True)

    ours = {(0, 0): layer_norm, (0, 1): add_layer_norm, (1, 0): rms_norm, (1, 1): add_rms_norm}[rms, add]

    def call(*tensors):
        return ours(*tensors, eps=1e-5)

    def stock(x, *rest):
        if add:
            x, rest = x + rest[0], rest[1:]
        return F.rms_norm(x, (9,), *rest, eps=1e-5) if rms else F.layer_norm(x, (9,), *rest)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = penalty(call, leaves, sent)
    for a, b in zip(found, penalty(stock, [t.double() for t in leaves], sent.double()), strict=True):
        if b is None:  # the bias: the first derivative does not depend on it
            assert a is None or (a == 0).all()
        else:
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


def test_autocast_does_not_know_meta():
    x = torch.empty(3, 8, device="meta")
    assert layer_norm(x, torch.empty(8, device="meta")).shape == (3, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert add_layer_norm(x, x).device.type == "meta"


def test_dtypes_that_are_no_floats_are_refused(device):
    x = torch.randn(2, 8, device=device)
    with pytest.raises(TypeError, match="residual_dtype must be a floating-point dtype"):
        add_layer_norm(x, x, residual_dtype=torch.int32)
