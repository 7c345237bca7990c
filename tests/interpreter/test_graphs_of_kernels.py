"""Captured steps over the kernels themselves: what they do with rows and sequences that only a bucket has."""

import pytest
import torch

import fastformer as ff
from fastformer import ops
from fastformer.graphs import capture
from tests.graphs import steps
from tests.graphs.stand_in import StandIn

_SMALL = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}


@pytest.fixture(autouse=True)
def _stand_in(interpreting, monkeypatch):
    if not interpreting:
        pytest.skip("about Triton's interpreter")
    monkeypatch.setattr(capture, "recorder_for", StandIn)
    varlen = ops.attention_varlen

    def unchecked(*args, **kwargs):
        # Of tensors on a CPU, as the interpreter's are, the values of boundaries are checked.
        with torch._C.DisableTorchFunction():
            return varlen(*args, **kwargs)

    monkeypatch.setattr(ops, "attention_varlen", unchecked)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_losses_and_gradients(name):
    one, other = steps.pair(name, **_SMALL)
    report = ff.graphed(one, token_budget=128, max_seqlen=32, progress=None)
    for batch in steps.batches(2, tokens=name == "llama", sizes=(2, 3), longest=8):
        ours, theirs = one(**batch).loss, other(**batch).loss
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
        ours.backward()
        theirs.backward()
    largest = max(p.grad.abs().max() for p in other.parameters())
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-6 * float(largest))
    assert report.replays == 2, report


def test_dropout_is_fresh_and_repeats():
    one = steps.model("bert", **_SMALL, hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.2)
    report = ff.graphed(one, token_budget=128, max_seqlen=32, progress=None)
    batch = next(steps.batches(1, sizes=(1, 2), longest=6))
    found = []
    for _ in range(2):
        torch.manual_seed(3)
        found.append([one(**batch).logits.detach() for _ in range(2)])
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert not torch.equal(found[0][0], found[0][1])
    assert report.replays == 4
