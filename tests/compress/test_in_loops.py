"""Adaptive compression in Trainer, and the rungs behind pruning, on patched models."""

import subprocess
import sys

import pytest
import torch

import fastformer as ff
from fastformer.compress import AdaptiveCompressor, load

transformers = pytest.importorskip("transformers", minversion="5")
import zoo  # noqa: E402

from fastformer.integrations.transformers import AdaptiveCompressionCallback  # noqa: E402

HEAD = "ForSequenceClassification"


def rows(count=32, seed=0):
    """Sequences whose label is told by their first token."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, zoo.WIDTH + 1, (count,), generator=generator).tolist()
    ids = [torch.randint(3, zoo.VOCAB, (n,), generator=generator).tolist() for n in lengths]
    return [{"input_ids": row, "labels": row[0] % 3} for row in ids]


def collate(examples):
    longest = max(len(e["input_ids"]) for e in examples)
    ids = torch.tensor([e["input_ids"] + [0] * (longest - len(e["input_ids"])) for e in examples])
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "labels": torch.tensor([e["labels"] for e in examples]),
    }


def trainer(model, folder, callback, **options):
    settings = {"eval_strategy": "steps", "eval_steps": 3, "max_steps": 30, "save_strategy": "no", "report_to": []}
    arguments = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=8, learning_rate=1e-3, use_cpu=True, disable_tqdm=True,
        logging_strategy="no", **{**settings, **options},
    )  # fmt: skip
    return transformers.Trainer(
        model,
        arguments,
        train_dataset=rows(),
        eval_dataset=rows(16, seed=1),
        data_collator=collate,
        compute_metrics=lambda p: {"accuracy": float((p.predictions.argmax(-1) == p.label_ids).mean())},
        callbacks=[callback],
    )


def callback(**options):
    # A tolerance that always holds: the rate rises to its end.
    settings = {"standard_error": 0.4, "tolerance": 1.0, "patience": 1, "rise": 0.4, "max_rate": 0.7, "multiple_of": 4}
    return AdaptiveCompressionCallback("accuracy", **{**settings, **options})


def test_trainer(tmp_path):
    model = zoo.build("distilbert", HEAD)
    ff.patch(model)
    before = sum(p.numel() for p in model.transformer.parameters()) if hasattr(model, "transformer") else None
    watcher = callback()
    run = trainer(model, tmp_path, watcher)
    run.train()
    report = watcher.report
    assert [e.decision for e in report.history] == ["train", "converged", "accept", "accept"]
    assert run.state.global_step == 12  # training stopped when the search was done
    assert report.encoder_parameters[1] < 0.4 * report.encoder_parameters[0]
    assert before is None or before == report.encoder_parameters[0]
    assert "compression_rate" in str(run.state.log_history)
    accuracy = run.evaluate()["eval_accuracy"]
    run.save_model(str(tmp_path / "model"))
    loaded = load(tmp_path / "model")
    ff.patch(loaded)
    assert trainer(loaded, tmp_path, callback()).evaluate()["eval_accuracy"] == accuracy


def test_trainer_can_go_on_at_the_rate_found(tmp_path):
    watcher = callback(stop=False)
    run = trainer(zoo.build("bert", HEAD), tmp_path, watcher, max_steps=18)
    run.train()
    assert run.state.global_step == 18
    assert [e.phase for e in watcher.report.history] == ["dense", "dense", "search", "search", "done", "done"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_strategy": "no"}, "eval_strategy must be"),
        ({"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 3}, "load_best_model_at_end must be"),
    ],
)
def test_trainer_settings_that_cannot_work(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        trainer(zoo.build("bert", HEAD), tmp_path, callback(), **options).train()


def test_trainer_with_an_unknown_metric(tmp_path):
    watcher = AdaptiveCompressionCallback("f1", eval_size=16)
    with pytest.raises(ValueError, match=r"metric must be one of.*eval_accuracy.*got 'eval_f1'"):
        trainer(zoo.build("bert", HEAD), tmp_path, watcher).train()
    with pytest.raises(ValueError, match="metric must be the name"):
        AdaptiveCompressionCallback("")


def test_further_rungs_are_tried_under_the_same_gate():
    pytest.importorskip("torchao")
    model = zoo.build("bert", HEAD)
    ff.patch(model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    options = {"standard_error": 0.01, "patience": 1, "rise": 0.4, "max_rate": 0.4, "multiple_of": 4}
    compressor = AdaptiveCompressor(model, optimizer, **options)
    for _ in range(3):
        model.train()(**collate(rows(8))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        compressor.update(0.8)
    asked = []

    def evaluate(candidate):
        layer = candidate.bert.encoder.layer[0].output.dense
        factored = sum("LowRank" in type(m).__name__ for m in candidate.modules())
        asked.append((factored, "Int8" in type(getattr(layer, "weight", None)).__name__))
        return 0.1 if factored else 0.79  # low rank ruins it, int8 does not

    with pytest.raises(ValueError, match="rungs must be among"):
        compressor.finish(("int4",), evaluate)
    report = compressor.finish(("low_rank", "int8"), evaluate)
    assert [n.split(":")[0] for n in report.notes] == ["low_rank", "int8"]
    assert "left as it was" in report.notes[0]
    assert "12 layers quantized" in report.notes[1]
    assert not any("LowRank" in type(m).__name__ for m in model.modules())
    assert report.metric == 0.79
    assert asked[0][0] > 0
    assert asked[-1][0] == 0
    assert model(**collate(rows(4))).logits.isfinite().all()


def test_importing_it_imports_no_transformers():
    code = (
        "import sys, fastformer as ff; ff.compress.AdaptiveCompressor, ff.compress.load; "
        "print(sorted({'transformers', 'torchao', 'matplotlib', 'triton'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
    assert ff.compress.AdaptiveCompressionCallback is AdaptiveCompressionCallback
