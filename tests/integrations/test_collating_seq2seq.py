"""Batches of PackedSeq2SeqCollator through patched encoder-decoders, against stock on padded ones."""

import pytest
import torch

import fastformer as ff
import fastformer.nn as fnn

transformers = pytest.importorskip("transformers", minversion="5")
import zoo  # noqa: E402

from fastformer.integrations.transformers import PackedSeq2SeqCollator, TokenBudget  # noqa: E402

SOURCES, TARGETS = [3, 9, 1, 6, 14], [5, 2, 7, 1, 4]


def examples(ignored=True):
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number, lengths in enumerate(zip(SOURCES, TARGETS, strict=True)):
        source, target = (torch.randint(3, zoo.VOCAB, (n,), generator=generator).tolist() for n in lengths)
        if ignored and number == 2:
            target[3] = -100
        rows.append({"input_ids": source, "labels": target})
    return rows


def padded(rows):
    """What transformers' DataCollatorForSeq2Seq gives: decoder inputs are the model's to make."""
    longest, widest = max(SOURCES), max(TARGETS)
    return {
        "input_ids": torch.tensor([row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in rows]),
        "attention_mask": torch.tensor([[1] * n + [0] * (longest - n) for n in SOURCES]),
        "labels": torch.tensor([row["labels"] + [-100] * (widest - len(row["labels"])) for row in rows]),
    }


def build(family, **changes):
    return zoo.build(family, "ForConditionalGeneration", **changes).train()


@pytest.mark.parametrize("fused_loss", [False, True])
@pytest.mark.parametrize("family", zoo.SEQ2SEQ)
def test_packed_training_equals_padded(family, fused_loss):
    stock, patched = build(family), build(family)
    ff.patch(patched, fused_loss=fused_loss)
    rows = examples()
    batch = PackedSeq2SeqCollator.for_model(patched)(rows)
    assert batch["input_ids"].shape == (1, sum(SOURCES))
    assert batch["decoder_input_ids"].shape == (1, sum(TARGETS))
    fnn.reset_count()
    a, b = stock(**padded(rows)), patched(**batch, num_items_in_batch=None)
    assert not fnn.count().fallback
    a.loss.backward()
    b.loss.backward()
    assert abs(a.loss.item() - b.loss.item()) < 1e-5 * a.loss.item()
    zoo.assert_same_gradients(stock, patched)
    # Stock's shapes come out, on both sides.
    real = padded(rows)["attention_mask"].bool()
    assert zoo.relative(b.encoder_last_hidden_state[real], a.encoder_last_hidden_state[real]) < 1e-5
    if not fused_loss:
        for row, n in enumerate(TARGETS):
            assert zoo.relative(b.logits[row, :n], a.logits[row, :n]) < 1e-5


@pytest.mark.parametrize("family", zoo.SEQ2SEQ)
def test_decoder_inputs_are_the_models_own(family):
    model = build(family)
    ff.patch(model)
    rows = examples()
    batch = PackedSeq2SeqCollator.for_model(model)(rows)
    whole = model.prepare_decoder_input_ids_from_labels(padded(rows)["labels"])
    for part, row, n in zip(batch["decoder_input_ids"][0].split(TARGETS), whole, TARGETS, strict=True):
        assert part.tolist() == row[:n].tolist()


def test_padding_of_examples_is_dropped():
    rows = examples()
    widened = [
        {
            "input_ids": torch.tensor([0, 0, *row["input_ids"]]),
            "attention_mask": [0, 0] + [1] * len(row["input_ids"]),
            "labels": row["labels"] + [-100] * 3,
        }
        for row in rows
    ]
    collate = PackedSeq2SeqCollator(0, 0)
    for name, value in collate(rows).items():
        other = collate(widened)[name]
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other


def test_trainer_takes_it(tmp_path):
    model = build("t5")
    ff.patch(model)
    rows = examples() * 4
    collate = PackedSeq2SeqCollator.for_model(model, max_tokens=60)
    arguments = transformers.Seq2SeqTrainingArguments(
        str(tmp_path), per_device_train_batch_size=4, max_steps=3, report_to=[], use_cpu=True, learning_rate=1e-2,
        logging_steps=1, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Seq2SeqTrainer(model, arguments, data_collator=collate, train_dataset=rows)
    fnn.reset_count()
    trainer.train()
    assert not fnn.count().fallback
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_bad_input():
    collate = PackedSeq2SeqCollator(0, 0, max_tokens=20)
    for rows, words in (
        ([], "at least one example"),
        ([{"input_ids": [3]}], "must have input_ids, labels"),
        ([{"input_ids": [3], "labels": [4], "decoder_input_ids": [0]}], "decoder_input_ids"),
        ([{"input_ids": [3], "labels": [-100]}], "got none of one in number 0"),
        ([{"input_ids": [3], "labels": 1}], "one row of token ids"),
        ([{"input_ids": [3] * 15, "labels": [4] * 6}], "more than max_tokens=20"),
    ):
        with pytest.raises(ValueError, match=words):
            collate(rows)
    with pytest.raises(ValueError, match="max_tokens must be positive"):
        PackedSeq2SeqCollator(0, 0, max_tokens=0)
    with pytest.raises(ValueError, match="patched encoder-decoder"):
        PackedSeq2SeqCollator.for_model(build("t5"))
    bert = zoo.build("bert", "Model")
    ff.patch(bert)
    with pytest.raises(ValueError, match="patched encoder-decoder"):
        PackedSeq2SeqCollator.for_model(bert)
    model = build("bart", decoder_start_token_id=None)
    ff.patch(model)
    with pytest.raises(ValueError, match="decoder_start_token_id"):
        PackedSeq2SeqCollator.for_model(model)


def test_lengths_of_both_sides_are_needed():
    model = build("bart")
    ff.patch(model)
    batch = PackedSeq2SeqCollator.for_model(model)(examples())
    with pytest.raises(ValueError, match="needs cu_seq_lens_k"):
        model(**{name: value for name, value in batch.items() if not name.endswith("_k")})
    with pytest.raises(ValueError, match="pass only cu_seq_lens"):
        model(**batch, attention_mask=torch.ones_like(batch["input_ids"]))
    states = torch.zeros(len(SOURCES), max(SOURCES), 48)
    with pytest.raises(ValueError, match="as the patched encoder gave them"):
        model(**{**batch, "encoder_outputs": (states,), "input_ids": None})


def test_budget_over_both_sides():
    rows = examples() * 3
    lengths = [len(row["input_ids"]) + len(row["labels"]) for row in rows]
    collate = PackedSeq2SeqCollator(0, 0, max_tokens=30)
    batches = [collate([rows[i] for i in indices]) for indices in TokenBudget(lengths, 30)]
    assert sum(len(batch["labels"]) for batch in batches) == len(rows)
