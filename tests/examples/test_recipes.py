"""Every recipe, small: stock and patched come to the same losses and metric; stock transformers loads the result."""

import importlib
import json

import pytest
import torch

import fastformer.nn as fnn

transformers = pytest.importorskip("transformers", minversion="5")
pytest.importorskip("sklearn")
from tests.examples.conftest import SMALL  # noqa: E402

CLASSIFIER = ("--epochs", "2", "--layers", "2")


def run_both(name, data, output, *arguments):
    """Results of a recipe, stock and patched, and the folder of the latter; fused calls are counted."""
    pytest.importorskip("seqeval" if name == "ner" else "transformers")
    main = importlib.import_module(name).main
    results = []
    for patch in ("--no-patch", "--patch"):
        fnn.reset_count()
        folder = output / patch.strip("-")
        results.append(main(["--data", str(data), *SMALL, *arguments, patch, "--output", str(folder)]))
        assert bool(fnn.count().fused) == (patch == "--patch")
        assert json.loads((folder / "result.json").read_text()) == results[-1]
        assert results[-1]["tokens"] == results[0]["tokens"] > 0
        assert results[-1]["tokens_per_second"] > 0
    return results, output / "patch"


def assert_same(results, tolerance=1e-3):
    stock, patched = (result["losses"] for result in results)
    assert len(stock) > 4
    assert max(abs(a - b) for a, b in zip(stock, patched, strict=True)) < tolerance
    assert results[0]["value"] == pytest.approx(results[1]["value"], abs=0.05)


def reloaded_accuracy(folder, data):
    """Accuracy on the validation rows by stock transformers alone."""
    from fastformer.demo.data import read_corpus

    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert type(model).__mro__[1].__module__.startswith("transformers")
    names = [model.config.id2label[i] for i in range(model.config.num_labels)]
    rows = read_corpus(data / "validation.csv.gz", "text", "label", known=names)
    with torch.no_grad():
        batch = tokenizer(rows.texts, padding=True, truncation=True, max_length=32, return_tensors="pt")
        predicted = model(**batch).logits.argmax(-1)
    return (predicted == torch.tensor(rows.labels)).float().mean().item()


def test_sentiment(reviews, tmp_path, capsys):
    results, folder = run_both("sentiment", reviews, tmp_path, "--epochs", "4", "--learning-rate", "0.005")
    assert_same(results)
    assert results[1]["value"] > 0.9
    assert reloaded_accuracy(folder, reviews) == pytest.approx(results[1]["value"])
    printed = capsys.readouterr()
    assert "macro avg" in printed.out
    assert "tokens/s" in printed.out
    assert "%|" in printed.err  # a progress bar
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json", "model.safetensors", "result.json", "tokenizer.json", "tokenizer_config.json"
    ]  # fmt: skip
    # And on from there.
    arguments = ["--data", str(reviews / "train.csv"), "--model", str(folder), "--max-length", "32", "--rows", "16"]
    again = importlib.import_module("sentiment").main(
        [*arguments, "--epochs", "1", "--output", str(tmp_path / "again")]
    )
    assert again["losses"][0] < 0.3


def test_named_entities(entities, tmp_path, capsys):
    results, folder = run_both("ner", entities, tmp_path, "--epochs", "6", "--learning-rate", "0.01")
    assert_same(results)
    assert results[1]["value"] > 0.9
    assert "town" in capsys.readouterr().out
    model = transformers.AutoModelForTokenClassification.from_pretrained(folder)
    assert model.config.id2label[0] == "O"


@pytest.mark.parametrize("objective", ["mlm", "mlm+nsp", "clm"])
def test_pretraining(objective, corpus, tmp_path):
    results, folder = run_both("pretrain", corpus, tmp_path, "--objective", objective, "--steps", "12")
    assert_same(results)
    assert results[1]["losses"][-1] < results[1]["losses"][0]
    kind = {"clm": "AutoModelForCausalLM"}.get(objective, "AutoModelForMaskedLM")
    model = getattr(transformers, kind).from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert model(**tokenizer("the sun", return_tensors="pt")).logits.shape[-1] == len(tokenizer)


def test_distillation(reviews, tmp_path):
    results, folder = run_both(
        "distill", reviews, tmp_path, "--epochs", "2", "--layers", "4", "--learning-rate", "0.003"
    )
    assert_same(results)
    assert reloaded_accuracy(folder, reviews) == pytest.approx(results[1]["value"])
    assert transformers.AutoConfig.from_pretrained(folder).num_hidden_layers == 2
    assert reloaded_accuracy(folder / "teacher", reviews) == pytest.approx(results[1]["teacher_accuracy"])


@pytest.mark.parametrize("method", ["lora", "adalora", "prefix", "freeze"])
def test_few_parameters(method, reviews, tmp_path):
    pytest.importorskip("peft")
    results, folder = run_both("peft_lora", reviews, tmp_path, *CLASSIFIER, "--method", method, "--rank", "2")
    assert_same(results)
    if method in ("lora", "adalora"):
        assert results[1]["merged_difference"] < 1e-5
    if method != "prefix":
        assert reloaded_accuracy(folder, reviews) == pytest.approx(results[1]["value"], abs=1e-6)
    else:
        import peft

        base = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
        adapted = peft.PeftModel.from_pretrained(base, folder / "adapter")
        assert adapted.active_peft_config.num_virtual_tokens == 2
    assert results[1]["trainable"] < sum(p.numel() for p in transformers.AutoModel.from_pretrained(folder).parameters())


def test_adapters_move_the_model_before_they_are_merged(reviews, tmp_path):
    """The comparison of merged and adapted answers would be empty if the adapter had learned nothing."""
    pytest.importorskip("peft")
    recipe = importlib.import_module("peft_lora")
    arguments = ["--data", str(reviews), *SMALL, "--rank", "4", "--learning-rate", "0.02", "--epochs", "3"]
    result = recipe.main([*arguments, "--output", str(tmp_path)])
    assert result["losses"][-1] < result["losses"][0] - 0.05


def test_int8(reviews, tmp_path, capsys):
    pytest.importorskip("torchao")
    results, folder = run_both("quantize", reviews, tmp_path, *CLASSIFIER)
    assert_same(results, tolerance=2e-2)  # rounding to int8 turns a difference of 1e-7 into a step
    table = results[1]["table"]
    assert list(table) == ["float32", "int8 weights", "int8 dynamic", "int8 dynamic after QAT"]
    assert table["int8 weights"]["bytes"] < table["float32"]["bytes"]
    assert all(row["cpu_tokens_per_second"] > 0 for row in table.values())
    assert "by CPU time" in capsys.readouterr().out
    for name in ("int8-weights", "int8-dynamic", "int8-dynamic-after-QAT"):
        assert reloaded_accuracy(folder / name, reviews) == pytest.approx(
            table[name.replace("-", " ")]["accuracy"], abs=0.05
        )
        model = transformers.AutoModelForSequenceClassification.from_pretrained(folder / name)
        assert type(model.bert.encoder.layer[0].intermediate.dense.weight) is not torch.nn.Parameter


def test_robust(reviews, tmp_path):
    results, folder = run_both("robust", reviews, tmp_path, *CLASSIFIER, "--noise", "0.2", "--learning-rate", "0.003")
    assert_same(results)
    assert reloaded_accuracy(folder, reviews) == pytest.approx(results[1]["clean_accuracy"])


def test_adversarial_steps_are_half_as_long_as_an_embedding(reviews, tmp_path, monkeypatch):
    """Whatever the scale of the embeddings, and they are back where they were afterwards."""
    robust = importlib.import_module("robust")
    seen = []
    plain = transformers.Trainer.training_step

    def watched(self, model, inputs, *args, **kwargs):
        seen.append(model.get_input_embeddings().weight.detach().clone())
        return plain(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(transformers.Trainer, "training_step", watched)
    robust.main(["--data", str(reviews), *SMALL, "--epochs", "1", "--r-drop", "0", "--output", str(tmp_path)])
    assert len(seen) == 16
    before, moved = seen[:2]
    torch.testing.assert_close((moved - before).norm(), 0.5 * before.norm(dim=1).mean())
    rate = 5e-4  # AdamW's first steps move a weight by less than this
    assert (seen[2] - before).abs().max() <= rate
