"""Cross-entropy and linear_cross_entropy against their peers: time and peak memory."""

import pytest
import torch
import torch.nn.functional as F

from bench.operators import DEVICE, DTYPE, ON_GPU, check, compiled, optional, run, shapes
from fastformer.ops.linear_loss import linear_cross_entropy
from fastformer.ops.loss import cross_entropy

SHAPES = shapes((2, 1024, 30522, 50304, 131072), (512, 4096, 16384), 2**31, on_cpu=2**22)
# (rows, hidden, classes): BERT-base's and a decoder's vocabulary.
LINEAR_ON_GPU = [(8192, 768, 30522), (8192, 2048, 131072), (32768, 2048, 131072)]
LINEAR = LINEAR_ON_GPU if ON_GPU else [(512, 64, 30522), (128, 64, 131072)]


@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize("peer", ["fastformer", "eager", "compile", "liger", "quack"])
@pytest.mark.parametrize(("rows", "classes"), SHAPES)
def test_cross_entropy(benchmark, rows, classes, peer, direction):
    torch.manual_seed(0)
    target = torch.randint(0, classes, (rows,), device=DEVICE)

    def stock(logits):
        return F.cross_entropy(logits, target)

    if peer == "fastformer":
        call = lambda logits: cross_entropy(logits, target)  # noqa: E731
    elif peer == "liger":
        function = optional("liger_kernel.transformers.functional", "liger_cross_entropy")
        # It writes the gradient over its input: a copy keeps the benchmark's.
        call = lambda logits: function(logits.clone(), target)  # noqa: E731
    elif peer == "quack":
        function = optional("quack", "cross_entropy")
        call = lambda logits: function(logits, target, reduction="mean")  # noqa: E731
    else:
        call = stock if peer == "eager" else compiled(stock)
    leaves = {"logits": torch.randn(rows, classes, device=DEVICE, dtype=DTYPE)}
    check(call, stock, leaves, direction == "both", peer)
    benchmark.group = f"cross_entropy {rows}x{classes} {direction}"
    moved = (3 if direction == "both" else 1) * rows * classes * DTYPE.itemsize
    run(benchmark, call, leaves, moved, direction == "both")


@pytest.mark.parametrize("peer", ["fastformer", "eager", "compile", "liger"])
@pytest.mark.parametrize(("rows", "hidden", "classes"), LINEAR)
def test_linear_cross_entropy(benchmark, rows, hidden, classes, peer):
    torch.manual_seed(0)
    target = torch.randint(0, classes, (rows,), device=DEVICE)

    def stock(input, weight):
        return F.cross_entropy(F.linear(input, weight), target)

    if peer == "fastformer":
        call = lambda input, weight: linear_cross_entropy(input, weight, target)  # noqa: E731
    elif peer == "liger":
        function = optional("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy")
        call = lambda input, weight: function(input, weight, target)  # noqa: E731
    else:
        call = stock if peer == "eager" else compiled(stock)
    leaves = {
        "input": torch.randn(rows, hidden, device=DEVICE, dtype=DTYPE),
        "weight": torch.randn(classes, hidden, device=DEVICE, dtype=DTYPE) / hidden**0.5,
    }
    # float64 logits of the whole would not fit: correctness is held on the first rows and classes.
    few, classes_checked = min(rows, 64), min(classes, 4096)
    part = {"input": leaves["input"][:few], "weight": leaves["weight"][:classes_checked]}
    labels = target[:few] % classes_checked
    if peer == "fastformer":
        check(
            lambda input, weight: linear_cross_entropy(input, weight, labels),
            lambda input, weight: F.cross_entropy(F.linear(input, weight), labels),
            part,
        )
    benchmark.group = f"linear_cross_entropy {rows}x{hidden}x{classes} both"
    run(benchmark, call, leaves, sum(t.numel() for t in leaves.values()) * DTYPE.itemsize, True)
