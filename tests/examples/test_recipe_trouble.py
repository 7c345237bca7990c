"""What goes wrong: input that is none, losses that become NaN, Ctrl-C, and what is left afterwards."""

import gzip
import importlib
import sys

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5")
pytest.importorskip("sklearn")
import recipe  # noqa: E402
import recipe_trainer  # noqa: E402

from fastformer.demo.errors import UserError  # noqa: E402
from tests.examples.conftest import SMALL  # noqa: E402

ROW = "label,text\n"


def write(folder, train, validation=None, ending=".csv"):
    folder.mkdir(exist_ok=True)
    for name, content in (("train", train), ("validation", train if validation is None else validation)):
        data = content if isinstance(content, bytes) else content.encode()
        (folder / f"{name}{ending}").write_bytes(data)
    return folder


def fails(name, *arguments):
    """The one sentence that a recipe refuses its arguments with."""
    pytest.importorskip("seqeval" if name == "ner" else "sklearn")
    with pytest.raises(UserError) as raised:
        importlib.import_module(name).main([*map(str, arguments)])
    message = str(raised.value)
    assert "\n" not in message
    return message


GOOD = ROW + "a,x y\nb,y z\n" * 6


@pytest.mark.parametrize(
    ("train", "validation", "message"),
    [
        ("text,stars\nx,1\n", None, "has no column 'label'; its columns are 'text', 'stars'"),
        (GOOD, ROW + "a,x\nc,y\n", "labels that the training data does not have: 'c'"),
        ("", None, "is empty"),
        (ROW, None, "no rows with text"),
        (ROW + "a,x\na,y\n", None, "only one label"),
        (ROW + "a,x\nb\n", None, "line 3: the row does not have the header's 2 fields"),
        (b"label,text\na,\xff\n", None, "is not UTF-8: line 2"),
        (GOOD, "", "validation.csv is empty"),
    ],
)
def test_rows_that_cannot_be_used(train, validation, message, tmp_path):
    data = write(tmp_path / "data", train, validation)
    assert message in fails("sentiment", "--data", data, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_that_cannot_be_used(tmp_path):
    assert "there is no file" in fails("sentiment", "--data", tmp_path / "none.csv")
    assert "ends in .csv or .jsonl" in fails("sentiment", "--data", tmp_path / "none.parquet")
    (tmp_path / "empty").mkdir()
    assert "holds none of train.csv" in fails("sentiment", "--data", tmp_path / "empty")
    broken = write(tmp_path / "broken", gzip.compress(GOOD.encode())[:-9], ending=".csv.gz")
    assert "no whole gzip file" in fails("sentiment", "--data", broken)
    assert "neither a text file nor a folder" in fails("pretrain", "--data", tmp_path / "empty")
    (tmp_path / "blank.txt").write_text("\n\n")
    arguments = ("--data", tmp_path / "blank.txt", "--output", tmp_path / "out", *SMALL)
    assert "no text to learn from" in fails("pretrain", *arguments)
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe x")
    assert "is not UTF-8" in fails("pretrain", "--data", tmp_path / "bytes.txt", "--output", tmp_path / "out")
    (tmp_path / "short.txt.xz").write_bytes(b"\xfd7zXZ\x00")
    assert "cannot be read" in fails("pretrain", "--data", tmp_path / "short.txt.xz", "--output", tmp_path / "out")


@pytest.mark.parametrize(
    ("train", "validation", "message"),
    [
        ("word\n", None, "line 1: a word and its label are needed, got 'word'"),
        ("Bonn\tB-town\nis\tX\n", None, "line 2: the label 'X' is none of O, B-x and I-x"),
        ("\n\t\n", None, "is empty"),
        ("-DOCSTART- O\n\n", None, "holds no sentences"),
        ("Bonn B-town\n", "Li B-person\n", "labels that the training data does not have: 'B-person'"),
    ],
)
def test_sentences_that_cannot_be_used(train, validation, message, tmp_path):
    data = write(tmp_path / "data", train, validation, ".conll")
    assert message in fails("ner", "--data", data, "--output", tmp_path / "out")
    if validation is None:
        assert "--data needs a folder" in fails("ner", "--data", data / "train.conll")


def test_numbers_that_cannot_be(reviews, tmp_path, capsys):
    common = ("--data", reviews, "--output", tmp_path / "out")
    assert "--width must be a multiple of 64" in fails("sentiment", *common, "--width", "100")
    assert "--dropout must be at least 0" in fails("sentiment", *common, "--dropout", "1.5")
    assert "vocab_size must be" in fails("sentiment", *common, "--vocab-size", "100")
    assert "there is no such folder" in fails("sentiment", *common, "--model", tmp_path / "none")
    assert "--noise must be" in fails("robust", *common, "--noise", "1")
    assert "--temperature must be positive" in fails("distill", *common, "--temperature", "0")
    assert "two layers or more" in fails("distill", *common, *SMALL, "--layers", "1", "--epochs", "1")
    capsys.readouterr()
    for arguments in (["--epochs", "0"], ["--learning-rate", "2"], ["--rows", "many"], []):
        with pytest.raises(SystemExit) as left:
            importlib.import_module("sentiment").main(["--data", str(reviews), *arguments] if arguments else [])
        assert left.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_words_and_their_first_tokens():
    """Tokens that span words, begin inside characters, or were cut off; offsets as tokenizers give them."""
    from ner import first_tokens

    words = ["ab", "😀c", "d"]  # "ab 😀c d"
    assert first_tokens(words, [(0, 0), (0, 1), (1, 2), (2, 4), (3, 4), (4, 5), (5, 7), (0, 0)]) == [1, 3, 6]
    assert first_tokens(words, [(0, 4), (4, 5), (6, 7)]) == [0, 1, 2]
    assert first_tokens(words, [(0, 2), (6, 7)]) == [0, None, 1]
    assert first_tokens(words, [(0, 2)]) == [0, None, None]
    assert first_tokens(words, []) == [None] * 3


class Planted:
    """Does `what` to the loss of the step of that number, counted from 1."""

    def __init__(self, monkeypatch, step, what):
        self.seen, stock = 0, recipe_trainer.Trainer.compute_loss

        def compute_loss(trainer, model, inputs, return_outputs=False, **kwargs):
            out = stock(trainer, model, inputs, return_outputs, **kwargs)
            self.seen += model.training
            return what(out) if model.training and self.seen == step else out

        monkeypatch.setattr(recipe_trainer.Trainer, "compute_loss", compute_loss)


def interrupt(loss):
    raise KeyboardInterrupt


def run_as_command(name, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
    return recipe.run(lambda argv: importlib.import_module(name).main(argv))


def test_a_loss_of_nan_stops_and_leaves_the_last_good_checkpoint(reviews, tmp_path, monkeypatch, capsys):
    Planted(monkeypatch, 6, lambda loss: loss * torch.nan)
    arguments = ("--data", reviews, *SMALL, "--save-every", "4", "--output", tmp_path)
    assert run_as_command("sentiment", monkeypatch, *arguments) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert "sentiment.py: the loss became nan at step 6; the last good checkpoint is" in message
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    assert checkpoint.name == "checkpoint-4"
    assert str(checkpoint) in message
    model = transformers.AutoModelForSequenceClassification.from_pretrained(checkpoint)
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    assert not (tmp_path / "model.safetensors").exists()


def test_weights_of_nan_are_found_where_the_loss_was_finite():
    watch, model = recipe_trainer.LossWatch(), torch.nn.Linear(2, 2)
    watch.see(torch.tensor(1.0))
    watch.check(model)
    with torch.no_grad():
        model.bias[1] = torch.inf
    with pytest.raises(recipe.Diverged, match="weights became NaN or infinite by step 8, bias first"):
        watch.check(model, steps_before=7)
    watch.see(torch.tensor(-torch.inf))
    with pytest.raises(recipe.Diverged, match="the loss became -inf at step 2"):
        watch.check(model)


def test_ctrl_c_says_how_to_go_on_and_going_on_ends_alike(reviews, tmp_path, monkeypatch, capsys):
    arguments = ("--data", reviews, *SMALL, "--save-every", "4", "--epochs", "2")
    whole = importlib.import_module("sentiment").main([*map(str, arguments), "--output", str(tmp_path / "whole")])
    with monkeypatch.context() as planted:
        Planted(planted, 11, interrupt)
        assert run_as_command("sentiment", planted, *arguments, "--output", tmp_path / "cut") == 130
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("sentiment.py: interrupted; the last good checkpoint is")
    assert message.endswith("checkpoint-8.")
    # Another run must not be mistaken for it.
    assert run_as_command("sentiment", monkeypatch, *arguments, "--output", tmp_path / "cut") == 2
    assert "give --resume or another --output" in capsys.readouterr().err
    rest = importlib.import_module("sentiment").main(
        [*map(str, arguments), "--output", str(tmp_path / "cut"), "--resume"]
    )
    assert rest["losses"] == pytest.approx(whole["losses"][8:], abs=1e-5)
    assert not (tmp_path / "cut" / "checkpoints").exists()
