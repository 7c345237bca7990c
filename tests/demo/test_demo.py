"""The whole demo, small: on the default data, on one's own data and checkpoint, and interrupted."""

import functools
import json
import os
import re
import signal
import subprocess
import sys

import pytest

from fastformer.cli import main

pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

ROWS = ("stock, padded to max_length", "stock, dynamic padding", "patched, padded to max_length")


def rows_of(printed: str) -> list[list[str]]:
    """The cells of the table after the name of the run, row by row."""
    found = []
    for name in ROWS:
        (line,) = re.findall(rf"^{re.escape(name)} +(\S.*)$", printed, re.MULTILINE)
        found.append(re.split(r" {2,}", line))
    return found


def test_without_arguments_but_short(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--steps", "3", "--max-length", "32", "--batch-size", "4"]) == 0
    printed = capsys.readouterr()
    for row in rows_of(printed.out):
        tokens, _, seconds, memory, loss, accuracy, _ = row
        assert float(tokens.replace(",", "")) > 0
        assert re.fullmatch(r"\d+\.\d", seconds)
        assert memory.endswith("iB")
        assert 1 < float(loss) < 4
        assert 0 <= float(accuracy.rstrip("%")) <= 100
    assert "fastformer patch of BertForSequenceClassification" in printed.out
    assert "multiprocessing" in printed.out  # a row of the classification report
    assert "fine-tuning" in printed.err  # a progress bar
    assert sorted(os.listdir("demo-output")) == ["demo.png", "results.json", "tokenizer.json"]
    with open("demo-output/results.json") as file:
        results = json.load(file)
    assert [run["name"] for run in results["runs"]] == list(ROWS)
    assert all(len(run["losses"]) == 3 for run in results["runs"])
    assert all(run["seconds"] > 0 for run in results["runs"])  # the table rounds them
    assert results["runs"][0]["difference"] is None
    assert max(run["difference"] for run in results["runs"][1:]) < 1e-5
    # The tokenizer that was written is one that --tokenizer reads.
    arguments = ["demo", "--steps", "1", "--max-length", "16", "--no-plot", "--output", "again"]
    assert main([*arguments, "--tokenizer", "demo-output/tokenizer.json"]) == 0
    assert os.listdir("again") == ["results.json"]


@pytest.fixture
def checkpoint(tmp_path, tiny_bert):
    """A Hugging Face checkpoint folder with a head for three classes and a tokenizer of byte tokens."""
    from transformers import PreTrainedTokenizerFast

    from fastformer import BPETokenizer

    folder = tmp_path / "checkpoint"
    tokenizer = BPETokenizer.train(iter([]), 259, special_tokens=["[PAD]", "[CLS]", "[SEP]"])
    tokenizer.save(tmp_path / "bytes.json")
    fast = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "bytes.json"), pad_token="[PAD]")
    fast.save_pretrained(folder)
    model = tiny_bert()
    model.resize_token_embeddings(259)
    model.save_pretrained(folder)
    return folder


def write_reviews(path, rows: int = 40) -> None:
    lines = [{"review": f"{'good' if i % 2 else 'bad'} thing {'very ' * (i % 7)}", "stars": i % 2} for i in range(rows)]
    path.write_text("\n".join(json.dumps(line) for line in lines))


def test_own_data_and_checkpoint(tmp_path, monkeypatch, capsys, checkpoint):
    monkeypatch.chdir(tmp_path)
    write_reviews(tmp_path / "reviews.jsonl")
    before = sorted(path.name for path in checkpoint.iterdir())
    columns = ["--data", "reviews.jsonl", "--text-column", "review", "--label-column", "stars"]
    sizes = ["--max-length", "40", "--batch-size", "8", "--epochs", "2", "--no-plot", "--output", "out/deep"]
    assert main(["demo", *columns, "--model", str(checkpoint), *sizes]) == 0
    printed = capsys.readouterr()
    rows_of(printed.out)
    results = json.loads((tmp_path / "out" / "deep" / "results.json").read_text())
    assert results["settings"]["steps"] == 2 * 5  # 34 passages in batches of 8, twice
    assert results["settings"]["learning_rate"] == 5e-5
    assert max(run["difference"] for run in results["runs"][1:]) < 1e-5
    assert sorted(path.name for path in checkpoint.iterdir()) == before

    assert main(["demo", *columns, "--model", str(checkpoint), "--max-length", "49"]) == 2
    assert "--max-length 49 is more than the 48 positions" in capsys.readouterr().err
    assert not (tmp_path / "demo-output").exists()


def test_ctrl_c_leaves_nothing_unfinished(tmp_path):
    arguments = ["demo", "--steps", "1000", "--epochs", "9", "--max-length", "64", "--batch-size", "4"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fastformer.cli", *arguments],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        # A shell starts what runs in the background without the signal.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    seen = b""
    while b"fine-tuning" not in seen:
        read = process.stderr.read1()
        assert read, seen.decode()
        seen += read
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read().decode()
    assert process.wait(timeout=60) == 130
    lines = rest.replace("\r", "\n").splitlines()
    assert lines[-1] == "fastformer: interrupted."
    assert "Traceback" not in rest
    assert not list(tmp_path.iterdir())
