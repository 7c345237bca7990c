"""The stand-in for captures is strict: each thing a CUDA graph does not do is planted here, and shows."""

import pytest
import torch

from tests.graphs.stand_in import HostRead, StandIn


@pytest.fixture
def recorder(device):
    if device.type != "cpu":
        pytest.skip("about the stand-in of a CPU")
    return StandIn()


def test_a_replay_computes_again_on_the_same_tensors(recorder):
    source, out = torch.ones(3), torch.zeros(3)
    replay, result = recorder.record(lambda: out.copy_(source * 2))
    assert torch.equal(out, torch.zeros(3))  # the capture left it alone
    source.fill_(5)
    replay()
    assert torch.equal(out, torch.full((3,), 10.0))
    assert result.data_ptr() == out.data_ptr()


def test_python_is_not_run_again(recorder):
    calls = []
    replay, _ = recorder.record(lambda: calls.append(1))
    replay()
    assert calls == [1]


@pytest.mark.parametrize(
    "read", [lambda x: x.tolist(), lambda x: x.sum().item(), lambda x: bool(x.any()), lambda x: x.nonzero()]
)
def test_host_reads_are_refused(recorder, read):
    with pytest.raises(HostRead):
        recorder.record(lambda: read(torch.ones(3)))


def test_results_are_gone_with_the_next_replay_of_another_graph(recorder):
    source = torch.ones(3)
    first, result = recorder.record(lambda: source + 1)
    second, _ = recorder.record(lambda: source * 3)
    first()
    assert torch.equal(result, torch.full((3,), 2.0))
    second()
    assert result.isnan().all()


def test_a_backward_may_read_what_its_forward_left(recorder):
    source = torch.ones(3)
    first, middle = recorder.record(lambda: source + 1)
    second, result = recorder.record(lambda: middle * 3)
    first()
    second()
    assert torch.equal(result, torch.full((3,), 6.0))
    assert not middle.isnan().any()


def test_what_a_replay_does_not_write_is_poison(recorder):
    def work():
        scratch = torch.empty(3)
        return scratch + 0  # of nothing

    replay, result = recorder.record(work)
    replay()
    assert result.isnan().all()
