"""examples/compress.py from one end to the other, on rows that are easily told apart."""

import csv
import gzip
import importlib.util
import random
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", minversion="5")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")
from fastformer.compress import load

EXAMPLE = Path(__file__).parents[2] / "examples" / "compress.py"
SMALL = (
    "--rows 96 --test-rows 64 --batch 16 --interval 15 --evaluations 14 --width 32 --layers 2 --vocab 300 --patience 2"
)


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
def recipe():
    spec = importlib.util.spec_from_file_location("compress_recipe", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("train", "validation", "message"),
    [
        (None, None, "holds neither train.csv nor train.csv.gz"),
        ("text,label\n", "text,label\na,0\n", "got no row"),
        ("words,label\na,0\n", "text,label\na,0\n", r"columns text and label, got \['words', 'label'\]"),
        ("text,label\na,0\nb,1\n", "text,label\na,2\n", r"no training row has the labels \['2'\]"),
    ],
)
def test_bad_data(recipe, train, validation, message, tmp_path):
    for name, text in (("train.csv", train), ("validation.csv", validation)):
        if text is not None:
            (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit, match=message):
        recipe.main(["--data", str(tmp_path), "--test-rows", "0"])


@pytest.mark.parametrize("patch", ["--patch", "--no-patch"])
def test_recipe(recipe, patch, tmp_path, capsys):
    write(tmp_path / "train.csv.gz", 160, 0)
    write(tmp_path / "validation.csv.gz", 64, 1)
    out = tmp_path / "out"
    report = recipe.main(["--data", str(tmp_path), "--output", str(out), "--lr", "3e-3", patch, *SMALL.split()])
    assert report.within_tolerance
    assert report.test[0] > 0.9
    assert report.test[1] > 0.9
    assert report.encoder_parameters[1] < 0.7 * report.encoder_parameters[0]
    assert "one shot" in capsys.readouterr().out
    assert {"report.md", "compression.png", "config.json", "tokenizer.json"} <= {path.name for path in out.iterdir()}
    model = load(out)
    assert sum(p.numel() for p in model.parameters()) == report.parameters[1]
    assert model(torch.tensor([[1, 5, 6, 2]])).logits.shape == (1, 2)
