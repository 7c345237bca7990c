"""What only a GPU would show of captures: failing half-way, and leaves of autograd that belong to another stream."""

import contextlib
import copy

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration

import fastformer as ff
from fastformer import ops
from fastformer.graphs import capture, graphed
from fastformer.graphs.buckets import CannotCapture
from tests.graphs import steps
from tests.graphs.stand_in import StandIn


class _Generator:
    def __init__(self):
        self.states = []

    def clone_state(self):
        return "a copy"

    def graphsafe_set_state(self, state):
        self.states.append(state)


def test_a_capture_that_cannot_be_ended_leaves_the_device_as_it_was(monkeypatch):
    """As `torch.cuda.graph` does it: its stream becomes the current one, and stays so if ending the capture fails."""
    generator, current = _Generator(), ["the loop's stream"]

    @contextlib.contextmanager
    def graph(made, pool, stream, capture_error_mode):
        current.append(stream)
        yield
        raise RuntimeError("CUDA error: operation failed due to a previous error during capture\nCompile with ...")

    fakes = {
        "graph": graph,
        "CUDAGraph": object,
        "Stream": lambda device: object(),
        "graph_pool_handle": lambda: object(),
        "current_stream": lambda device: current[-1],
        "set_stream": current.append,
        "default_generators": (generator,),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    recorder = capture.CudaRecorder(torch.device("cuda", 0))
    before = recorder.stream, recorder.pool
    with pytest.raises(
        capture.CaptureFailed, match=r"^CUDA error: operation failed due to a previous error .* capture$"
    ):
        recorder.record(lambda: None)
    assert current[-1] == "the loop's stream"
    assert generator.states == ["a copy"]
    assert recorder.stream is not before[0]
    assert recorder.pool is not before[1]


def test_a_failed_capture_voids_the_earlier_ones_which_are_made_again(graphs, monkeypatch):
    begun = []

    class Failing(StandIn):
        def record(self, work):
            begun.append(work)
            if len(begun) == 3:  # after the first batch's forward and backward
                raise capture.CaptureFailed("stream capture was invalidated")
            return super().record(work)

    if graphs.type != "cpu":
        pytest.skip("of the stand-in")
    monkeypatch.setattr(capture, "recorder_for", Failing)
    one, other = steps.pair(device=graphs)
    report = graphed(one, token_budget=512, max_seqlen=64, progress=None)
    small, large = (next(steps.batches(1, graphs, sizes=(n, n + 1), longest=s)) for n, s in ((2, 10), (6, 40)))
    # Of another signature, so that only it is refused afterwards.
    large["labels"] = torch.nn.functional.one_hot(large["labels"], steps.LABELS).float()
    for batch in (small, large, small):
        for model in (one, other):
            model.config.problem_type = None
        ours, theirs = one(**batch), other(**batch)
        torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=1e-6)
        ours.loss.backward()
    assert report.eager == {"capture failed: stream capture was invalidated": 1}
    assert report.replays == 2
    assert len(report.captured) == 2
    assert report.captured[0][0] == report.captured[1][0]


@pytest.mark.parametrize("cause", [torch.OutOfMemoryError("no memory left"), CannotCapture("a reason of its own")])
def test_what_ended_a_capture_is_not_hidden(graphs, monkeypatch, cause):
    """Running out of memory is an error, not a reason to go on without graphs; a reason is kept as it was given."""
    failing = [True]

    class Failing(StandIn):
        def record(self, work):
            if failing:
                raise capture.CaptureFailed(str(cause)) from cause
            return super().record(work)

    if graphs.type != "cpu":
        pytest.skip("of the stand-in")
    monkeypatch.setattr(capture, "recorder_for", Failing)
    model, _ = steps.pair(device=graphs)
    report = graphed(model, token_budget=512, max_seqlen=64, progress=None)
    batch = next(steps.batches(1, graphs, sizes=(2, 3), longest=10))
    if isinstance(cause, CannotCapture):
        model(**batch)
        assert report.eager == {"a reason of its own": 1}
        return
    with pytest.raises(torch.OutOfMemoryError, match="no memory left"):
        model(**batch)
    failing.clear()
    model(**batch).loss.backward()
    assert not report.eager
    assert report.replays == 1


def test_a_parameter_kept_outside_its_module_is_not_captured(graphs):
    """Its gradient would be lost: captures run on other leaves over the same memory."""
    one, other = steps.pair(device=graphs)

    class Head(type(one.classifier)):
        def forward(self, x):
            return torch.nn.functional.linear(x, kept[id(self)], self.bias)

    kept = {id(model.classifier): model.classifier.weight for model in (one, other)}
    for model in (one, other):
        model.classifier.__class__ = Head
    report = graphed(one, token_budget=512, max_seqlen=64, progress=None)
    batch = next(steps.batches(1, graphs))
    for model in (one, other):
        model(**batch).loss.backward()
    assert report.eager == {"a parameter that is read from outside its module": 1}
    torch.testing.assert_close(one.classifier.weight.grad, other.classifier.weight.grad)


def test_captures_do_not_touch_the_parameters_own_nodes(graphs):
    """These remember the stream of an earlier step, and live as long as its loss does."""
    one, _ = steps.pair(device=graphs)
    first, second = steps.batches(2, graphs, sizes=(3, 4))
    loss = one(**first).loss
    loss.backward()
    ran = []
    handles = [p.register_hook(lambda grad: ran.append(torch.is_grad_enabled())) for p in one.parameters()]
    graphed(one, token_budget=512, max_seqlen=64, progress=None)
    replayed = one(**second).loss
    assert not ran
    assert all(type(p) is torch.nn.Parameter for p in one.parameters())
    replayed.backward()
    assert len(ran) == len(handles)


_BART = {"layers": 1, "attention_heads": 2, "ffn_dim": 16}


def test_an_encoder_decoder_has_one_bucket_for_labels_of_many_lengths(graphs, monkeypatch):
    if graphs.type == "cpu":
        # PyTorch's own attention stands in for the CPU's path, which looks at values.
        monkeypatch.setattr(ops, "scaled_dot_product_attention", _attention)
    torch.manual_seed(0)
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in _BART.items()}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    config = BartConfig(vocab_size=50, d_model=16, dropout=0.0, max_position_embeddings=66, **sizes, **ids)
    one = BartForConditionalGeneration(config).to(graphs).train()
    ff.patch(one)
    other = copy.deepcopy(one)
    report = graphed(one, token_budget=512, max_seqlen=64, progress=None)
    for width, written in ((10, 5), (12, 7), (20, 20), (9, 40)):
        mask = (torch.arange(width) < torch.tensor([width, width - 4, width - 6])[:, None]).long()
        labels = torch.randint(3, 50, (3, written))
        labels[1, -2:] = -100
        batch = {"input_ids": torch.randint(3, 50, mask.shape) * mask, "attention_mask": mask, "labels": labels}
        batch = {name: value.to(graphs) for name, value in batch.items()}
        ours, theirs = one(**batch), other(**batch)
        assert ours.logits.shape == (3, written, 50)
        assert ours.encoder_last_hidden_state.shape == theirs.encoder_last_hidden_state.shape
        torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-4, atol=1e-5)
        ours.loss.backward()
        theirs.loss.backward()
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5, msg=name)
    assert not report.eager
    assert [bucket.target for bucket, _, _ in report.captured] == [32, 64]
    assert "64 to write" in str(report)


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **options):
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale
    )
