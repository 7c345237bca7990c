"""The command line from outside: what it prints, its exit codes, and every kind of input that cannot be used."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastformer.cli import main
from fastformer.version import __version__


def fastformer(*args: str, cwd: Path | None = None, code: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run `fastformer args` in a process of its own; `code` runs first in that process."""
    program = f"import sys\n{code or ''}\nfrom fastformer.cli import main\nsys.exit(main(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", program, *args],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )


def refused(result: subprocess.CompletedProcess[str]) -> str:
    """Check that a run was refused as it should be, and return its one sentence."""
    lines = [line for line in result.stderr.splitlines() if "importing PyTorch" not in line]
    assert result.returncode == 2, result
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("fastformer")
    return lines[0]


GOOD = "text,label\n" + "".join(f"passage number {i} about {topic},{topic}\n" for i in range(8) for topic in "ab")


@pytest.mark.parametrize(
    ("name", "content", "arguments", "words"),
    [
        ("missing.csv", None, (), ["there is no file", "missing.csv"]),
        ("empty.csv", b"", (), ["is empty"]),
        ("blank.jsonl", b" \n\n", (), ["is empty"]),
        ("latin.csv", "text,label\ncafé,a\n".encode("latin-1"), (), ["not UTF-8", "line 2", "0xe9"]),
        ("columns.csv", b"body,label\nx,a\n", (), ["no column 'text'", "'body', 'label'"]),
        ("columns.csv", b"text,topic\nx,a\n", (), ["no column 'label'", "'text', 'topic'"]),
        ("header.csv", b"text,label\n", (), ["no rows with text"]),
        ("one.csv", b"text,label\nx,a\ny,a\n", (), ["only one label", "'a'"]),
        ("short.csv", b"text,label\nx,a\ny\n", (), ["line 3", "2 fields"]),
        ("long.csv", b"text,label\nx,a\ny,b,c\n", (), ["line 3", "2 fields"]),
        ("nolabel.csv", b"text,label\nx,a\ny, \n", (), ["line 3", "'label' is empty"]),
        ("quote.csv", b'text,label\n"x" y,a\n', (), ["line 2", "no valid CSV"]),
        ("unique.csv", b"text,label\nx,a\ny,b\nz,c\n", (), ["3 different labels", "no column of classes"]),
        ("broken.jsonl", b'{"text": "x", "label": 1}\n{"text": \n', (), ["line 2", "no valid JSON"]),
        ("list.jsonl", b"[1]\n", (), ["line 1", "object", "list"]),
        ("field.jsonl", b'{"text": "x"}\n', (), ["line 1", "no 'label'"]),
        ("number.jsonl", b'{"text": 3, "label": 1}\n', (), ["line 1", "'text' is no string"]),
        ("null.jsonl", b'{"text": "x", "label": null}\n', (), ["line 1", "'label' is None"]),
        ("table.xlsx", b"PK", (), ["ends in .csv or .jsonl", "table.xlsx"]),
        ("folder.csv", "folder", (), ["cannot be read", "directory"]),
        ("good.csv", GOOD.encode(), ("--text-column", "body"), ["no column 'body'"]),
    ],
)
def test_data_that_cannot_be_used(tmp_path, monkeypatch, capsys, name, content, arguments, words):
    monkeypatch.chdir(tmp_path)
    if content == "folder":
        Path(name).mkdir()
    elif content is not None:
        Path(name).write_bytes(content)
    before = set(tmp_path.iterdir())
    code = main(["demo", "--data", name, *arguments])
    printed = capsys.readouterr()
    assert code == 2
    assert printed.out == ""
    assert printed.err.startswith("fastformer: ")
    assert printed.err.count("\n") == 1
    for word in words:
        assert word in printed.err
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", ["missing.csv", "latin.csv", "one.csv", "broken.jsonl"])
def test_refusal_as_a_shell_sees_it(tmp_path, name):
    """Exit code 2, one line on stderr, no traceback, nothing written."""
    contents = {"latin.csv": b"text,label\n\xe9,a\n", "one.csv": b"text,label\nx,a\n", "broken.jsonl": b"{\n"}
    if name in contents:
        (tmp_path / name).write_bytes(contents[name])
    before = set(tmp_path.iterdir())
    assert name in refused(fastformer("demo", "--data", name, cwd=tmp_path))
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "arguments",
    [
        ("--epochs", "0"),
        ("--epochs", "two"),
        ("--batch-size", "-4"),
        ("--max-length", "2"),
        ("--max-length", "1e3"),
        ("--steps", "0"),
        ("--seed", "-1"),
        ("--learning-rate", "nan"),
        ("--learning-rate", "-1e-3"),
        ("--wrong", "1"),
    ],
)
def test_arguments_that_make_no_sense(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["demo", *arguments])
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("fastformer")
    assert arguments[0] in printed
    assert printed.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_output_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("in the way")
    for output in ("file", "file/below"):
        assert main(["demo", "--output", output]) == 2
        assert f"--output {output} cannot be written" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "in the way"


def test_missing_packages_are_named_with_the_command_that_installs_them(tmp_path):
    hide = (
        "import importlib.util as u; real = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name in ('matplotlib', 'sklearn') else real(name, *a)"
    )
    sentence = refused(fastformer("demo", cwd=tmp_path, code=hide))
    assert "matplotlib" in sentence
    assert "scikit-learn" in sentence
    assert 'pip install "fastformer[demo]"' in sentence
    assert "matplotlib" not in refused(fastformer("demo", "--no-plot", cwd=tmp_path, code=hide))


def test_tokenizer_and_model_that_are_not_there(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "good.csv").write_text(GOOD)
    (tmp_path / "tokenizer.json").write_text("{")
    (tmp_path / "empty").mkdir()
    for arguments in (
        ("--tokenizer", "nowhere.json"),
        ("--tokenizer", "tokenizer.json"),
        ("--model", "./nowhere"),
        ("--model", "./empty"),
    ):
        assert main(["demo", "--data", "good.csv", *arguments]) == 2
        *_, sentence = capsys.readouterr().err.splitlines()
        assert sentence.startswith("fastformer: ")
        assert " ".join(arguments) in sentence
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "good.csv", "tokenizer.json"]


def test_no_command_version_and_help():
    assert refused(fastformer()).startswith("fastformer: the following arguments are required")
    assert fastformer("--version").stdout == f"fastformer {__version__}\n"
    for command in ("demo", "info"):
        assert fastformer(command, "--help").stdout.startswith(f"usage: fastformer {command}")


def test_parsing_and_reading_import_no_torch(tmp_path):
    (tmp_path / "one.csv").write_text("text,label\nx,a\n")
    report = "import atexit\natexit.register(lambda: print('torch' in sys.modules, 'transformers' in sys.modules))"
    result = fastformer("demo", "--data", "one.csv", cwd=tmp_path, code=report)
    assert result.stdout == "False False\n"


def test_info():
    text = fastformer("info").stdout
    assert __version__ in text
    assert "cpu" in text
    found = json.loads(fastformer("info", "--json").stdout)
    assert found["versions"]["fastformer"] == __version__
    assert found["devices"][0][0] == "cpu"


def test_tokenizer(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("low lower lowest\n" * 9)
    assert main(["tokenizer", "train", "text.txt", "--vocab-size", "260", "-o", "tokenizer.json"]) == 0
    assert main(["tokenizer", "encode", "tokenizer.json", "text.txt", "-o", "ids.txt"]) == 0
    assert main(["tokenizer", "decode", "tokenizer.json", "ids.txt", "-o", "back.txt"]) == 0
    assert Path("back.txt").read_text() == Path("text.txt").read_text()
    capsys.readouterr()
    Path("bad.txt").write_text("1 99999")
    Path("words.txt").write_text("one two")
    for arguments, words in (
        (["train", "missing.txt", "-o", "x.json"], "missing.txt"),
        (["train", "text.txt", "--vocab-size", "3", "-o", "x.json"], "vocab_size"),
        (["encode", "missing.json", "text.txt"], "missing.json"),
        (["encode", "tokenizer.json", "missing.txt"], "missing.txt: No such file or directory"),
        (["decode", "tokenizer.json", "bad.txt"], "99999"),
        (["decode", "tokenizer.json", "words.txt"], "words.txt"),
    ):
        assert main(["tokenizer", *arguments]) == 2
        printed = capsys.readouterr().err
        assert printed.startswith("fastformer: ")
        assert printed.count("\n") == 1
        assert words in printed
    assert not Path("x.json").exists()


def test_without_the_engine_the_tokenizer_says_so_and_info_runs():
    hide = "sys.modules['fastformer.tokenizer._bpe'] = None"
    assert "_bpe" in refused(fastformer("tokenizer", "encode", "x.json", "--binary", code=hide))
    assert "not built" in fastformer("info", code=hide).stdout


def test_a_reader_that_stops_early_is_no_error(tmp_path):
    (tmp_path / "text.txt").write_text("low lower lowest")
    assert main(["tokenizer", "train", str(tmp_path / "text.txt"), "--vocab-size", "256", "-o", str(tmp_path)]) == 0
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(
        [sys.executable, "-m", "fastformer.cli", "tokenizer", "count", str(tmp_path), str(tmp_path / "text.txt")],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    os.close(writer)
    assert (result.returncode, result.stderr) == (1, "")
