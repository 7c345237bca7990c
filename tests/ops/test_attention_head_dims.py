"""Every class of head dimension, through the kernels where they run: none may quietly be PyTorch's."""

import warnings

import pytest
import torch
import torch.nn.functional as F

from fastformer.ops import attention_varlen, scaled_dot_product_attention
from fastformer.ops.attention import kernel

DIMS = [8, 24, 40, 64, 80, 96, 128, 160, 192, 256]


def draw(device, *shape):
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator) * 0.7).half().to(device)


def errors(results, references):
    """Largest distance of each result from its reference."""
    return [(a.double() - b.double()).abs().max().item() for a, b in zip(results, references, strict=True)]


def gradients(function, tensors, weight, dtype):
    leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, weight.to(dtype))]


def hold(ours, stock, tensors, weight):
    """Error against fp64 at most twice that of PyTorch in fp16, plus an ulp of the size."""
    exact = gradients(stock, tensors, weight, torch.float64)
    theirs = errors(gradients(stock, tensors, weight, torch.float16), exact)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mine = errors(gradients(ours, tensors, weight, torch.float16), exact)
    for name, a, b, reference in zip(("out", "dq", "dk", "dv"), mine, theirs, exact, strict=True):
        assert a <= 2 * b + 2e-3 * reference.abs().max().item(), f"{name}: error {a}, PyTorch's {b}"


@pytest.mark.parametrize("dim", [*DIMS, 512])
@pytest.mark.parametrize("causal", [True, False])
def test_dense(dim, causal, device):
    q, k, v = draw(device, 1, 2, 19, dim), draw(device, 1, 1, 19, dim), draw(device, 1, 1, 19, dim) + 0.1
    kernel._warned.clear()

    def ours(q, k, v):
        return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

    def stock(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)

    hold(ours, stock, [q, k, v], draw(device, 1, 2, 19, dim))


@pytest.mark.parametrize("dim", DIMS)
def test_padded_keys_and_rows_without_any(dim, device):
    tensors = [draw(device, 3, 1, 18, dim) + 0.01 * i for i in range(3)]
    mask = (torch.arange(18) < torch.tensor([18, 7, 0])[:, None])[:, None, None, :].to(device)
    kernel._warned.clear()

    def ours(q, k, v):
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def stock(q, k, v):
        # PyTorch's answer for a sequence without keys depends on its backend: zero is ours.
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.logical_or(~mask.any(-1, keepdim=True))) * (
            mask.any(-1, keepdim=True)
        )

    hold(ours, stock, tensors, draw(device, 3, 1, 18, dim))
    out = gradients(ours, tensors, draw(device, 3, 1, 18, dim), torch.float16)
    assert all(torch.all(t[2] == 0) for t in out)


@pytest.mark.parametrize("dim", DIMS)
def test_packed(dim, device):
    lengths = [1, 0, 17, 5]
    bounds = torch.tensor([0, 1, 1, 18, 23], dtype=torch.int32, device=device)
    tensors = [draw(device, 23, 2, dim) + 0.01 * i for i in range(3)]
    kernel._warned.clear()

    def ours(q, k, v):
        return attention_varlen(q, k, v, bounds, bounds, 17, 17)

    def stock(q, k, v):
        parts = [[t.transpose(0, 1)[None] for t in x.split(lengths)] for x in (q, k, v)]
        outs = [F.scaled_dot_product_attention(*part) for part in zip(*parts, strict=True) if part[0].shape[2]]
        return torch.cat([o[0].transpose(0, 1) for o in outs])

    hold(ours, stock, tensors, draw(device, 23, 2, dim))
