"""The operators as uniform functions of leaves, for tests that hold for all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import fastformer as ff


@dataclass(frozen=True)
class Subject:
    """An operator on fixed shapes.

    Attributes:
        ours: leaves → result; stock: the same through PyTorch's operators.
        shapes: of the leaves.
    """

    ours: Callable[..., Tensor]
    stock: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]

    def draw(self, device: torch.device, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(s, generator=generator).to(device, dtype).requires_grad_() for s in self.shapes]


def subjects(tiny: bool, device: torch.device) -> dict[str, Subject]:
    """By name; sizes of a few tiles and odd if `tiny`, of a real layer otherwise."""
    batch, heads, length, head_dim = (2, 2, 37, 16) if tiny else (4, 12, 413, 64)
    dense = ((batch, heads, length, head_dim),) * 3
    lengths = torch.tensor([0, 1, 16, 19] if tiny else [0, 1, 128, 413, 77, 512], dtype=torch.int32)
    bounds = torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0).int()]).to(device)
    total, longest, cuts = int(lengths.sum()), int(lengths.max()), lengths.tolist()
    rows, features = (19, 48) if tiny else (1031, 768)

    def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ff.ops.scaled_dot_product_attention(q, k, v, is_causal=True)

    def stock_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def varlen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ff.ops.attention_varlen(q, k, v, bounds, bounds, longest, longest)

    def stock_varlen(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(*(t.split(cuts) for t in (q, k, v)), strict=True)
        outs = [
            F.scaled_dot_product_attention(*(t.transpose(0, 1)[None] for t in part))[0].transpose(0, 1)
            for part in parts
            if part[0].shape[0]
        ]
        return torch.cat(outs)

    def norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ff.ops.add_layer_norm(x, residual, weight, bias)

    def stock_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x + residual, weight.shape, weight, bias)

    return {
        "attention": Subject(ff.ops.scaled_dot_product_attention, F.scaled_dot_product_attention, dense),
        "attention causal": Subject(causal, stock_causal, dense),
        "attention_varlen": Subject(varlen, stock_varlen, ((total, heads, head_dim),) * 3),
        "add_layer_norm": Subject(norm, stock_norm, ((rows, features), (rows, features), (features,), (features,))),
    }


NAMES = ("attention", "attention causal", "attention_varlen", "add_layer_norm")


def with_gradients(function: Callable[..., Tensor], leaves: list[Tensor], seed: int = 1) -> list[Tensor]:
    """[output, gradients of every leaf], the output's gradient drawn from `seed`."""
    out = function(*leaves)
    generator = torch.Generator().manual_seed(seed)
    gradient = torch.randn(out.shape, generator=generator).to(out.device, out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, gradient)]


def assert_no_worse(ours: list[Tensor], stock: list[Tensor], exact: list[Tensor]) -> None:
    """Every error against `exact` is at most twice stock's plus an ulp of the dtype at the results' largest scale.

    The scale is that of all results together: a gradient that cancels to zero still carries the others' rounding.
    """
    scale = max((e.double().abs().max().item() for e in exact if e.numel()), default=0.0)
    for position, (a, b, e) in enumerate(zip(ours, stock, exact, strict=True)):
        if not e.numel():
            continue
        mine, theirs = ((t.double() - e.double()).abs().max().item() for t in (a, b))
        allowed = 2 * theirs + torch.finfo(a.dtype).eps * scale
        assert mine <= allowed, f"result {position}: error {mine:.3e}, allowed {allowed:.3e}"
