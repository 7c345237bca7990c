"""A stock module and ours with the same parameters, and what it means that they agree."""

import torch

# A few matrix products against the same in another order. A norm over few features that are nearly equal multiplies the
# error of a float32 gradient by up to 1 / sqrt(eps) = 316.
FORWARD = {torch.float32: {"rtol": 1e-5, "atol": 2e-5}, torch.float64: {"rtol": 1e-10, "atol": 1e-11}}
BACKWARD = {torch.float32: {"rtol": 1e-3, "atol": 3e-4}, torch.float64: {"rtol": 1e-8, "atol": 1e-9}}


def pair(stock_class, ours_class, *args, seed=0, **kwargs):
    """Both built from the same seed, which must give the same parameters, then moved off their round numbers."""
    torch.manual_seed(seed)
    stock = stock_class(*args, **kwargs)
    torch.manual_seed(seed)
    ours = ours_class(*args, **kwargs)
    for (name, p), (other, q) in zip(stock.state_dict().items(), ours.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(p, q), f"{name} is initialised differently"
    shake(stock)
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def shake(module, size=0.05):
    """Fresh norms and biases are ones and zeros, under which many mistakes cancel."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p) * size)


# What fp32 may miss beside twice stock's own error, which can be small by luck: ulps of the largest value.
ULPS = 4


def assert_same(stock, ours, inputs, call, seen=None, exact=None):
    """Outputs and every gradient of `call(module, *inputs)`.

    Args:
        call: returns one tensor.
        seen: bool mask over the output: what is compared, and where a gradient comes from; None for everything.
        exact: (stock module, inputs, call) in fp64. With it, ours may be twice as far from the fp64 result as stock is,
            and ULPS.
    """
    leaves = [[t.detach().clone().requires_grad_() for t in inputs] for _ in range(2)]
    a, b = call(stock, *leaves[0]), call(ours, *leaves[1])
    if seen is not None:
        assert a.shape == b.shape
        a, b = a[seen], b[seen]
    if not torch.isfinite(a).all():
        # A row that may attend to nothing: stock has NaN, and gradients that are NaN everywhere.
        known = torch.isfinite(a)
        torch.testing.assert_close(b[known], a[known], **FORWARD[a.dtype])
        return
    grad = torch.randn_like(a)
    parameters = [list(m.parameters()) for m in (stock, ours)]
    grads = [
        torch.autograd.grad(out, [*xs, *ps], grad, allow_unused=True)
        for out, xs, ps in zip((a, b), leaves, parameters, strict=True)
    ]
    if exact is not None:
        _assert_as_exact((a, grads[0]), (b, grads[1]), grad, seen, *exact)
        return
    torch.testing.assert_close(b, a, **FORWARD[a.dtype])
    for x, y in zip(*grads, strict=True):
        if x is None or y is None:
            assert x is None or not x.any()
            assert y is None or not y.any()
        else:
            torch.testing.assert_close(y, x, **BACKWARD[a.dtype])


def _assert_as_exact(stock, ours, grad, seen, module, inputs, call):
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    out = call(module, *leaves)
    out = out if seen is None else out[seen]
    grads = torch.autograd.grad(out, [*leaves, *module.parameters()], grad.double(), allow_unused=True)
    largest = max((g.abs().max().item() for g in grads if g is not None and g.numel()), default=0.0)
    pairs = [("output", out, stock[0], ours[0], out.abs().max().item() if out.numel() else 0.0)]
    pairs += [(f"gradient {i}", *three, largest) for i, three in enumerate(zip(grads, stock[1], ours[1], strict=True))]
    for name, truth, measure, got, scale in pairs:
        if truth is None or got is None:
            assert truth is None or not truth.any(), name
            assert got is None or not got.any(), name
            continue
        if not truth.numel():
            continue
        error, allowed = ((t.double() - truth).abs().max().item() for t in (got, measure))
        allowed = 2 * allowed + ULPS * torch.finfo(got.dtype).eps * scale
        assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}"
