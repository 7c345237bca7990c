"""Launches read from a profile: of made-up events, and of PyTorch's own on the CPU with its products as launches."""

import re
from types import SimpleNamespace

import torch
from torch.profiler import ProfilerActivity, profile

from fastformer.launches import profiled
from fastformer.launches.tracing import Launch


def _event(name, parent=None, sequence_nr=-1):
    return SimpleNamespace(name=name, cpu_parent=parent, sequence_nr=sequence_nr)


def test_every_call_that_launches_is_placed():
    layer = _event("fastformer module encoder.layer.1")
    dense = _event("fastformer module encoder.layer.1.dense", layer)
    addmm = _event("aten::addmm", _event("aten::linear", dense), 7)
    node = _event("autograd::engine::evaluate_function: AddmmBackward0", None, 7)
    adam = _event("aten::_fused_adamw_", _event("Optimizer.step#AdamW.step"))
    launches, reads = profiled.read_events([
        layer, dense, addmm, node, adam,
        _event("cudaLaunchKernel", addmm),
        _event("cuLaunchKernelEx", layer),
        _event("cudaStreamIsCapturing", addmm),
        _event("cudaMemsetAsync", _event("aten::zero_")),
        _event("cudaLaunchKernelExC", _event("aten::mm", node)),
        _event("hipExtModuleLaunchKernel", _event("AddmmBackward0", node)),
        _event("cudaStreamSynchronize", _event("aten::item")),
        _event("cudaStreamSynchronize", adam),
        _event("cudaLaunchKernel", adam),
        _event("cudaGraphLaunch"),
    ])  # fmt: skip
    assert launches == [
        Launch("forward", "encoder.layer.1.dense", "addmm", 1),
        Launch("forward", "encoder.layer.1", "fastformer::kernel", 1),
        Launch("loop", "", "zero_", 1),
        Launch("backward", "encoder.layer.1.dense", "mm", 1),
        Launch("backward", "encoder.layer.1.dense", "fastformer::kernel", 1),
        Launch("optimizer", "", "_fused_adamw_", 1),
        Launch("loop", "", "fastformer::kernel", 1),
    ]
    assert reads == 1


def test_a_profile_of_pytorch_leads_from_the_backward_pass_to_the_module(monkeypatch):
    monkeypatch.setattr(profiled, "_LAUNCH", re.compile(r"aten::(addmm|mm|_foreach_mul_)$"))
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    with profile(activities=[ProfilerActivity.CPU]) as seen, profiled.marked(model):
        model(torch.randn(5, 4)).sum().backward()
        torch.mm(torch.ones(2, 2), torch.ones(2, 2))
        optimizer.step()
    launches, _ = profiled.read_events(seen.events())
    assert [(x.module, x.operator) for x in launches if x.phase == "forward"] == [("0", "addmm"), ("2", "addmm")]
    # The first layer's input takes no gradient.
    found = [(x.module, x.operator) for x in launches if x.phase == "backward"]
    assert sorted(found) == [("0", "mm"), ("2", "mm"), ("2", "mm")]
    assert [x.operator for x in launches if x.phase == "loop"] == ["mm"]
    assert {x.operator for x in launches if x.phase == "optimizer"} == {"_foreach_mul_"}
    handles = torch.nn.modules.module._global_forward_hooks
    assert not handles
