"""Merges against Hugging Face's BpeTrainer."""

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from fastformer.tokenizer import BPETokenizer
from fastformer.tokenizer.files import to_byte_level
from tests.tokenizer.conftest import hard_strings


def reference(size: int, **options: object) -> tuple[Tokenizer, trainers.BpeTrainer]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **options
    )
    return tokenizer, trainer


def merges_of(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    import json

    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]


def check(texts: list[str], size: int, **options: object) -> None:
    theirs, trainer = reference(size, **options)
    theirs.train_from_iterator(texts, trainer)
    ours = BPETokenizer.train(iter(texts), size, **options)  # type: ignore[arg-type]
    assert ours._model.merges is not None
    assert [(to_byte_level(a), to_byte_level(b)) for a, b in ours._model.merges] == merges_of(theirs)
    vocab = {to_byte_level(token): number for token, number in ours._model.vocab.items()} | ours.special_tokens
    assert vocab == theirs.get_vocab()


@pytest.mark.parametrize(
    "options", [{}, {"min_frequency": 3}, {"max_token_length": 4}, {"special_tokens": ["<pad>", "é ü"]}]
)
def test_merges(options: dict[str, object]) -> None:
    check(hard_strings(400, seed=30), 700, **options)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text(alphabet="ab c", max_size=30), max_size=12), st.sampled_from([260, 300, 2000]))
def test_ties_and_overlaps(texts: list[str], size: int) -> None:
    check(texts, size)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=12), max_size=12), st.integers(0, 3), st.sampled_from([None, 2, 3, 5]))
def test_any_text(texts: list[str], min_frequency: int, max_token_length: int | None) -> None:
    options = {} if max_token_length is None else {"max_token_length": max_token_length}
    check([*texts, "ab" * 20], 400, min_frequency=min_frequency, **options)


def test_files_are_read_by_line(tmp_path: Path) -> None:
    rng = random.Random(5)
    path = tmp_path / "corpus.txt"
    path.write_bytes("\n".join(rng.choices(hard_strings(300, seed=31), k=500)).encode())
    theirs, trainer = reference(600)
    theirs.train([str(path)], trainer)
    for source in (path, [path], str(path), [str(path)]):
        ours = BPETokenizer.train(source, 600)
        assert [(to_byte_level(a), to_byte_level(b)) for a, b in ours._model.merges or []] == merges_of(theirs)


def test_progress_and_errors(tmp_path: Path) -> None:
    seen: list[int] = []
    BPETokenizer.train(iter(hard_strings(400, seed=32)), 1200, progress=seen.append)
    assert seen == sorted(seen)
    assert seen
    with pytest.raises(ZeroDivisionError):
        BPETokenizer.train(iter(hard_strings(400, seed=32)), 1200, progress=lambda done: 1 // 0)
    with pytest.raises(ValueError, match="vocab_size"):
        BPETokenizer.train(iter(["a"]), 100)
    with pytest.raises(ValueError, match="twice"):
        BPETokenizer.train(iter(["a"]), 300, special_tokens=["<a>", "<a>"])
    with pytest.raises(FileNotFoundError):
        BPETokenizer.train(tmp_path / "nothing.txt", 300)
    with pytest.raises(TypeError, match="str"):
        BPETokenizer.train(iter([b"a"]), 300)  # type: ignore[list-item]
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 ")
    with pytest.raises(ValueError, match=r"latin\.txt"):
        BPETokenizer.train(tmp_path / "latin.txt", 300)
