"""The recipes as modules, and data small enough to train on in a second."""

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

# Models, steps and texts as small as they may be; without dropout, stock and patched runs are the same to rounding.
SMALL = ["--width", "32", "--batch-size", "8", "--max-length", "32", "--vocab-size", "320", "--dropout", "0"]


@pytest.fixture(scope="session")
def reviews(tmp_path_factory) -> Path:
    """A folder with train.csv and validation.csv.gz: short texts whose words tell their label."""
    import csv
    import gzip

    folder = tmp_path_factory.mktemp("reviews")
    words = {"bad": ["awful", "很差", "dull", "😡"], "good": ["lovely", "很好", "fine", "😀"]}
    draw = random.Random(0)
    for name, count in (("train.csv", 64), ("validation.csv.gz", 24)):
        opener = gzip.open if name.endswith(".gz") else open
        with opener(folder / name, "wt", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["label", "text"])
            for i in range(count):
                label = ("bad", "good")[i % 2]
                text = [draw.choice(words[label]) for _ in range(draw.randint(1, 6))]
                writer.writerow([label, " ".join(["the", *text])])
    return folder


@pytest.fixture(scope="session")
def entities(tmp_path_factory) -> Path:
    """A folder with train.conll and validation.conll: names follow "Mr", towns follow "in"."""
    folder = tmp_path_factory.mktemp("entities")
    draw = random.Random(0)
    for name, count in (("train.conll", 48), ("validation.conll", 16)):
        lines = []
        for _ in range(count):
            lines += ["Mr\tO", f"{draw.choice(['Li', '王伟', 'Ro😀ss'])}\tB-person", "lives\tO"]
            lines += ["in\tO", f"{draw.choice(['Bonn', '北京'])}\tB-town", *["City\tI-town"] * draw.randint(0, 1), ""]
        (folder / name).write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A folder of text files, plain and compressed, some below it."""
    import gzip
    import lzma

    folder = tmp_path_factory.mktemp("corpus")
    (folder / "more").mkdir()
    draw = random.Random(0)

    def sentence() -> str:
        return " ".join(draw.choice(["sun", "moon", "月亮", "and", "rises"]) for _ in range(draw.randint(2, 9)))

    def text(count: int) -> str:
        return "\n\n".join("\n".join(sentence() for _ in range(draw.randint(1, 2))) for _ in range(count)) + "\n"

    (folder / "a.txt").write_text(text(150), encoding="utf-8")
    (folder / "b.txt.gz").write_bytes(gzip.compress(text(150).encode()))
    (folder / "more" / "c.txt.xz").write_bytes(lzma.compress(text(150).encode()))
    return folder
