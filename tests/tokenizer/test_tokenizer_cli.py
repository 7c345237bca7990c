"""The command line, in process and through pipes."""

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastformer.tokenizer import BPETokenizer, cli


def run(*words: object) -> int:
    parser = argparse.ArgumentParser()
    cli.add_parser(parser.add_subparsers(required=True))
    args = parser.parse_args(["tokenizer", *map(str, words)])
    return args.run(args)


def test_round_trip(tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    text = "Hello world, hello 世界!\n" * 50
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    run("train", tmp_path / "a.txt", "-o", tmp_path / "tok", "--vocab-size", 300, "--special", "<pad>")
    tok = BPETokenizer.from_file(tmp_path / "tok")
    assert tok.special_tokens == {"<pad>": 0}
    run("encode", tmp_path / "tok", tmp_path / "a.txt", "-o", tmp_path / "ids.txt")
    assert [int(word) for word in (tmp_path / "ids.txt").read_text().split()] == tok.encode(text)
    run("encode", tmp_path / "tok", tmp_path / "a.txt", "-o", tmp_path / "ids.bin", "--binary")
    assert np.fromfile(tmp_path / "ids.bin", "<u4").tolist() == tok.encode(text)
    run("decode", tmp_path / "tok", tmp_path / "ids.txt", "-o", tmp_path / "b.txt")
    run("decode", tmp_path / "tok", tmp_path / "ids.bin", "-o", tmp_path / "c.txt", "--binary")
    assert (tmp_path / "b.txt").read_text(encoding="utf-8") == text == (tmp_path / "c.txt").read_text(encoding="utf-8")
    capsysbinary.readouterr()
    run("count", tmp_path / "tok", tmp_path / "a.txt", tmp_path / "a.txt")
    assert capsysbinary.readouterr().out.split()[0] == str(len(tok.encode(text))).encode()
    run("convert", tmp_path / "tok", tmp_path / "again.json")
    assert BPETokenizer.from_file(tmp_path / "again.json").encode(text) == tok.encode(text)
    with pytest.raises(ValueError, match="decimal"):
        run("decode", tmp_path / "tok", tmp_path / "a.txt", "-o", tmp_path / "d.txt")


def test_pipes(tmp_path: Path, trained: BPETokenizer) -> None:
    trained.save(tmp_path)
    code = (
        "import argparse; from fastformer.tokenizer import cli; p = argparse.ArgumentParser(); "
        "cli.add_parser(p.add_subparsers()); a = p.parse_args(); a.run(a)"
    )
    command = [sys.executable, "-c", code, "tokenizer"]
    ids = subprocess.run([*command, "encode", tmp_path], input=b"Hello world", capture_output=True, check=True).stdout
    assert [int(word) for word in ids.split()] == trained.encode("Hello world")
    back = subprocess.run([*command, "decode", tmp_path], input=ids, capture_output=True, check=True).stdout
    assert back == b"Hello world"


def test_what_fails_leaves_the_output_as_it_was(tmp_path: Path, trained: BPETokenizer) -> None:
    trained.save(tmp_path / "tok")
    (tmp_path / "ids.txt").write_text("1 2 x")
    (tmp_path / "old.txt").write_text("kept")
    for output in ("old.txt", "new.txt"):
        with pytest.raises(ValueError, match="needs decimal ids"):
            run("decode", tmp_path / "tok", tmp_path / "ids.txt", "-o", tmp_path / output)
    assert (tmp_path / "old.txt").read_text() == "kept"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ids.txt", "old.txt", "tok"]
    (tmp_path / "ids.txt").write_text("1 2")
    assert run("decode", tmp_path / "tok", tmp_path / "ids.txt", "-o", "/dev/null") == 0
