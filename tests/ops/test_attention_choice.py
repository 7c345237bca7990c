"""Which family of attention kernels a call takes: forced, proven, or neither."""

import pytest
import torch

pytest.importorskip("triton")

from fastformer.kernels import targets
from fastformer.kernels.targets import TARGETS, assume, hopper_chosen
from fastformer.ops.backend import backend_for, forced_backend

GPU = torch.device("cuda", 0)


@pytest.fixture
def triton_version(monkeypatch):
    monkeypatch.setattr(targets.triton, "__version__", "3.6.0")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    targets._gpu_and_triton.cache_clear()
    yield
    targets._gpu_and_triton.cache_clear()


@pytest.mark.parametrize(
    ("choice", "target", "proven", "expected"),
    [
        (None, "sm_90", (), False),
        (None, "sm_90", (("NVIDIA H200", "3.6"),), True),
        (None, "sm_90", (("NVIDIA H200", "3.7"), ("NVIDIA H100", "3.6")), False),
        (None, "sm_100", (("NVIDIA H200", "3.6"),), False),
        ("triton", "sm_90", (("NVIDIA H200", "3.6"),), True),
        ("hopper", "sm_90", (), True),
        ("hopper", "sm_80", (), False),
        ("portable", "sm_90", (("NVIDIA H200", "3.6"),), False),
    ],
)
def test_choice(choice, target, proven, expected, triton_version, monkeypatch):
    monkeypatch.setattr(targets, "HOPPER_PROVEN", frozenset(proven))
    if choice is None:
        monkeypatch.delenv("FASTFORMER_BACKEND", raising=False)
    else:
        monkeypatch.setenv("FASTFORMER_BACKEND", choice)
    with assume(TARGETS[target]):
        assert hopper_chosen(GPU) is expected


@pytest.mark.parametrize("choice", ["hopper", "portable"])
def test_a_family_that_cannot_run_is_an_error(choice, monkeypatch):
    monkeypatch.setenv("FASTFORMER_BACKEND", choice)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert forced_backend() == choice
    with pytest.raises(RuntimeError, match=f"FASTFORMER_BACKEND={choice}, but"):
        backend_for(torch.device("cpu"))


def test_hopper_needs_a_hopper_gpu(monkeypatch):
    monkeypatch.setenv("FASTFORMER_BACKEND", "hopper")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="no Hopper GPU"):
        backend_for(torch.device("cpu"))
    monkeypatch.setenv("FASTFORMER_BACKEND", "portable")
    assert backend_for(torch.device("cpu")) == "triton"
