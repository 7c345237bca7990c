"""A captured model against the same one run as ever: losses, gradients, outputs, and what must not be captured."""

import copy
import pickle

import pytest
import torch

import fastformer as ff
from tests.graphs import steps


def _close(actual, expected, rtol=1e-6):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=1e-6 * expected.abs().max().item())


def _same_gradients(one, other, rtol=1e-5):
    largest = max(p.grad.abs().max() for p in other.parameters() if p.grad is not None)
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if q.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=rtol, atol=1e-6 * float(largest), msg=name)


def _graphed(module, **options):
    return ff.graphed(module, token_budget=512, max_seqlen=64, progress=None, **options)


def test_hundred_steps_have_the_losses_of_the_model_without_graphs(graphs):
    one, other = steps.pair(device=graphs)
    report = _graphed(one)
    losses = steps.train(one, steps.batches(100, graphs))
    _close(losses, steps.train(other, steps.batches(100, graphs)))
    assert report.replays == 100
    assert not report.eager
    assert len(report.captured) <= 16
    assert losses[-10:].mean() < losses[:10].mean()


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("roberta", {"pad": 1}),
        ("distilbert", {}),
        ("bert-tokens", {"tokens": True}),
        ("bert-mlm", {"tokens": True}),  # the head's weight is the embedding's
        ("gpt2", {"tokens": True}),
        ("llama", {"tokens": True}),
        ("bert", {"full": 48}),  # padding="max_length"
    ],
)
def test_families(graphs, name, data):
    one, other = steps.pair(name, graphs)
    report = _graphed(one)
    _close(steps.train(one, steps.batches(8, graphs, **data)), steps.train(other, steps.batches(8, graphs, **data)))
    assert report.replays == 8, report


def test_gradients_accumulate_across_buckets(graphs):
    one, other = steps.pair(device=graphs)
    _graphed(one)
    seen = set()
    for batch in steps.batches(5, graphs):
        for module in (one, other):
            module(**batch).loss.backward()
        seen.add(batch["input_ids"].shape)
        _same_gradients(one, other)
    assert len(seen) > 1


def test_accumulation_and_clipping(graphs):
    one, other = steps.pair(device=graphs)
    report = _graphed(one)
    options = {"accumulate": 3, "clip": 0.1}
    _close(
        steps.train(one, steps.batches(9, graphs), **options), steps.train(other, steps.batches(9, graphs), **options)
    )
    assert report.replays == 9


def test_dropout_is_fresh_in_every_replay_and_repeats_with_the_seed(graphs):
    one = steps.model(device=graphs, hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.2)
    report = _graphed(one)
    batch = next(steps.batches(1, graphs))

    def run():
        torch.manual_seed(7)
        return torch.stack([one(**batch).logits.detach() for _ in range(3)])

    first, second = run(), run()  # the first captures, the second does not
    assert len(report.captured) == 1
    assert torch.equal(first, second)
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[1], first[2])


def test_autocast(graphs):
    one, other = steps.pair(device=graphs)
    report = _graphed(one)
    data = {"autocast": torch.bfloat16}
    losses = steps.train(one, steps.batches(6, graphs), **data)
    torch.testing.assert_close(losses, steps.train(other, steps.batches(6, graphs), **data), rtol=2e-2, atol=2e-2)
    assert report.replays == 6
    # Without autocast it is another step.
    batch = next(steps.batches(1, graphs))
    assert one(**batch).logits.dtype == torch.float32
    with torch.autocast(graphs.type, torch.bfloat16):
        assert one(**batch).logits.dtype == other(**batch).logits.dtype


def test_grad_scaler(graphs):
    one, other = steps.pair(device=graphs)
    _graphed(one)
    for module in (one, other):
        scaler = torch.amp.GradScaler(graphs.type, init_scale=1024.0)
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        for batch in steps.batches(4, graphs):
            scaler.scale(module(**batch).loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_frozen_layers_and_thawing_them(graphs):
    one, other = steps.pair(device=graphs)
    _graphed(one)
    for frozen in (True, False):
        for module in (one, other):
            module.bert.embeddings.requires_grad_(not frozen)
            module.zero_grad()
        for batch in steps.batches(2, graphs):
            for module in (one, other):
                module(**batch).loss.backward()
            _same_gradients(one, other)
        assert (one.bert.embeddings.word_embeddings.weight.grad is None) == frozen


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_lora_and_its_switch(graphs):
    from peft import LoraConfig, get_peft_model

    one, other = (
        get_peft_model(m, LoraConfig(target_modules=["query", "value"], r=4, init_lora_weights=False))
        for m in steps.pair(device=graphs)
    )
    other.load_state_dict(one.state_dict())
    report = _graphed(one)
    batch = next(steps.batches(1, graphs))
    _close(steps.train(one, [batch] * 3), steps.train(other, [batch] * 3))
    assert report.replays == 3, report
    with one.disable_adapter(), other.disable_adapter():
        _close(one(**batch).logits, other(**batch).logits)


def test_evaluation_between_steps_and_the_last_small_batch(graphs):
    one, other = steps.pair(device=graphs, hidden_dropout_prob=0.5)
    report = _graphed(one)
    data = [*steps.batches(2, graphs, sizes=(6, 7)), *steps.batches(1, graphs, sizes=(1, 2))]
    for batch in data:
        one(**batch).loss.backward()
        for module in (one, other):
            module.eval()
        with torch.no_grad():
            ours, expected = one(**batch), other(**batch)
        _close(ours.logits, expected.logits)
        _close(ours.loss, expected.loss)
        one.train()
    assert report.replays == 6
    assert {use for _, use, _ in report.captured} == {"training", "evaluation"}


def test_outputs_have_the_stock_shapes_and_memory_of_their_own(graphs):
    one, other = steps.pair("bert-tokens", graphs)
    report = _graphed(one)
    kept = []
    for batch in steps.batches(4, graphs, tokens=True, full=50):
        ours = one(**batch, output_hidden_states=True)
        theirs = other(**batch, output_hidden_states=True)
        kept.append((ours.logits, ours.logits.detach().clone()))
        _close(ours.logits, theirs.logits)
        for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True):
            assert a.shape == b.shape
            _close(a, b)
        (ours.hidden_states[1].sum() + ours.loss).backward()
        (theirs.hidden_states[1].sum() + theirs.loss).backward()
        _same_gradients(one, other)
    assert report.replays == 4, report
    for now, then in kept:
        assert torch.equal(now, then)


def test_parameters_changed_from_outside_are_seen(graphs):
    one, other = steps.pair(device=graphs)
    report = _graphed(one)
    batch = next(steps.batches(1, graphs))
    one(**batch).loss.backward()
    state = {k: v + 0.1 for k, v in other.state_dict().items()}
    for module in (one, other):
        module.load_state_dict(state)
        module.zero_grad()
        module(**batch).loss.backward()
    _same_gradients(one, other)
    assert len(report.captured) == 1
    for module in (one, other):
        module.classifier.weight.data = module.classifier.weight.data * 2  # elsewhere in memory
        module.zero_grad()
        module(**batch).loss.backward()
    _same_gradients(one, other)
    assert len(report.captured) == 2


def test_packed_batches(graphs):
    from fastformer.integrations.transformers import PackedCollator

    one, other = steps.pair(device=graphs)
    report = _graphed(one)
    collate = PackedCollator.for_model(one, max_tokens=512)
    g = torch.Generator().manual_seed(3)
    for number in (3, 5, 9, 4):
        lengths = torch.randint(1, 30, (number,), generator=g).tolist()
        examples = [
            {"input_ids": torch.randint(3, steps.VOCABULARY, (n,), generator=g), "labels": n % steps.LABELS}
            for n in lengths
        ]
        batch = {k: v.to(graphs) if isinstance(v, torch.Tensor) else v for k, v in collate(examples).items()}
        ours, theirs = one(**batch), other(**batch)
        assert ours.logits.shape == (number, steps.LABELS)
        _close(ours.logits, theirs.logits)
        _close(ours.loss, theirs.loss)
        ours.loss.backward()
        theirs.loss.backward()
        _same_gradients(one, other)
    assert report.replays == 4, report


def test_left_padding_runs_in_the_bucket_of_the_padded_length(graphs):
    one, other = steps.pair("gpt2", graphs)
    report = _graphed(one)
    data = {"tokens": True, "left": True}
    _close(steps.train(one, steps.batches(4, graphs, **data)), steps.train(other, steps.batches(4, graphs, **data)))
    assert report.replays == 4, report


def test_two_forwards_before_the_backward(graphs):
    one, other = steps.pair(device=graphs)
    report = _graphed(one)
    data = list(steps.batches(2, graphs))
    for module in (one, other):
        sum(module(**batch).loss for batch in data).backward()
    _same_gradients(one, other)
    assert report.replays == 1
    assert report.eager["an earlier forward still waits for its backward"] == 1
    one(**data[0]).loss.backward()
    assert report.replays == 2


def test_a_second_backward_after_the_memory_is_gone_is_refused(graphs):
    one = steps.model(device=graphs)
    _graphed(one)
    data = list(steps.batches(2, graphs))
    loss = one(**data[0]).loss
    loss.backward(retain_graph=True)
    one(**data[1]).loss.backward()
    with pytest.raises(RuntimeError, match="memory a later forward has used"):
        loss.backward()


def test_hooks_of_parameters_run(graphs):
    one, other = steps.pair(device=graphs)
    _graphed(one)
    for module in (one, other):
        module.classifier.weight.register_hook(lambda grad: grad * 3)
        module(**next(steps.batches(1, graphs))).loss.backward()
    _same_gradients(one, other)


def _hook(module, batch):
    module.bert.encoder.layer[0].register_forward_hook(lambda *a: None)


def _attentions(module, batch):
    batch["output_attentions"] = True


def _long(module, batch):
    for name in ("input_ids", "attention_mask"):
        batch[name] = batch[name].repeat(1, 4)


def _large(module, batch):
    for name, value in batch.items():
        batch[name] = value.repeat(8, *[1] * (value.ndim - 1))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_hook, "a hook on a BertLayer"),
        (_attentions, "output_attentions"),
        (_long, "longer than max_seqlen=64"),
        (_large, "more than token_budget=512"),
    ],
)
def test_what_cannot_be_replayed_runs_as_before_and_is_reported(graphs, change, reason):
    one, other = steps.pair(device=graphs)
    report = _graphed(one)
    batch = next(steps.batches(1, graphs))
    change(one, batch)
    ours, theirs = one(**batch), other(**batch)
    _close(ours.loss, theirs.loss)
    ours.loss.backward()
    theirs.loss.backward()
    _same_gradients(one, other)
    assert report.replays == 0
    (found,) = report.eager
    assert reason in found
    assert reason in str(report)


def test_a_host_read_inside_the_model_fails_the_capture_once(graphs):
    one, other = steps.pair(device=graphs)
    report = _graphed(one)
    dense = type(one.classifier)

    class Reading(dense):
        def forward(self, x):
            return super().forward(x) * (2.0 if x.sum().item() > 1e9 else 1.0)

    one.classifier.__class__ = Reading
    for batch in [next(steps.batches(1, graphs))] * 2:
        _close(one(**batch).loss, other(**batch).loss)
    (found,) = report.eager
    assert found.startswith("capture failed")
    assert report.eager[found] == 2


def test_a_full_table_takes_the_smallest_bucket_that_fits(graphs):
    one, other = steps.pair(device=graphs)
    report = _graphed(one, max_buckets=1)
    large, small = (next(steps.batches(1, graphs, sizes=(n, n + 1), longest=s)) for n, s in ((6, 40), (2, 10)))
    for batch in (large, small):
        ours = one(**batch)
        _close(ours.logits, other(**batch).logits)
        ours.loss.backward()
    assert len(report.captured) == 1
    assert report.replays == 2
    wider = next(steps.batches(1, graphs, sizes=(30, 31), seed=5))
    _close(one(**wider).logits, other(**wider).logits)
    assert sum(report.eager.values()) >= 1


def test_copies_and_pickles_are_of_the_patched_model(graphs):
    one = steps.model(device=graphs)
    batch = next(steps.batches(1, graphs))
    expected = one(**batch).logits
    _graphed(one)
    _close(one(**batch).logits, expected)
    for twin in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert "_fastformer_graphs" not in twin.__dict__
        _close(twin(**batch).logits, expected)
    assert type(copy.deepcopy(one)) is type(steps.model())


@pytest.mark.parametrize("name", ["bert", "distilbert"])
def test_undoing(graphs, name):
    stock = type(steps.model(name))
    one, other = steps.pair(name, graphs)
    batch = next(steps.batches(1, graphs))
    assert not ff.ungraphed(one)
    _graphed(one)
    _graphed(one)  # twice is the same as once
    one(**batch).loss.backward()
    other(**batch).loss.backward()
    assert ff.ungraphed(one)
    assert type(one) is stock
    assert one.__dict__.keys() == other.__dict__.keys()
    _same_gradients(one, other)
    report = _graphed(one)
    ff.unpatch(one)
    assert one.__dict__.keys() == other.__dict__.keys() - {"fastformer_unpad"}
    one(**batch)
    assert report.replays == 0


def test_the_base_model_itself(graphs):
    one, other = (m.bert for m in steps.pair(device=graphs))
    report = _graphed(one)
    batch = next(steps.batches(1, graphs))
    del batch["labels"]
    _close(one(**batch).last_hidden_state, other(**batch).last_hidden_state)
    assert report.replays == 1
    assert ff.unpatch(one)
    assert type(one).__module__.startswith("transformers")
    _close(one(**batch).pooler_output, other(**batch).pooler_output)


def test_bad_arguments(graphs):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
        ff.graphed(3)
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        ff.ungraphed("bert")
    one = steps.model(device=graphs)
    for name in ("token_budget", "max_seqlen", "max_buckets"):
        with pytest.raises(ValueError, match=f"{name} must be a positive integer, got 0"):
            ff.graphed(one, **{name: 0})
    with pytest.raises(ValueError, match="must be patched"):
        ff.graphed(torch.nn.Linear(3, 3))
    one.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="without gradient checkpointing"):
        ff.graphed(one)


def test_a_model_on_a_cpu_runs_as_before(device):
    if device.type != "cpu":
        pytest.skip("about a CPU")
    one, other = steps.pair()
    report = _graphed(one)
    batch = next(steps.batches(1))
    assert torch.equal(one(**batch).logits, other(**batch).logits)
    assert report.eager == {"the model is on cpu": 1}


@pytest.mark.filterwarnings("ignore")
def test_trainer(graphs, tmp_path):
    from transformers import Trainer, TrainingArguments

    examples = [
        {"input_ids": row[:n], "attention_mask": torch.ones(int(n), dtype=torch.long), "labels": int(label)}
        for batch in steps.batches(3)
        for row, n, label in zip(batch["input_ids"], batch["attention_mask"].sum(1), batch["labels"], strict=True)
    ]

    def collate(rows):
        ids = torch.nn.utils.rnn.pad_sequence([r["input_ids"] for r in rows], batch_first=True)
        return {
            "input_ids": ids,
            "attention_mask": (ids != 0).long(),
            "labels": torch.tensor([r["labels"] for r in rows]),
        }

    found = []
    for captured in (True, False):
        one = steps.model(device=graphs)
        report = _graphed(one) if captured else None
        arguments = TrainingArguments(
            str(tmp_path), max_steps=5, per_device_train_batch_size=4, gradient_accumulation_steps=2, seed=3,
            report_to=[], save_strategy="no", use_cpu=graphs.type == "cpu", disable_tqdm=True, learning_rate=1e-3,
        )  # fmt: skip
        Trainer(one, arguments, train_dataset=examples, data_collator=collate).train()
        found.append(torch.cat([p.detach().flatten() for p in one.parameters()]))
        if report is not None:
            assert report.replays, report
            assert not report.eager, report
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
