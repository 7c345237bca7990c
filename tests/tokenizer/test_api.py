"""Special tokens, padding, decoding, files, errors, pickling."""

import copy
import mmap
import os
import pickle
import threading
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch

import fastformer as ff
from fastformer.tokenizer import BPETokenizer
from tests.tokenizer.conftest import EXPRESSIONS, as_tiktoken, hard_strings, write_json

SPECIALS = {"<|endoftext|>": 5000, "<pad>": 5001}


@pytest.fixture(scope="module")
def tok(ranks_file: Path) -> BPETokenizer:
    return BPETokenizer.from_file(ranks_file, pattern="cl100k", special_tokens=SPECIALS)


def test_public_name() -> None:
    assert ff.BPETokenizer is BPETokenizer


def test_special_tokens(tok: BPETokenizer) -> None:
    reference = as_tiktoken(tok, EXPRESSIONS["cl100k"])
    text = "a <|endoftext|>\n <pad><pad> b"
    assert tok.encode(text) == reference.encode_ordinary(text)
    assert 5000 not in tok.encode(text)
    for allowed in ("all", {"<pad>"}, {"<|endoftext|>"}):
        want = reference.encode(text, allowed_special=allowed, disallowed_special=())
        assert tok.encode(text, allowed_special=allowed) == want
        assert tok.encode_array(text, allowed_special=allowed).tolist() == want
    with pytest.raises(ValueError, match=r"<\|endoftext\|>"):
        tok.encode(text, disallowed_special="all")
    with pytest.raises(ValueError, match="<pad>"):
        tok.encode(text, allowed_special={"<|endoftext|>"}, disallowed_special="all")
    assert tok.encode("plain", disallowed_special="all") == tok.encode("plain")
    with pytest.raises(ValueError, match="allowed_special"):
        tok.encode(text, allowed_special="some")


def test_call(tok: BPETokenizer) -> None:
    texts = ["Hello world", "", "a much longer text about nothing"]
    rows = [tok.encode(text) for text in texts]
    plain = tok(texts)
    assert plain["input_ids"] == rows
    assert plain["attention_mask"] == [[1] * len(row) for row in rows]
    assert tok("Hello world") == {"input_ids": rows[0], "attention_mask": [1] * len(rows[0])}
    out = tok(texts, padding=True, return_tensors="pt")
    width = max(map(len, rows))
    assert out["input_ids"].dtype == torch.int64
    assert out["input_ids"].tolist() == [row + [5001] * (width - len(row)) for row in rows]
    assert out["attention_mask"].sum(1).tolist() == [len(row) for row in rows]
    cut = tok(texts, padding="max_length", truncation=True, max_length=3, return_tensors="np")
    assert cut["input_ids"].shape == (3, 3)
    assert tok(texts, padding="max_length", max_length=99)["attention_mask"][1] == [0] * 99
    with pytest.raises(ValueError, match="max_length"):
        tok(texts, truncation=True)
    with pytest.raises(ValueError, match="return_tensors"):
        tok(texts, return_tensors="tf")
    with pytest.raises(ValueError, match="padding"):
        tok(texts, padding="yes")
    with pytest.raises(ValueError, match="one array"):
        tok(texts, return_tensors="pt")
    with pytest.raises(ValueError, match="pad_token"):
        tok(texts, padding=True, pad_token="<none>")
    with pytest.raises(TypeError, match="sequence"):
        tok.encode_packed("text")  # type: ignore[arg-type]


def test_padding_needs_a_token(ranks_file: Path) -> None:
    bare = BPETokenizer.from_file(ranks_file, pattern="cl100k")
    with pytest.raises(ValueError, match="pad_token"):
        bare(["a", "a b c"], padding=True)


def test_decode(tok: BPETokenizer) -> None:
    for text in hard_strings(500, seed=20):
        ids = tok.encode_array(text)
        assert tok.decode(ids) == text
        assert tok.decode(ids.tolist()) == text
        assert tok.decode(ids.astype(np.int64)) == text
        assert tok.decode(torch.from_numpy(ids.astype(np.int64))) == text
        assert tok.decode(iter(ids.tolist())) == text
    assert tok.decode([5000]) == "<|endoftext|>"
    half = tok.encode("世".encode()[:2])
    assert tok.decode(half) == "\ufffd"
    assert tok.decode_bytes(half) == "世".encode()[:2]
    with pytest.raises(UnicodeDecodeError):
        tok.decode(half, errors="strict")
    assert tok.decode([]) == ""
    assert tok.decode(np.array([], dtype=np.int64)) == ""


@pytest.mark.parametrize("bad", [4999, 2**32 + 5, -1, 2**70])
def test_bad_ids(tok: BPETokenizer, bad: int) -> None:
    with pytest.raises(KeyError, match=str(bad)):
        tok.decode([0, bad])
    if -(2**63) <= bad < 2**63:
        with pytest.raises(KeyError, match=str(bad)):
            tok.decode(np.array([0, bad]))
    with pytest.raises(KeyError, match=str(bad)):
        tok.id_to_token(bad)


def test_bad_arguments(tok: BPETokenizer) -> None:
    with pytest.raises(TypeError, match="text must be str"):
        tok.encode(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        tok.decode([1.5])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="integers"):
        tok.decode(np.array([1.5]))
    with pytest.raises(ValueError, match="one dimension"):
        tok.decode(np.zeros((2, 2), dtype=np.uint32))
    with pytest.raises(KeyError, match="no such token"):
        tok.token_to_id("no such token at all")


def test_tokens_and_ids(tok: BPETokenizer) -> None:
    assert tok.vocab_size == 5002
    for token, number in list(tok._model.vocab.items())[::7]:
        assert tok.token_to_id(token) == number
        assert tok.id_to_token(number) == token
    assert tok.token_to_id("<pad>") == 5001
    assert tok.id_to_token(5001) == b"<pad>"


def test_save_and_load(tok: BPETokenizer, tmp_path: Path) -> None:
    texts = hard_strings(500, seed=21)
    want = [tok.encode(text, allowed_special="all") for text in texts]
    tok.save(tmp_path / "out" / "tokenizer.json")
    tok.save(tmp_path / "folder")
    reference = tokenizers.Tokenizer.from_file(str(tmp_path / "folder" / "tokenizer.json"))
    for path in ("out/tokenizer.json", "folder"):
        again = BPETokenizer.from_file(tmp_path / path)
        assert [again.encode(text, allowed_special="all") for text in texts] == want
    assert [reference.encode(text, add_special_tokens=False).ids for text in texts] == want
    tok.save(tmp_path / "x.tiktoken")
    again = BPETokenizer.from_file(tmp_path / "x.tiktoken", pattern="cl100k", special_tokens=SPECIALS)
    assert [again.encode(text, allowed_special="all") for text in texts] == want
    assert not list(tmp_path.rglob(".*"))


def test_save_refuses_what_the_format_cannot_say(tmp_path: Path) -> None:
    alphabet = BPETokenizer.train(iter(["a"]), 256)._model.vocab
    names = {token.decode("latin-1"): number for token, number in alphabet.items()}
    from fastformer.tokenizer.files import to_byte_level

    vocab = {to_byte_level(token): number for token, number in alphabet.items()}
    vocab.update({"ab": 256, "bc": 257})
    (tmp_path / "merges.txt").write_text("#version: 0.2\nb c\na b\n")
    write_json(tmp_path / "vocab.json", vocab)
    odd = BPETokenizer.from_file(tmp_path)
    assert odd.encode("abc") == [names["a"], 257]
    with pytest.raises(ValueError, match="do not follow"):
        odd.save(tmp_path / "odd.tiktoken")
    odd.save(tmp_path / "odd.json")
    assert BPETokenizer.from_file(tmp_path / "odd.json").encode("abc") == [names["a"], 257]


def test_pickle_and_copy(tok: BPETokenizer) -> None:
    text = "Hello world <pad>"
    for again in (pickle.loads(pickle.dumps(tok)), copy.copy(tok), copy.deepcopy(tok)):
        assert again.encode(text, allowed_special="all") == tok.encode(text, allowed_special="all")


def test_threads(tok: BPETokenizer) -> None:
    texts = ["".join(hard_strings(400, seed=seed)) for seed in range(4)]
    want = [tok.encode(text) for text in texts]
    wrong = []

    def work(i: int) -> None:
        for _ in range(5):
            if tok.encode(texts[i]) != want[i]:
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i % 4,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_bad_files(tmp_path: Path, ranks_file: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.tiktoken"):
        BPETokenizer.from_file(tmp_path / "nothing.tiktoken")
    with pytest.raises(FileNotFoundError, match=r"merges\.txt"):
        BPETokenizer.from_file(tmp_path)
    cases = {
        "empty.tiktoken": (b"", "empty"),
        "words.tiktoken": (b"one two three\n", "line 1"),
        "base64.tiktoken": (b"IQ== 0\n!!!! 1\n", "line 2"),
        "short.tiktoken": (b"IQ== 0\n", "lacks a token for the byte 0"),
        "twice.tiktoken": (b"IQ== 0\nIQ== 1\n", "twice"),
        "ids.tiktoken": (ranks_file.read_bytes() + b"AAAAAAAAAAAA 1\n", "id 1 to two tokens"),
        "huge.tiktoken": (ranks_file.read_bytes() + b"AAAAAAAAAAAA 4294967295\n", "4294967295"),
        "broken.json": (b"{", "JSON"),
        "list.json": (b"[]", "model"),
        "other.txt": (b"x", "needs a .tiktoken"),
    }
    for name, (data, message) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=message) as caught:
            BPETokenizer.from_file(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_offsets(tok: BPETokenizer) -> None:
    for text in ["", *hard_strings(500, seed=22)]:
        ids, offsets = tok.encode_with_offsets(text, allowed_special="all")
        assert ids.tolist() == tok.encode(text, allowed_special="all")
        data = text.encode()
        _, places = tok.encode_with_offsets(text, unit="byte", allowed_special="all")
        assert b"".join(data[a:b] for a, b in places) == data
        for number, (a, b), (c, d) in zip(ids.tolist(), offsets.tolist(), places.tolist(), strict=True):
            assert tok.id_to_token(number) == data[c:d]
            assert len(text[:a].encode()) <= c < len(text[: a + 1].encode())
            assert len(text[: b - 1].encode()) < d <= len(text[:b].encode())
    with pytest.raises(ValueError, match="unit"):
        tok.encode_with_offsets("a", unit="word")  # type: ignore[arg-type]


def test_stream(tok: BPETokenizer) -> None:
    text = "Hello 世界 👩‍👩‍👧‍👦 done"
    ids = [i for c in text.encode() for i in tok.encode(bytes([c]))]
    stream = tok.stream()
    parts = [stream.push(i) for i in ids]
    assert "".join(parts) + stream.finish() == text
    assert "\ufffd" not in "".join(parts)
    assert stream.push(ids[:8]) == "Hello "
    assert stream.finish() == "\ufffd"
    assert stream.push(ids[0]) == "H"
    with pytest.raises(KeyError, match="4999"):
        stream.push(4999)


def test_as_tiktoken(tok: BPETokenizer) -> None:
    ours, reference = tok.as_tiktoken("x"), as_tiktoken(tok, EXPRESSIONS["cl100k"])
    text = "a <pad> 世界 b"
    ids = reference.encode(text, allowed_special="all")
    for name in ("encode_ordinary", "_encode_bytes", "encode_single_token"):
        argument = {"_encode_bytes": text.encode(), "encode_single_token": b" "}.get(name, text)
        assert getattr(ours, name)(argument) == getattr(reference, name)(argument)
    for name in ("decode", "decode_bytes", "decode_tokens_bytes", "decode_with_offsets"):
        assert getattr(ours, name)(ids) == getattr(reference, name)(ids)
    for name in ("n_vocab", "max_token_value", "eot_token", "special_tokens_set"):
        assert getattr(ours, name) == getattr(reference, name)
    assert ours.encode(text, allowed_special={"<pad>"}) == reference.encode(text, allowed_special={"<pad>"})
    assert ours.encode_batch(["a", "b"]) == reference.encode_batch(["a", "b"])
    assert ours.encode_to_numpy("a b").tolist() == reference.encode_to_numpy("a b").tolist()
    assert ours.decode_batch([ids]) == reference.decode_batch([ids])
    assert ours.decode_bytes_batch([ids]) == reference.decode_bytes_batch([ids])
    assert ours.token_byte_values() == reference.token_byte_values()
    assert ours.is_special_token(5001)
    assert ours.decode_single_token_bytes(5001) == b"<pad>"
    with pytest.raises(ValueError, match="<pad>"):
        ours.encode(text)


def test_memory_map_and_fork(tok: BPETokenizer, tmp_path: Path) -> None:
    text = "".join(hard_strings(50, seed=23))
    (tmp_path / "text").write_bytes(text.encode())
    with open(tmp_path / "text", "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        assert tok.encode(view) == tok.encode(text)
    if not hasattr(os, "fork"):
        pytest.skip("this system has no fork")
    want = tok.encode(text)
    child = os.fork()
    if child == 0:
        os._exit(0 if tok.encode(text) == want else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("pattern", ["cl100k", "gpt2", "o200k"])
def test_unstable_as_tiktoken(ranks_file: Path, pattern: str) -> None:
    ours = BPETokenizer.from_file(ranks_file, pattern=pattern, special_tokens=SPECIALS)
    theirs = as_tiktoken(ours, EXPRESSIONS[pattern])
    mine = ours.as_tiktoken()
    texts = [
        *hard_strings(60, seed=23, longest=5),
        "",
        "the",
        "a \n",
        "x\n\n ",
        "  ",
        "it's",
        "<pad>",
        "a<pad>",
        "<pad> \n b",
    ]
    for text in texts:
        stable, completions = mine.encode_with_unstable(text, allowed_special="all")
        want_stable, want = theirs.encode_with_unstable(text, allowed_special="all")
        assert stable == want_stable, repr(text)
        assert set(map(tuple, completions)) == set(map(tuple, want)), repr(text)
    with pytest.raises(ValueError, match="<pad>"):
        mine.encode_with_unstable("<pad>")
