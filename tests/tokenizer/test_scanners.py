"""Every instruction set's scanner against the scalar oracle, and the oracle against the published expressions."""

import random
from pathlib import Path

import numpy as np
import pytest
import regex

from fastformer.tokenizer import _bpe
from fastformer.tokenizer.bpe import BPETokenizer
from fastformer.tokenizer.patterns import CL100K, DEEPSEEK, GPT2, LLAMA3, O200K, QWEN2, Pattern
from tests.tokenizer.conftest import hard_strings, pieces

ISAS = {0: "scalar", 1: "neon", 2: "avx2", 3: "avx512"}
NAMES = {"gpt2": 0, "cl100k": 1, "o200k": 2, "llama3": 3, "qwen2": 4, "deepseek": 5}


@pytest.fixture(scope="module")
def engine(ranks_file: Path) -> _bpe.Engine:
    return BPETokenizer.from_file(ranks_file, pattern="cl100k")._engine


def available() -> list[int]:
    return [isa for isa in ISAS if isa and _bpe.has_isa(isa)]


def long_texts(seed: int, count: int) -> list[bytes]:
    """Texts around and past the window of 8192 bytes, with runs of every kind at its edges."""
    rng = random.Random(seed)
    parts = pieces()
    out = []
    for _ in range(count):
        text = "".join(rng.choices(parts, k=rng.randint(1, 3000)))
        at = rng.randint(0, len(text))
        filler = rng.choice(["a", "A", " ", "\n", "1", "世", "é", "!", "\u0301", " \n", "aA", "\u3000"])
        text = text[:at] + filler * rng.choice([1, 60, 64, 8180, 8192, 9000, 20000]) + text[at:]
        out.append(text.encode("utf-8"))
    return out


@pytest.mark.parametrize("pattern", list(NAMES))
def test_every_isa_equals_the_oracle(engine: _bpe.Engine, pattern: str) -> None:
    if not available():
        pytest.skip("this machine has no vectorised scanner")
    number = NAMES[pattern]
    for data in [*(s.encode() for s in hard_strings(2000, seed=50, longest=40)), *long_texts(51, 40)]:
        want = engine.scan(data, number, 0)
        for isa in available():
            assert engine.scan(data, number, isa) == want, (ISAS[isa], data[:200])


@pytest.mark.slow
@pytest.mark.parametrize("pattern", list(NAMES))
def test_every_isa_equals_the_oracle_at_length(engine: _bpe.Engine, pattern: str) -> None:
    for seed in range(30):
        for data in [*(s.encode() for s in hard_strings(3000, seed=seed + 100, longest=60)), *long_texts(seed, 60)]:
            want = engine.scan(data, NAMES[pattern], 0)
            for isa in available():
                assert engine.scan(data, NAMES[pattern], isa) == want, (ISAS[isa], data[:200])


@pytest.mark.parametrize("pattern", list(NAMES))
def test_oracle_equals_the_expressions(engine: _bpe.Engine, pattern: str) -> None:
    """`regex` knows a younger Unicode than the tables: its new characters are left out."""
    expressions = {
        "gpt2": (GPT2,),
        "cl100k": (CL100K,),
        "o200k": (O200K,),
        "llama3": (LLAMA3,),
        "qwen2": (QWEN2,),
        "deepseek": DEEPSEEK,
    }
    cut = Pattern("regex", None, expressions[pattern])
    for text in hard_strings(3000, seed=52):
        if regex.search(r"[\x1c-\x1f]", text):
            continue
        got = np.frombuffer(engine.scan(text, NAMES[pattern], 0), np.uint32)
        assert np.array_equal(got, cut.boundaries(text)), repr(text)


def test_errors(engine: _bpe.Engine) -> None:
    with pytest.raises(ValueError, match="isa"):
        engine.scan("a", 0, 9)
    with pytest.raises(ValueError, match="pattern"):
        engine.scan("a", 99, 0)
    with pytest.raises(ValueError, match="UTF-8"):
        engine.scan(b"\xff", 0, 0)
