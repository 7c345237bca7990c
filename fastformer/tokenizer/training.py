"""Learning a vocabulary from texts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastformer.tokenizer import _bpe
from fastformer.tokenizer.files import to_bytes
from fastformer.tokenizer.model import Model
from fastformer.tokenizer.model import specials as special_table
from fastformer.tokenizer.patterns import resolve


def train(
    source: str | Path | Sequence[str | Path] | Iterable[str],
    vocab_size: int,
    pattern: str = "gpt2",
    special_tokens: Sequence[str] = (),
    min_frequency: int = 0,
    max_token_length: int | None = None,
    progress: bool | Callable[[int], object] = False,
    threads: int = 1,
) -> Model:
    """Learn byte-level BPE merges.

    The result is that of Hugging Face's `BpeTrainer(initial_alphabet=ByteLevel.alphabet())`: special tokens have the
    first ids, the 256 bytes follow in the order of their ByteLevel characters, then the merges, the most frequent pair
    first and of equals the one with the smaller ids. Counts have 64 bits.

    Args:
        source: a path, several paths, or an iterable of texts. Paths are `Path` objects, or str where a file of
            that name exists. Files are read line by line, as Hugging Face's `train` does: no token crosses a newline
            into the next line. Texts of an iterable are taken whole.
        vocab_size: ids in all, special tokens and bytes included.
        pattern: as for BPETokenizer.from_file.
        special_tokens: strings.
        min_frequency: a pair that is seen less often is not merged.
        max_token_length: in bytes; merging stops short of it as in Hugging Face's trainer.
        progress: True for a progress bar on stderr, or a function that is called with the size of the vocabulary.
        threads: how many count the words of files, each in a table of its own; the merging is one thread's work.

    Raises:
        ValueError: threads below 1, a vocab_size too small for the bytes and special tokens, a file that is no UTF-8.
        FileNotFoundError: a path that is not there.
    """
    if not isinstance(vocab_size, int) or vocab_size < 256 + len(special_tokens):
        raise ValueError(
            f"vocab_size must be an int of at least {256 + len(special_tokens)} (256 bytes and the special tokens), "
            f"got {vocab_size!r}"
        )
    if not isinstance(threads, int) or threads < 1:
        raise ValueError(f"threads must be an int of at least 1, got {threads!r}")
    if len(set(special_tokens)) != len(special_tokens):
        raise ValueError(f"special_tokens holds a token twice: {list(special_tokens)}")
    cut = resolve(pattern)
    trainer = _bpe.Trainer()

    def add(text: Any, by_line: bool, base: int = 0) -> None:
        if cut.number is not None:
            trainer.add(text, cut.number, by_line, threads, base)
            return
        for piece in text.decode("utf-8").splitlines(keepends=True) if by_line else [text]:
            trainer.add_pieces(piece, cut.boundaries(piece))

    paths = _paths(source)
    if paths is not None:
        for path in paths:
            if not path.is_file():
                raise FileNotFoundError(f"{path}: no such file")
            try:
                for base, block in _blocks(path):
                    add(block, True, base)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
    else:
        for text in source:  # type: ignore[union-attr]
            if not isinstance(text, str):
                raise TypeError(f"the iterable must give str, got {type(text).__name__}")
            add(text, False)
    report, close = _progress(progress, vocab_size)
    try:
        specials = [to_bytes(token) or b"" for token in special_tokens]
        limit = (1 << 62) if max_token_length is None else max_token_length
        tokens, rows = trainer.train(vocab_size, min_frequency, limit, specials, report)
    finally:
        close()
    merges = [(tokens[a], tokens[b]) for a, b, _ in np.frombuffer(rows, np.uint32).reshape(-1, 3).tolist()]
    vocab = {token: number for number, token in enumerate(tokens) if number >= len(special_tokens)}
    added = special_table({token: number for number, token in enumerate(special_tokens)})
    return Model(vocab, merges, False, cut, added)


def _blocks(path: Path, size: int = 1 << 25) -> Iterator[tuple[int, bytes]]:
    """The file in blocks of whole lines and where each begins; a block is of about `size` bytes, or one long line."""
    with path.open("rb") as file:
        base, begun = 0, []
        while block := file.read(size):
            end = block.rfind(b"\n") + 1
            begun.append(block[:end] if end else block)
            if end:
                yield base, b"".join(begun)
                base += sum(map(len, begun))
                begun = [block[end:]]
        if last := b"".join(begun):
            yield base, last


def _paths(source: Any) -> list[Path] | None:
    if isinstance(source, str | os.PathLike):
        return [Path(source)]
    if (
        isinstance(source, list | tuple)
        and source
        and all(
            isinstance(item, os.PathLike)
            or (isinstance(item, str) and len(item) < 1024 and "\n" not in item and Path(item).is_file())
            for item in source
        )
    ):
        return [Path(item) for item in source]
    return None


def _progress(
    progress: bool | Callable[[int], object], total: int
) -> tuple[Callable[[int], object] | None, Callable[[], object]]:
    if callable(progress):
        return progress, lambda: None
    if not progress:
        return None, lambda: None
    from fastformer.tokenizer.progress import Bar

    bar = Bar("merges", total)
    return bar.update, bar.close
