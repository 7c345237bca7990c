"""The .ffbpe form and the cache folder: same ids, every kind of damage seen."""

import pickle
import warnings
from pathlib import Path

import pytest

from fastformer.tokenizer import BPETokenizer, files, image
from tests.tokenizer.conftest import hard_strings

SPECIALS = {"<|endoftext|>": 5000, "<pad>": 5001}


def kinds(ranks_file: Path, tmp_path: Path) -> dict[str, BPETokenizer]:
    texts = hard_strings(400, seed=60)
    merged = BPETokenizer.train(iter(texts), 900, "gpt2", special_tokens=["<s>"])
    merged.save(tmp_path / "tokenizer.json")
    with warnings.catch_warnings(action="ignore"):  # said once a process
        foreign = BPETokenizer.train(iter(texts), 400, r"\w+|\W")
    return {
        "ranks": BPETokenizer.from_file(ranks_file, pattern="cl100k", special_tokens=SPECIALS),
        "trained": merged,
        "json": BPETokenizer.from_file(tmp_path / "tokenizer.json"),
        "regex": foreign,
    }


def test_round_trip(ranks_file: Path, tmp_path: Path) -> None:
    texts = [*hard_strings(500, seed=61), "a" * 100, "世" * 50, ""]
    for name, tok in kinds(ranks_file, tmp_path).items():
        path = tmp_path / f"{name}.ffbpe"
        tok.save(path)
        for again in (BPETokenizer.from_file(path), pickle.loads(pickle.dumps(tok))):
            assert [again.encode(t, allowed_special="all") for t in texts] == [
                tok.encode(t, allowed_special="all") for t in texts
            ], name
            assert again.vocab == tok.vocab
            assert again.special_tokens == tok.special_tokens
            assert again.vocab_size == tok.vocab_size
            assert again.decode_bytes(tok.encode(texts[0])) == texts[0].encode()
            assert again.token_to_id(b"a") == tok.token_to_id(b"a")
        image_again = image.dumps(again._model, again._engine)
        assert image_again == path.read_bytes()


def test_json_from_an_image(ranks_file: Path, tmp_path: Path) -> None:
    tok = kinds(ranks_file, tmp_path)["json"]
    tok.save(tmp_path / "x.ffbpe")
    BPETokenizer.from_file(tmp_path / "x.ffbpe").save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


def test_damage(ranks_file: Path, tmp_path: Path) -> None:
    tok = BPETokenizer.from_file(ranks_file, pattern="cl100k", special_tokens=SPECIALS)
    path = tmp_path / "x.ffbpe"
    tok.save(path)
    whole = path.read_bytes()
    for at in [0, 7, 12, 20, 40, len(whole) // 2, len(whole) - 1, *range(100, len(whole), len(whole) // 40)]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        with pytest.raises(ValueError, match=r"x\.ffbpe"):
            BPETokenizer.from_file(path)
    for end in [1, 10, 23, 60, len(whole) // 3, len(whole) - 8, len(whole) - 1]:
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError, match=r"x\.ffbpe"):
            BPETokenizer.from_file(path)
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="leave them out"):
        BPETokenizer.from_file(path, pattern="cl100k")


def test_cache_folder(ranks_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cache"
    monkeypatch.setenv(image.CACHE_VARIABLE, str(folder))
    first = BPETokenizer.from_file(ranks_file, pattern="cl100k", special_tokens=SPECIALS)
    (kept,) = folder.iterdir()
    built = []
    build = files.load_tiktoken
    monkeypatch.setattr(files, "load_tiktoken", lambda *args: built.append(1) or build(*args))
    again = BPETokenizer.from_file(ranks_file, pattern="cl100k", special_tokens=SPECIALS)
    assert not built
    assert again.encode("Hello 世界 <pad>", allowed_special="all") == first.encode(
        "Hello 世界 <pad>", allowed_special="all"
    )
    BPETokenizer.from_file(ranks_file, pattern="gpt2")  # other arguments, another file
    assert len(built) == 1
    assert len(list(folder.iterdir())) == 2
    kept.write_bytes(kept.read_bytes()[:-5])
    BPETokenizer.from_file(ranks_file, pattern="cl100k", special_tokens=SPECIALS)
    assert len(built) == 2
    assert BPETokenizer.from_file(kept).encode("Hello") == first.encode("Hello")
    monkeypatch.setenv(image.CACHE_VARIABLE, str(ranks_file / "no folder"))
    with pytest.warns(UserWarning, match="could not be kept"):
        BPETokenizer.from_file(ranks_file, pattern="o200k")
