"""Small vocabularies, hard strings and the reference tokenizers."""

import base64
import functools
import itertools
import json
import random
import unicodedata
from pathlib import Path

import pytest
import tiktoken

from fastformer.tokenizer import BPETokenizer
from fastformer.tokenizer.patterns import CL100K, GPT2, LLAMA3, O200K, QWEN2

EXPRESSIONS = {"gpt2": GPT2, "cl100k": CL100K, "o200k": O200K, "llama3": LLAMA3, "qwen2": QWEN2}

_SAMPLE = (
    "It's the 1st of 1234567 tests; don't WON'T we'Ll they'RE I'd.  \n\n\tif (x == 0) {\n        return"
    " foo/bar_baz;\r\n}\n"
    "Die Straße heißt „Übergröße“, naïve café — élève. Привет, мир! Как дела? Γειά σου Κόσμε. שלום עולם. مرحبا بالعالم "
    "नमस्ते दुनिया こんにちは世界。今日は天気がいいですね。안녕하세요 세계 "
    "你好，世界！中文分词测试。 🙂👩‍👩‍👧‍👦🇩🇪 ½ ⅔ Ⅷ ① "
)


@functools.cache
def pieces() -> list[str]:
    """Hard pieces: every category, contractions in both cases, white space, marks, emoji sequences, look-alikes."""
    rng = random.Random(7)
    by_category: dict[str, list[str]] = {}
    for point in range(0x110000):
        char = chr(point)
        category = unicodedata.category(char)
        if category != "Cs":
            by_category.setdefault(category, []).append(char)
    out = [c for chars in by_category.values() for c in rng.sample(chars, min(12, len(chars)))]
    out += [
        "'s",
        "'S",
        "'t",
        "'T",
        "'re",
        "'RE",
        "'rE",
        "'ve",
        "'VE",
        "'m",
        "'M",
        "'ll",
        "'LL",
        "'Ll",
        "'d",
        "'D",
        "'ſ",
        "'",
    ]
    out += [
        " ",
        "  ",
        "   ",
        "\n",
        "\n\n",
        "\r\n",
        "\r",
        "\t",
        " \n",
        "\n ",
        "\u00a0",
        "\u3000",
        "\u2028",
        "\u0085",
        "\x0b",
    ]
    out += [
        "a",
        "B",
        "Hello",
        "world",
        "HTTPServer",
        "iPhone",
        "x1y2",
        "the",
        "ing",
        "0",
        "12",
        "123",
        "1234",
        "é",
        "ß",
    ]
    out += ["e\u0301", "\u0301", "\u0308\u0323", "नमस्ते", "世界", "の", "ー", "・", "ｶﾞ", "한국어", "가", "ǅ", "ʰ", "ª"]
    out += [
        "🙂",
        "👩‍👩‍👧‍👦",
        "🇩🇪",
        "👍🏽",
        "\ufe0f",
        "\u200d",
        "<|endoftext|>",
        "<|fim_prefix|>",
        "<pad>",
        "/",
        "//",
        "\x00",
        "\x1c",
        "\x7f",
    ]
    out += [
        ".",
        "...",
        "!?",
        "_",
        "__init__",
        "{}",
        "=>",
        "$",
        "€",
        "—",
        "“",
        "½",
        "²",
        "Ⅷ",
        "٣",
        "\ufffd",
        "\U0010ffff",
    ]
    return out


def code_points(full: bool) -> list[int]:
    """Every code point but surrogates, or the two planes where scripts live and some of the others."""
    points = (
        range(0x110000)
        if full
        else itertools.chain(range(0x20000), range(0x20000, 0x110000, 61), range(0x2F800, 0x2FA20))
    )
    return [p for p in points if not 0xD800 <= p < 0xE000]


def hard_strings(count: int, seed: int = 0, longest: int = 12) -> list[str]:
    rng, parts = random.Random(seed), pieces()
    return ["".join(rng.choices(parts, k=rng.randint(1, longest))) for _ in range(count)]


def as_tiktoken(tokenizer: BPETokenizer, expression: str) -> tiktoken.Encoding:
    return tiktoken.Encoding(
        "reference",
        pat_str=expression,
        mergeable_ranks=dict(tokenizer._model.vocab),
        special_tokens=tokenizer.special_tokens,
    )


@pytest.fixture(scope="session")
def trained() -> BPETokenizer:
    """A vocabulary with whole-word, partial and multilingual tokens, learned from the hard pieces themselves."""
    texts = [_SAMPLE * 3, *hard_strings(3000, seed=1)]
    return BPETokenizer.train(iter(texts), 3000, "cl100k")


@pytest.fixture(scope="session")
def ranks_file(trained: BPETokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vocab") / "small.tiktoken"
    trained.save(path)
    return path


def read_ranks(path: Path) -> dict[bytes, int]:
    rows = (line.split() for line in path.read_bytes().splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in rows}


def write_json(path: Path, data: object) -> Path:
    path.write_text(json.dumps(data), encoding="utf-8")
    return path
