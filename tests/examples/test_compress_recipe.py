"""examples/compress.py from one end to the other, on rows that are easily told apart."""

import csv
import gzip
import importlib
import random

import pytest
import torch

pytest.importorskip("transformers", minversion="5")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
from fastformer.compress import load
from fastformer.demo.errors import UserError

SMALL = "--rows 160 --test-rows 64 --batch-size 16 --interval 15 --evaluations 14 --width 32 --layers 2 --patience 2"


def write(path, count, seed):
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        label = draw.choice(["bad", "good"])
        words = [label, *draw.choices([label, "一", "so", "book"], k=draw.randint(0, 6))]
        draw.shuffle(words)
        rows.append({"text": " ".join(words), "label": label})
    with gzip.open(path, "wt", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ("text", "label"))
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("told-apart")
    write(folder / "train.csv.gz", 160, 0)
    write(folder / "validation.csv.gz", 64, 1)
    return folder


@pytest.fixture(scope="module")
def compress():
    return importlib.import_module("compress")


@pytest.mark.parametrize("argument", ["--resume", "--tolerance=0", "--rise=nan"])
def test_arguments_that_cannot_be(compress, argument, data, tmp_path):
    with pytest.raises(UserError, match=argument.split("=")[0]):
        compress.main(["--data", str(data), "--output", str(tmp_path / "out"), argument])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("patch", ["--patch", "--no-patch"])
def test_compression(compress, patch, data, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--data", str(data), "--output", str(out), "--learning-rate", "3e-3", "--vocab-size", "300"]
    result = compress.main([*arguments, patch, *SMALL.split()])
    assert result["dense_accuracy"] > 0.9
    assert result["value"] > 0.9
    assert result["encoder_parameters"][1] < 0.7 * result["encoder_parameters"][0]
    assert result["tokens_per_second"] > 0
    printed = capsys.readouterr()
    assert "at once" in printed.out
    assert "%|" in printed.err
    expected = {"report.md", "compression.png", "config.json", "tokenizer.json", "result.json", "model.safetensors"}
    assert expected <= {path.name for path in out.iterdir()}
    model = load(out)
    encoder = sum(p.numel() for p in model.bert.encoder.parameters())
    assert encoder == result["encoder_parameters"][1]
    assert model(torch.tensor([[1, 5, 6, 2]])).logits.shape == (1, 2)


def test_a_loss_that_is_no_number_stops_it(compress, data, tmp_path, monkeypatch):
    """The weights of the last evaluation are saved, and the message says where it stopped."""
    import recipe

    calls = []
    step = compress.Compressing.training_step

    def poisoned(self, model, inputs, *args, **kwargs):
        calls.append(None)
        loss = step(self, model, inputs, *args, **kwargs)
        if len(calls) == 20:
            next(p for p in model.parameters() if p.grad is not None).grad.fill_(float("nan"))
        return loss

    monkeypatch.setattr(compress.Compressing, "training_step", poisoned)
    out = tmp_path / "out"
    with pytest.raises(recipe.Diverged, match=r"step 20.*saved"):
        compress.main(["--data", str(data), "--output", str(out), "--vocab-size", "300", *SMALL.split()])
    assert all(bool(p.isfinite().all()) for p in load(out).parameters())
