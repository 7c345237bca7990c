"""Packed batches under torch.compile: one full graph, whatever the lengths and the number of sequences."""

import pytest
import torch

from tests.graphs import steps


def _packed(lengths, device, seed=0):
    g = torch.Generator().manual_seed(seed)
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    longest = max(lengths)
    labels = torch.randint(0, steps.LABELS, (len(lengths),), generator=g)
    return {
        "input_ids": torch.randint(3, steps.VOCABULARY, (1, sum(lengths)), generator=g).to(device),
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None].to(device),
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
        "labels": labels.to(device),
    }


@pytest.mark.filterwarnings("ignore")
def test_one_full_graph_for_all_lengths(device):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    # Stock heads write the kind of problem into their configuration at the first call.
    one, other = steps.pair("bert", device, num_hidden_layers=1, problem_type="single_label_classification")
    compiled = torch.compile(one, fullgraph=True, dynamic=True, backend="aot_eager")
    for number, lengths in enumerate(([5, 7, 9], [3, 8, 4], [10, 2, 6, 3], [12, 12])):
        batch = _packed(lengths, device, number)
        for module in (compiled, other):
            module.zero_grad()
            module(**batch).loss.backward()
        largest = max(p.grad.abs().max() for p in other.parameters() if p.grad is not None)
        for p, q in zip(one.parameters(), other.parameters(), strict=True):
            if q.grad is not None:
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-6 * float(largest))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_reduce_overhead(device):
    if device.type != "cuda":
        pytest.skip("CUDA graphs need a GPU")
    torch._dynamo.reset()
    one, other = steps.pair("bert", device)
    compiled = torch.compile(one, fullgraph=True, mode="reduce-overhead")
    batch = _packed([5, 7, 9], device)
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        loss = compiled(**batch).loss
        torch.testing.assert_close(loss, other(**batch).loss, rtol=1e-5, atol=1e-6)
        loss.backward()
