"""GELU with bias, GeGLU, SwiGLU and bias + dropout + add against their peers."""

import pytest
import torch
import torch.nn.functional as F

from bench.operators import DEVICE, DTYPE, check, compiled, optional, run, shapes
from fastformer.ops.activation import bias_dropout_add, bias_gelu, geglu, swiglu

SHAPES = shapes((1024, 3072, 4096, 11008, 16384), (512, 4096, 16384, 65536))

OURS = {"bias_gelu": bias_gelu, "geglu": geglu, "swiglu": swiglu}
STOCK = {
    "bias_gelu": lambda input, bias: F.gelu(input + bias),
    "geglu": lambda gate, up: F.gelu(gate) * up,
    "swiglu": lambda gate, up: F.silu(gate) * up,
}
# Tensors of rows x width that must move: forward, and both directions.
MOVED = {"bias_gelu": (2, 5), "geglu": (3, 8), "swiglu": (3, 8), "bias_dropout_add": (3, 6)}


def make(kind, peer, p):
    if peer == "liger":
        if kind not in ("geglu", "swiglu"):
            pytest.skip(f"liger has no {kind}")
        name = {"geglu": "LigerGELUMulFunction", "swiglu": "LigerSiLUMulFunction"}[kind]
        function = optional(f"liger_kernel.ops.{kind}", name)
        return lambda gate, up: function.apply(gate, up)
    if kind == "bias_dropout_add":
        if peer == "fastformer":
            return lambda input, bias, residual: bias_dropout_add(input, bias, residual, p)

        def stock(input, bias, residual):
            return residual + F.dropout(input + bias, p)
    elif peer == "fastformer":
        return OURS[kind]
    else:
        stock = STOCK[kind]
    return stock if peer == "eager" else compiled(stock)


@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize("peer", ["fastformer", "eager", "compile", "liger"])
@pytest.mark.parametrize("kind", list(MOVED))
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_activation(benchmark, rows, width, kind, peer, direction):
    torch.manual_seed(0)
    names = ("gate", "up") if kind in ("geglu", "swiglu") else ("input", "bias")
    if kind == "bias_dropout_add":
        names += ("residual",)
    leaves = {
        name: torch.randn((width,) if name == "bias" else (rows, width), device=DEVICE, dtype=DTYPE) for name in names
    }
    stock = make(kind, "eager", 0.0)
    if peer == "liger" and kind == "geglu":
        stock = lambda gate, up: F.gelu(gate, approximate="tanh") * up  # noqa: E731
    check(make(kind, peer, 0.0), stock, leaves, direction == "both", peer)
    benchmark.group = f"{kind} {rows}x{width} {direction}"
    moved = MOVED[kind][direction == "both"] * rows * width * DTYPE.itemsize
    run(benchmark, make(kind, peer, 0.1), leaves, moved, direction == "both")
