"""Ids against tiktoken and Hugging Face tokenizers, on generated hard strings and on real text."""

import base64
import itertools
import json
import lzma
import random
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import tokenizers

from fastformer.tokenizer import BPETokenizer
from tests.tokenizer.conftest import EXPRESSIONS, as_tiktoken, code_points, hard_strings, pieces, read_ranks

REAL = {
    "gpt2": ("r50k_base.tiktoken", {"<|endoftext|>": 50256}),
    "cl100k": ("cl100k_base.tiktoken", {"<|endoftext|>": 100257, "<|fim_prefix|>": 100258}),
    "o200k": ("o200k_base.tiktoken", {"<|endoftext|>": 199999}),
}


@pytest.mark.parametrize("pattern", list(EXPRESSIONS))
def test_hard_strings_match_tiktoken(ranks_file: Path, pattern: str) -> None:
    ours = BPETokenizer.from_file(ranks_file, pattern=pattern)
    reference = as_tiktoken(ours, EXPRESSIONS[pattern])
    for text in hard_strings(6000, seed=3):
        assert ours.encode(text) == reference.encode_ordinary(text), repr(text)


@pytest.mark.parametrize("full", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("pattern", list(EXPRESSIONS))
def test_every_code_point_alone_and_between_letters(ranks_file: Path, pattern: str, full: bool) -> None:
    ours = BPETokenizer.from_file(ranks_file, pattern=pattern)
    reference = as_tiktoken(ours, EXPRESSIONS[pattern])
    points = [chr(p) for p in code_points(full)]
    for low in range(0, len(points), 4096):
        # A newline splits in every pattern, so that a whole block is compared at once.
        block = points[low : low + 4096]
        for text in ("\n".join(block), "\n".join(f"a{c}b" for c in block), "\n".join(f" {c} 1" for c in block)):
            if ours.encode(text) != reference.encode_ordinary(text):
                for line in text.split("\n"):
                    assert ours.encode(line) == reference.encode_ordinary(line), repr(line)
                pytest.fail(f"the block at {low:#x} differs only as a whole")


def test_hugging_face_file_matches_tokenizers(trained: BPETokenizer, tmp_path: Path) -> None:
    for pattern in ("gpt2", "cl100k", "o200k", "llama3", "qwen2", "deepseek"):
        model = trained._model
        again = BPETokenizer.train(
            iter(hard_strings(500, seed=2)), 900, pattern, special_tokens=["<pad>", "<|endoftext|>"]
        )
        path = tmp_path / pattern / "tokenizer.json"
        again.save(path)
        reference = tokenizers.Tokenizer.from_file(str(path))
        ours = BPETokenizer.from_file(path)
        assert ours.pattern.number is not None
        for text in hard_strings(3000, seed=4):
            want = reference.encode(text, add_special_tokens=False).ids
            assert ours.encode(text, allowed_special="all") == want, (pattern, text)
        assert model is trained._model


@pytest.mark.parametrize("pattern", list(REAL))
def test_real_vocabulary(data_dir: Path, pattern: str) -> None:
    name, specials = REAL[pattern]
    ranks = read_ranks(data_dir / "vocab" / name)
    ours = BPETokenizer.from_file(data_dir / "vocab" / name, pattern=pattern, special_tokens=specials)
    reference = tiktoken.Encoding("r", pat_str=EXPRESSIONS[pattern], mergeable_ranks=ranks, special_tokens=specials)
    for text in hard_strings(5000, seed=5):
        assert ours.encode(text) == reference.encode_ordinary(text), repr(text)
    for token, number in ranks.items():
        assert ours.token_to_id(token) == number
    for file in sorted((data_dir / "text").glob("*.txt.xz")):
        text = lzma.decompress(file.read_bytes()).decode("utf-8")[: 1 << 20]
        assert np.array_equal(ours.encode_array(text), reference.encode_to_numpy(text, disallowed_special=())), file
    strings = json.loads(lzma.decompress((data_dir / "text" / "short_strings.json.xz").read_bytes()))[:5000]
    ids, offsets = ours.encode_packed(strings)
    assert [ids[a:b].tolist() for a, b in itertools.pairwise(offsets)] == reference.encode_ordinary_batch(strings)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", list(REAL))
def test_all_real_text(data_dir: Path, pattern: str) -> None:
    name, specials = REAL[pattern]
    ranks = read_ranks(data_dir / "vocab" / name)
    ours = BPETokenizer.from_file(data_dir / "vocab" / name, pattern=pattern, special_tokens=specials)
    reference = tiktoken.Encoding("r", pat_str=EXPRESSIONS[pattern], mergeable_ranks=ranks, special_tokens=specials)
    for file in sorted((data_dir / "text").glob("*.txt.xz")):
        text = lzma.decompress(file.read_bytes()).decode("utf-8")
        assert np.array_equal(ours.encode_array(text), reference.encode_to_numpy(text, disallowed_special=())), file
    for text in hard_strings(100_000, seed=6):
        assert ours.encode(text) == reference.encode_ordinary(text), repr(text)


def test_gpt2_folder(data_dir: Path, tmp_path: Path) -> None:
    for target, source in (("vocab.json", "gpt2_encoder.json"), ("merges.txt", "gpt2_vocab.bpe")):
        (tmp_path / target).write_bytes((data_dir / "vocab" / source).read_bytes())
    ours = BPETokenizer.from_file(tmp_path)
    ranks = read_ranks(data_dir / "vocab" / "r50k_base.tiktoken")
    assert ours.special_tokens == {"<|endoftext|>": 50256}
    assert ours._model.vocab == ranks
    reference = BPETokenizer.from_file(data_dir / "vocab" / "r50k_base.tiktoken")
    for text in hard_strings(2000, seed=8):
        assert ours.encode(text) == reference.encode(text)


@pytest.mark.parametrize("name", ["r50k_base", "cl100k_base"])
def test_real_tokenizer_json(data_dir: Path, name: str) -> None:
    path = data_dir / "vocab" / f"{name}.tokenizer.json"
    ours, reference = BPETokenizer.from_file(path), tokenizers.Tokenizer.from_file(str(path))
    for text in hard_strings(4000, seed=9):
        want = reference.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, allowed_special="all") == want, repr(text)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["r50k_base", "cl100k_base"])
def test_all_real_text_through_tokenizer_json(data_dir: Path, name: str) -> None:
    path = data_dir / "vocab" / f"{name}.tokenizer.json"
    ours, reference = BPETokenizer.from_file(path), tokenizers.Tokenizer.from_file(str(path))
    for file in sorted((data_dir / "text").glob("*.txt.xz")):
        lines = lzma.decompress(file.read_bytes()).decode("utf-8").splitlines(keepends=True)
        texts = ["".join(lines[i : i + 50]) for i in range(0, len(lines), 50)]
        for text, want in zip(texts, reference.encode_batch_fast(texts, add_special_tokens=False), strict=True):
            assert ours.encode(text, allowed_special="all") == want.ids, (file, text[:200])
    for text in hard_strings(100_000, seed=12):
        assert ours.encode(text, allowed_special="all") == reference.encode(text, add_special_tokens=False).ids, text


def test_long_pretokens(ranks_file: Path) -> None:
    ours = BPETokenizer.from_file(ranks_file, pattern="cl100k")
    reference = as_tiktoken(ours, EXPRESSIONS["cl100k"])
    rng = random.Random(0)
    texts = ["a" * n for n in (1, 63, 64, 65, 200, 511, 512, 513, 900)] + [
        " " * 800,
        "\n" * 800,
        "世界" * 300,
        "=" * 777,
    ]
    texts += ["".join(rng.choices("etaoinshr", k=n)) for n in (30, 63, 64, 65, 66, 100, 511, 512, 513, 900)]
    texts += ["".join(c for c in rng.choices(pieces(), k=200) if c.isalpha()) for _ in range(20)]
    for text in texts:
        assert ours.encode(text) == reference.encode_ordinary(text), text[:80]


def test_tokens_longer_than_a_window(tmp_path: Path) -> None:
    """Long pretokens are merged in windows of 64 bytes; here tokens of up to 256 bytes reach across their seams."""
    tokens = [bytes([byte]) for byte in range(256)]
    for unit in (b"a", b"xy", b" "):
        tokens += [unit * 2**k for k in range(1, 9) if len(unit) * 2**k <= 256]
    tokens += [b"xy", b"b" + b"a" * 64, b"a" * 3, b"a" * 5, b"ya", b"aab"]
    ranks = list(dict.fromkeys(tokens))
    path = tmp_path / "long.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(ranks)))
    ours = BPETokenizer.from_file(path, pattern="cl100k")
    reference = as_tiktoken(ours, EXPRESSIONS["cl100k"])
    rng = random.Random(3)
    texts = [unit * n for unit in ("a", "xy", " ") for n in (64, 65, 127, 128, 255, 257, 3001)]
    for _ in range(200):
        runs = ["a", "xy", "b", "aab", "yx"]
        texts.append("".join(rng.choice(runs) * rng.choice([1, 2, 31, 64, 100, 129, 300]) for _ in range(6)))
    for text in texts:
        assert ours.encode(text) == reference.encode_ordinary(text), text[:200]


def test_bytes_that_no_text_has(tmp_path: Path) -> None:
    # The caches pad keys with 0xFF and mark empty places with 0xFE: neither such tokens nor zeros may mislead them.
    tokens = [bytes([b]) for b in range(256)]
    tokens += [b"a\xff", b"\xffa", b"a" + b"\xff" * 14, b"\xfe" * 8, b"\xfe" * 15, b"ab", b"abab", b"\0\0", b"\0" * 4]
    path = tmp_path / "odd.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))
    ours = BPETokenizer.from_file(path, pattern="cl100k")
    reference = as_tiktoken(ours, EXPRESSIONS["cl100k"])
    texts = ["a", "ab", "aba", *["\0" * n for n in range(1, 70)], *["ab" * n for n in range(1, 40)], "\0a\0b " * 50]
    for text in texts * 2 + ["\0".join(texts)]:
        assert ours.encode(text) == reference.encode_ordinary(text), repr(text)
    for data in (b"a\xff", b"a" + b"\xff" * 14, b"ab \xfe\xfe\xfe\xfe\xfe\xfe\xfe\xfe"):
        assert ours.encode(data) == reference._encode_bytes(data), data


def test_surrogates_and_bytes(ranks_file: Path) -> None:
    ours = BPETokenizer.from_file(ranks_file, pattern="cl100k")
    reference = as_tiktoken(ours, EXPRESSIONS["cl100k"])
    for text in ("\ud800", "a\udfffb", "\ud83d\ude42", "x \ud83d", "\udc00\ud800"):
        assert ours.encode(text) == reference.encode_ordinary(text)
    rng = random.Random(1)
    for text in hard_strings(3000, seed=10, longest=6):
        data = text.encode("utf-8")
        assert ours.encode(data) == reference.encode_ordinary(text)
        assert ours.encode_array(memoryview(data)).tolist() == reference.encode_ordinary(text)
        broken = bytearray(data)
        broken[rng.randrange(len(broken))] = rng.choice([0x80, 0xBF, 0xC0, 0xE2, 0xED, 0xF5, 0xFF])
        broken = bytes(broken[: rng.randint(1, len(broken))])
        assert ours.encode(broken) == reference._encode_bytes(broken), broken
        assert ours.decode_bytes(ours.encode(broken)) == broken


def test_every_entry_point_agrees(trained: BPETokenizer) -> None:
    texts = ["", *hard_strings(300, seed=11)]
    lists = [trained.encode(text) for text in texts]
    assert [trained.encode_array(text).tolist() for text in texts] == lists
    assert [trained.count(text) for text in texts] == [len(ids) for ids in lists]
    ids, offsets = trained.encode_packed(texts)
    assert ids.dtype == np.uint32
    assert offsets.dtype == np.int32
    assert ids.tolist() == [i for row in lists for i in row]
    assert offsets.tolist() == np.cumsum([0, *map(len, lists)]).tolist()
    assert trained.encode_batch(texts) == lists
    assert trained.decode_batch(lists) == texts
    assert trained.encode_array("x").flags.writeable
