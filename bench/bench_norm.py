"""dropout + residual + LayerNorm, LayerNorm and RMSNorm against their peers."""

import pytest
import torch
import torch.nn.functional as F

import fastformer as ff
from bench.operators import DEVICE, DTYPE, check, compiled, optional, run, shapes

SHAPES = shapes((256, 768, 1024, 4096, 16384), (512, 4096, 16384, 65536))


def make_stock(kind, width, p):
    def stock(input, weight, residual=None, bias=None):
        if residual is not None:
            input = residual + F.dropout(input, p)
        return (
            F.rms_norm(input, (width,), weight, 1e-5) if kind == "rms" else F.layer_norm(input, (width,), weight, bias)
        )

    return stock


def make(peer, kind, width, p):
    """One implementation of a kind: "add" (with dropout), "layer" or "rms"."""
    if peer == "fastformer":
        if kind == "add":
            return lambda input, residual, weight, bias: ff.ops.add_layer_norm(
                input, residual, weight, bias, dropout_p=p
            )
        return ff.ops.layer_norm if kind == "layer" else lambda input, weight: ff.ops.rms_norm(input, weight, 1e-5)
    if peer in ("eager", "compile"):
        stock = make_stock(kind, width, p)
        return stock if peer == "eager" else compiled(stock)
    if peer == "flash-attn":
        norm = optional("flash_attn.ops.triton.layer_norm", "layer_norm_fn")
        return lambda input, weight, bias=None, residual=None: norm(
            input, weight, bias, residual=residual, eps=1e-5, dropout_p=p, is_rms_norm=kind == "rms"
        )
    if kind == "add":
        pytest.skip(f"{peer} has no dropout + add + norm")
    if peer == "quack" and kind == "rms":
        norm = optional("quack", "rmsnorm")
        return lambda input, weight: norm(input, weight, eps=1e-5)
    if peer == "quack":
        norm, wide = optional("quack.rmsnorm", "layernorm_fwd"), {}

        def layer(input, weight, bias):
            # It takes float32 alone, which is not to be timed.
            if weight.data_ptr() not in wide:
                wide[weight.data_ptr()] = weight.float(), bias.float()
            return norm(input, *wide[weight.data_ptr()], eps=1e-5)

        return layer
    name = "LigerRMSNormFunction" if kind == "rms" else "LigerLayerNormFunction"
    function = optional("liger_kernel.ops." + ("rms_norm" if kind == "rms" else "layer_norm"), name)
    if kind == "rms":
        return lambda input, weight: function.apply(input, weight, 1e-5, 0.0, "llama", False)
    return lambda input, weight, bias: function.apply(input, weight, bias, 1e-5)


@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize("peer", ["fastformer", "eager", "compile", "liger", "quack", "flash-attn"])
@pytest.mark.parametrize("kind", ["add", "layer", "rms"])
@pytest.mark.parametrize(("rows", "width"), SHAPES)
def test_norm(benchmark, rows, width, kind, peer, direction):
    if (peer, kind, direction) == ("quack", "layer", "both"):
        pytest.skip("quack's LayerNorm has no derivative")
    torch.manual_seed(0)
    p = 0.1 if kind == "add" else 0.0
    call = make(peer, kind, width, p)
    names = {"add": ("input", "residual"), "layer": ("input",), "rms": ("input",)}[kind]
    leaves = {name: torch.randn(rows, width, device=DEVICE, dtype=DTYPE) for name in names}
    leaves["weight"] = torch.randn(width, device=DEVICE, dtype=DTYPE)
    if kind != "rms":
        leaves["bias"] = torch.randn(width, device=DEVICE, dtype=DTYPE)
    # Random masks differ between implementations: correctness is held without dropout.
    check(make(peer, kind, width, 0.0), make_stock(kind, width, 0.0), leaves, direction == "both", peer)
    # Forward reads the inputs and writes y (and the sum, for backward); backward reads dy and one tensor and writes
    # a gradient for each input.
    tensors = len(names) + 1
    if direction == "both":
        tensors += (kind == "add") + 2 + len(names)
    benchmark.group = f"{kind} {rows}x{width} {direction}"
    run(benchmark, call, leaves, tensors * rows * width * DTYPE.itemsize, direction == "both")
