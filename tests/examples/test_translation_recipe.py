"""The translation recipe: stock and patched on the same sentences."""

import copy
import importlib
import json
import random

import pytest
import torch

import fastformer as ff
import fastformer.nn as fnn

pytest.importorskip("transformers", minversion="5")
pytest.importorskip("sacrebleu")
import tests.examples.conftest  # noqa: F401  # puts the recipes on the path
from fastformer.demo.errors import UserError

SMALL = ["--width=64", "--layers=1", "--vocab-size=300", "--batch-size=16", "--steps=25", "--dropout=0"]


@pytest.fixture(scope="module")
def recipe():
    return importlib.import_module("translation")


def write_toy(folder):
    """Sentences of a language whose translation is word by word, in the other order."""
    words = {"red": "rot", "green": "gruen", "dog": "hund", "cat": "katze", "runs": "rennt", "sleeps": "schlaeft"}
    rng = random.Random(0)
    for name, count in (("train", 200), ("val", 6)):
        lines = [[rng.choice(list(words)) for _ in range(rng.randint(1, 6))] for _ in range(count)]
        folder.joinpath(f"{name}.en").write_text("\n".join(map(" ".join, lines)))
        folder.joinpath(f"{name}.de").write_text("\n".join(" ".join(words[w] for w in line[::-1]) for line in lines))


def losses(recipe, folder, output, *arguments):
    """Of the patched and of the stock run, whose files go to output/--patch and output/--no-patch."""
    for patch in ("--patch", "--no-patch"):
        fnn.reset_count()
        result = recipe.main(["--data", str(folder), *SMALL, *arguments, patch, "--output", str(output / patch)])
        assert bool(fnn.count().fused["TransformerDecoder"]) == (patch == "--patch")
        assert not fnn.count().fallback
        assert json.loads((output / patch / "result.json").read_text())["losses"] == result["losses"]
        assert result["tokens"] > 0
        yield result["losses"]


def test_translation(recipe, tmp_path, capsys):
    write_toy(tmp_path)
    patched, stock = losses(recipe, tmp_path, tmp_path, "--beams", "1", "3")
    assert max(abs(a - b) for a, b in zip(patched, stock, strict=True)) < 1e-4
    assert patched[-1] < patched[0] - 1
    for beams in (1, 3):
        found, stock_found = ((tmp_path / run / f"beams-{beams}.de").read_text() for run in ("--patch", "--no-patch"))
        assert found == stock_found
        assert found.count("\n") == 6
    assert capsys.readouterr().out.count("beams: BLEU = ") == 4
    # Stock torch.nn takes the weights.
    weights = torch.load(tmp_path / "--patch" / "model.pt", weights_only=True)
    recipe.Translator(
        len(ff.BPETokenizer.from_file(tmp_path / "--patch" / "tokenizer.json")), 64, 1, 0.0
    ).load_state_dict(weights)


@pytest.mark.parametrize("beams", [1, 3])
def test_beams_through_the_cache_are_beams_without(recipe, beams):
    tok = ff.BPETokenizer.train(["a b c d e f g h"] * 3, 270, special_tokens=["<pad>", "<s>", "</s>"])
    torch.manual_seed(0)
    model = recipe.Translator(len(tok), 64, 2, 0.0).eval()
    patched = copy.deepcopy(model)
    ff.patch(patched)
    source = torch.nn.utils.rnn.pad_sequence(
        recipe.encode(tok, ["a b c", "d", "e f g h a b"]), True, tok.token_to_id("<pad>")
    )
    assert patched.translate(source, tok, beams, 12) == model.translate(source, tok, beams, 12)


def test_losses_on_real_sentences(recipe, data_dir, tmp_path):
    """Sentence pairs of Multi30K: the same losses, stock and patched, for a fixed number of steps."""
    folder = data_dir / "multi30k"
    if not folder.is_dir():
        pytest.skip(f"no multi30k in {data_dir}")
    runs = losses(recipe, folder, tmp_path, "--vocab-size", "2000", "--beams", "--steps", "20")
    assert max(abs(a - b) for a, b in zip(*runs, strict=True)) < 1e-4


def test_lines_that_are_no_pairs(recipe, tmp_path):
    write_toy(tmp_path)
    with (tmp_path / "train.de").open("a") as file:
        file.write("\nrot")
    arguments = ["--data", str(tmp_path), *SMALL, "--output", str(tmp_path / "out")]
    with pytest.raises(UserError, match=r"200 lines and .* 201"):
        recipe.main(arguments)
    (tmp_path / "val.de").unlink()
    (tmp_path / "train.de").unlink()
    with pytest.raises(UserError, match=r"there is no file .*train\.de\.gz"):
        recipe.main(arguments)
    with pytest.raises(UserError, match="--width"):
        recipe.main([*arguments, "--width", "65"])
    assert not (tmp_path / "out").exists()
