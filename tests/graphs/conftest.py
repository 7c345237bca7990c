"""On a GPU these tests capture CUDA graphs; on a CPU a stand-in captures, which poisons what a replay must not read."""

import pytest
import torch

from fastformer import ops
from fastformer.graphs import capture
from tests.graphs.stand_in import StandIn, packed_attention


@pytest.fixture
def graphs(device, monkeypatch):
    """The device to run on, with something that captures there."""
    if device.type == "cpu":
        monkeypatch.setattr(capture, "recorder_for", StandIn)
        monkeypatch.setattr(ops, "attention_varlen", packed_attention)
    elif not torch.cuda.is_available():
        pytest.skip("FASTFORMER_TEST_DEVICE=cuda, but there is no GPU")
    return device
