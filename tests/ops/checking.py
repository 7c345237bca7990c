"""What operator tests share: the error rule, inputs that betray stray reads, a pass through one backend."""

import math

import torch
from torch import Tensor

from fastformer.ops.backend import backend_for


def fenced(shape, dtype, generator, device, stride_slack=0, scale=1.0) -> Tensor:
    """Random normal values inside a larger buffer of NaN: before, after and, with `stride_slack`, between the rows."""
    *lead, n = shape
    rows = math.prod(lead)
    values = torch.randn(rows, n, generator=generator).mul_(scale).to(device, dtype)
    buffer = torch.full((rows + 2, n + stride_slack), math.nan, dtype=dtype, device=device)
    inner = buffer[1:-1, :n]
    inner.copy_(values)
    strides = []
    step = n + stride_slack
    for size in reversed(lead):
        strides.insert(0, step)
        step *= max(size, 1)
    return inner.as_strided(shape, (*strides, 1))


def assert_as_exact_as_stock(
    ours: Tensor, stock: Tensor, exact: Tensor, name: str = "", is_stock: bool = False
) -> None:
    """Error against the float64 result at most twice the stock operator's plus two ulps, by the largest and by the root
    mean square.

    An ulp is that of the largest value, or of the root mean square. One is the rounding of the result; the second is
    for luck: some fp32 comparisons of few elements, whose stock error is small by chance, need more than one. A stock
    result that is not finite (16 bits overflow on the way) is no excuse, unless ours `is_stock`: PyTorch's own
    operators too. What the dtype cannot hold must be infinite.
    """
    assert ours.shape == exact.shape, f"{name}: shape {tuple(ours.shape)}, not {tuple(exact.shape)}"
    beyond = exact.abs() > torch.finfo(ours.dtype).max
    assert is_stock or ours[beyond].isinf().all(), f"{name}: a number where the dtype holds none"
    kept = ~beyond & stock.isfinite() if is_stock else ~beyond
    ours, stock, exact = ours[kept], stock[kept], exact[kept]
    if exact.numel() == 0:
        return
    assert ours.isfinite().all(), f"{name}: not finite"
    for kind, size in (("largest", _largest), ("root mean square", _root_mean_square)):
        limits = torch.finfo(ours.dtype)
        ulp = limits.eps * max(size(exact), limits.smallest_normal)
        theirs, error = size(stock.double() - exact), size(ours.double() - exact)
        allowed = 2 * (theirs if math.isfinite(theirs) else 0.0) + 2 * ulp
        assert error <= allowed, f"{name}: {kind} error {error:.3e}, allowed {allowed:.3e}"


def _largest(x: Tensor) -> float:
    return x.abs().max().item()


def _root_mean_square(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def gradients(function, tensors: dict[str, Tensor], cotangents) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs of `function(**leaves)` and the gradients of the leaves that have a floating dtype.

    `cotangents(outputs)` returns the gradients to send back.
    """
    leaves = {k: v.detach().requires_grad_(v.is_floating_point()) for k, v in tensors.items()}
    before = {k: v.detach().clone() for k, v in leaves.items()}
    outputs = function(**leaves)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    wanted = [k for k, v in leaves.items() if v.requires_grad]
    found = torch.autograd.grad(outputs, [leaves[k] for k in wanted], cotangents(outputs), allow_unused=True)
    for k, v in leaves.items():
        assert torch.equal(v.detach().nan_to_num(), before[k].nan_to_num()), f"{k} was modified"
    return [o.detach() for o in outputs], {k: g for k, g in zip(wanted, found, strict=True) if g is not None}


def compare(function, tensors: dict[str, Tensor], monkeypatch, seed: int = 0, stock=None) -> None:
    """Hold `function` and its gradients against float64, with the stock operators in the same dtypes as the measure.

    `stock` is the same in stock operators, where `function` on the PyTorch backend is not.
    """
    is_stock = stock is None and backend_for(next(iter(tensors.values())).device) == "torch"
    stock = stock or function
    generator = torch.Generator().manual_seed(seed)
    sent: list[Tensor] = []

    def cotangents(outputs):
        if not sent:
            sent.extend(torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in outputs)
        return [s.to(o.device, o.dtype) for s, o in zip(sent, outputs, strict=True)]

    ours, ours_grads = gradients(function, tensors, cotangents)
    # The cotangents as the outputs' dtype rounded them are what all three differentiate.
    sent = [s.to(o.dtype).double() for s, o in zip(sent, ours, strict=True)]
    wide = {k: v.double() if v.is_floating_point() else v for k, v in tensors.items()}
    exact, exact_grads = gradients(stock, wide, cotangents)
    with monkeypatch.context() as patch:
        patch.setenv("FASTFORMER_BACKEND", "torch")
        measure, stock_grads = gradients(stock, tensors, cotangents)
    for index, (a, b, c) in enumerate(zip(ours, measure, exact, strict=True)):
        assert a.dtype == b.dtype
        assert_as_exact_as_stock(a, b, c, f"output {index}", is_stock)
    assert ours_grads.keys() == exact_grads.keys()
    for k, g in ours_grads.items():
        assert g.dtype == tensors[k].dtype
        assert_as_exact_as_stock(g, stock_grads[k], exact_grads[k], f"gradient of {k}", is_stock)
