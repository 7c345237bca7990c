"""Reading and writing the vocabulary formats: .tiktoken, GPT-2's vocab.json with merges.txt, tokenizer.json.

Every reader raises FileNotFoundError or ValueError with one sentence that names the file and what is wrong with it.
Writers put a temporary file beside the target and rename it, so that a reader never sees half a file.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from fastformer.tokenizer import _bpe, image
from fastformer.tokenizer.model import Compiled, Model, added_arrays, check_added, specials
from fastformer.tokenizer.patterns import Pattern, resolve

GPT2_END = "<|endoftext|>"


def _byte_level() -> dict[str, int]:
    """GPT-2's visible character for each byte: printable Latin-1 stands for itself, the others for U+0100 onwards."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(b): b for b in printable}
    for i, b in enumerate(b for b in range(256) if b not in set(printable)):
        table[chr(256 + i)] = b
    return table


BYTE_OF = _byte_level()
CHAR_OF = {byte: char for char, byte in BYTE_OF.items()}


def to_bytes(token: str) -> bytes | None:
    """The bytes that a ByteLevel string stands for; None if it holds a character outside of that alphabet."""
    try:
        return bytes([BYTE_OF[c] for c in token])
    except KeyError:
        return None


def to_byte_level(token: bytes) -> str:
    return "".join([CHAR_OF[b] for b in token])


def read(path: Path) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    data = path.read_bytes()
    if not data:
        raise ValueError(f"{path}: the file is empty")
    return data


def read_json(path: Path) -> Any:
    try:
        return json.loads(read(path))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: no valid JSON: {error}") from None


def write_atomic(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_atomic(path) as file:
        file.write(data)


@contextlib.contextmanager
def open_atomic(path: Path) -> Iterator[BinaryIO]:
    """A file to write that becomes `path` when the block ends well; ended otherwise, `path` stays what it was."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def load_tiktoken(path: Path, pattern: Pattern, special_tokens: dict[str, int]) -> Model:
    """One token a line, base64 and rank. The rank is both the id and the order of merging."""
    added = specials(special_tokens)
    check_added(added)
    try:
        engine = _bpe.Engine.from_ranks(read(path), *added_arrays(added))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return Compiled(engine, False, pattern, added)


def load_gpt2(folder: Path, pattern: Pattern, special_tokens: dict[str, int] | None) -> Model:
    """vocab.json and merges.txt, or encoder.json and vocab.bpe. `<|endoftext|>` is special unless told otherwise."""
    pairs = [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")]
    found = [(folder / v, folder / m) for v, m in pairs if (folder / v).is_file() and (folder / m).is_file()]
    if not found:
        raise FileNotFoundError(
            f"{folder}: needs tokenizer.json, or vocab.json and merges.txt, or encoder.json and vocab.bpe"
        )
    vocab_path, merges_path = found[0]
    entries = read_json(vocab_path)
    if not isinstance(entries, dict):
        raise ValueError(f"{vocab_path}: needs one JSON object of tokens and ids")
    if special_tokens is None:
        special_tokens = {GPT2_END: entries[GPT2_END]} if GPT2_END in entries else {}
    vocab = {}
    for text, number in entries.items():
        if special_tokens.get(text) == number:
            continue
        token = to_bytes(text)
        if token is None:
            raise ValueError(f"{vocab_path}: the token {text!r} is no byte-level string and no special token")
        vocab[token] = number
    merges = []
    for number, line in enumerate(read(merges_path).decode("utf-8").split("\n"), 1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        parts = [to_bytes(part) for part in line.rstrip("\r").split(" ")]
        if len(parts) != 2 or parts[0] is None or parts[1] is None:
            raise ValueError(f"{merges_path}, line {number}: needs two byte-level tokens, got {line[:80]!r}")
        merges.append((parts[0], parts[1]))
    return Model(vocab, merges, False, pattern, specials(special_tokens))


def load(path: Path, pattern: str | None, special_tokens: dict[str, int] | None) -> Model:
    """Whatever `path` is: a .tiktoken file, a tokenizer.json, a .ffbpe file, or a folder of one of the formats."""
    from fastformer.tokenizer import huggingface

    def kept(sources: list[Path], build: Callable[[], Model]) -> Model:
        return image.cached(sources, (pattern, special_tokens), build)

    if path.is_dir():
        if (path / "tokenizer.json").is_file():
            path = path / "tokenizer.json"
        else:
            files = [path / name for name in ("vocab.json", "merges.txt", "encoder.json", "vocab.bpe")]
            present = [file for file in files if file.is_file()]
            return kept(present, lambda: load_gpt2(path, resolve(pattern or "gpt2"), special_tokens))
    if path.suffix == ".ffbpe":
        if pattern is not None or special_tokens is not None:
            raise ValueError(f"{path}: a .ffbpe file says itself what pattern and special_tokens are; leave them out")
        try:
            return image.loads(read(path))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    if path.suffix == ".json":
        return kept([path], lambda: huggingface.load(path, pattern, special_tokens))
    if path.suffix == ".tiktoken":
        return kept([path], lambda: load_tiktoken(path, resolve(pattern or "gpt2"), special_tokens or {}))
    raise ValueError(
        f"{path}: needs a .tiktoken file, a tokenizer.json, a .ffbpe file, or a folder with a tokenizer.json or with "
        "vocab.json and merges.txt"
    )


def tiktoken_bytes(vocab: dict[bytes, int]) -> bytes:
    rows = sorted((number, token) for token, number in vocab.items())
    return b"".join(b"%s %d\n" % (base64.b64encode(token), number) for number, token in rows)
