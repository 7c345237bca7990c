"""Passages and their labels: from the standard library that runs this program, or from a CSV or JSON-lines file."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import re
import sysconfig
import textwrap
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import UserError

# Packages that every Python since 3.11 carries as source, each with several hundred passages. Packages that
# distributions split off (tkinter, idlelib, test, ensurepip, venv) are left out on purpose.
STDLIB_PACKAGES = (
    "asyncio",
    "email",
    "http",
    "importlib",
    "json",
    "logging",
    "multiprocessing",
    "unittest",
    "urllib",
    "xml",
)
SHORTEST_PASSAGE = 40  # characters; shorter paragraphs ("else:", "return x") carry no sign of where they come from


@dataclass(frozen=True)
class Corpus:
    """Labelled passages.

    texts: the passages; labels: for each passage its index in `names`; names: the classes, sorted; source: where the
    passages come from, for the report; note: what was left out while reading, "" when nothing was.
    """

    texts: list[str]
    labels: list[int]
    names: list[str]
    source: str
    note: str = ""

    def take(self, rows: list[int]) -> Corpus:
        """The same classes with the given rows only."""
        return Corpus([self.texts[i] for i in rows], [self.labels[i] for i in rows], self.names, self.source, self.note)

    @property
    def majority_share(self) -> float:
        """Accuracy of always answering the most frequent class."""
        return max(self.labels.count(k) for k in set(self.labels)) / len(self.labels)


def stdlib_corpus(per_package: int, seed: int, stdlib: Path | None = None) -> Corpus:
    """Paragraphs of the standard library's source files, labelled with the package they stand in.

    A passage is what stands between two blank lines of a source file: a paragraph of a docstring, a block of comments,
    a run of code. Its length is what its author made it. A paragraph found in two packages has no right answer and is
    dropped, as are repeats.

    per_package: at most this many passages of each package, drawn with `seed`, so that no package dominates.
    stdlib: the folder to read; the running Python's by default.
    Raises UserError where the folder carries no sources (an embedded Python keeps byte code only).
    """
    root = stdlib or Path(sysconfig.get_path("stdlib"))
    owners: dict[str, set[str]] = {}
    for package in STDLIB_PACKAGES:
        for passage in _package_passages(root / package):
            owners.setdefault(passage, set()).add(package)
    texts: list[str] = []
    labels: list[int] = []
    for label, package in enumerate(STDLIB_PACKAGES):
        passages = [text for text, packages in owners.items() if packages == {package}]
        if len(passages) < 20:
            raise UserError(
                f"{root / package} holds {len(passages)} passages of Python source, too few to learn from; "
                "give your own text with --data"
            )
        random.Random(seed).shuffle(passages)
        texts += passages[:per_package]
        labels += [label] * len(passages[:per_package])
    return Corpus(texts, labels, list(STDLIB_PACKAGES), f"source text of {len(STDLIB_PACKAGES)} packages in {root}")


def _package_passages(folder: Path) -> Iterator[str]:
    """Paragraphs of the package's files in a fixed order; its tests, which some versions ship inside, are skipped."""
    for path in sorted(folder.rglob("*.py")):
        if {"test", "tests"}.intersection(path.relative_to(folder).parts):
            continue
        source = path.read_text(encoding="utf-8", errors="replace")
        for block in re.split(r"\n[ \t]*\n", source):
            passage = textwrap.dedent(block.strip("\n")).strip()
            if len(passage) >= SHORTEST_PASSAGE:
                yield passage


def read_corpus(path: Path, text_column: str, label_column: str, known: Sequence[str] | None = None) -> Corpus:
    """Read passages and labels from a .csv file with a header line, or a .jsonl file with one object a line.

    Both are UTF-8, with or without a byte order mark, plain or compressed (.csv.gz, .jsonl.gz). Labels may be words or
    numbers; the classes are the distinct labels, sorted, or those `known` from the training file. Rows whose text is
    empty are left out and counted in the corpus's note.
    Raises UserError, naming the line where there is one, for anything that cannot be read as that.
    """
    name = path.name.lower().removesuffix(".gz")
    if name.endswith(".csv"):
        rows = _csv_rows
    elif name.endswith(".jsonl"):
        rows = _jsonl_rows
    else:
        raise UserError(f"--data needs a file that ends in .csv or .jsonl (or that and .gz), got {path}")
    content = read_text(path)
    texts: list[str] = []
    labels: list[str] = []
    empty = 0
    for text, label in rows(path, content, text_column, label_column):
        if text.strip():
            texts.append(text)
            labels.append(label)
        else:
            empty += 1
    if not texts:
        raise UserError(f"{path} holds no rows with text in {text_column!r}")
    note = f"{empty} rows without text were left out" if empty else ""
    if known is not None:
        check_labels(path, labels, known)
        return Corpus(texts, [known.index(label) for label in labels], list(known), str(path), note)
    # Numbers in their own order: "10" after "9".
    names = sorted(set(labels), key=lambda name: (0, int(name), name) if _is_count(name) else (1, 0, name))
    if len(names) == 1:
        raise UserError(f"{path} holds only one label, {names[0]!r}, in {label_column!r}; two are needed to classify")
    if len(names) > max(2, len(texts) // 2):
        raise UserError(
            f"{path} holds {len(names)} different labels in {label_column!r} for {len(texts)} rows; "
            "that is no column of classes"
        )
    index = {name: k for k, name in enumerate(names)}
    return Corpus(texts, [index[label] for label in labels], names, str(path), note)


def check_labels(path: Path, labels: Iterable[str], known: Sequence[str]) -> None:
    """Raise UserError where a file has labels that are not among those known from the training file."""
    unknown = sorted(set(labels).difference(known))
    if unknown:
        raise UserError(
            f"{path} holds labels that the training data does not have: {', '.join(map(repr, unknown[:5]))}"
            f"{' and more' if len(unknown) > 5 else ''}; known are {', '.join(map(repr, known[:10]))}"
            f"{' and more' if len(known) > 10 else ''}"
        )


def _is_count(name: str) -> bool:
    return name.isascii() and name.isdigit() and len(name) < 19


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, decompressed if its name ends in .gz.

    Raises UserError where there is none, or it is empty, no UTF-8 (naming the line) or no gzip file.
    """
    try:
        content = path.read_bytes()
        if path.suffix.lower() == ".gz":
            content = gzip.decompress(content)
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is no whole gzip file: {error}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path} is not UTF-8: line {line} holds the byte 0x{content[error.start]:02x}") from None
    if not text.strip():
        raise UserError(f"{path} is empty")
    return text


def _csv_rows(path: Path, content: str, text_column: str, label_column: str) -> Iterator[tuple[str, str]]:
    csv.field_size_limit(2**31 - 1)  # the module's own limit, 128 KiB a field, is shorter than long documents
    reader = csv.DictReader(io.StringIO(content, newline=""), strict=True)
    try:
        columns = reader.fieldnames or []
        for column in (text_column, label_column):
            if column not in columns:
                raise UserError(f"{path} has no column {column!r}; its columns are {', '.join(map(repr, columns))}")
        for row in reader:
            text, label = row[text_column], row[label_column]
            if text is None or label is None or None in row:
                raise UserError(
                    f"{path}, line {reader.line_num}: the row does not have the header's {len(columns)} fields"
                )
            if not label.strip():
                raise UserError(f"{path}, line {reader.line_num}: {label_column!r} is empty")
            yield text, label.strip()
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.reader.line_num}: no valid CSV: {error}") from None


def _jsonl_rows(path: Path, content: str, text_column: str, label_column: str) -> Iterator[tuple[str, str]]:
    # Not splitlines(): JSON strings may hold U+2028 and other separators that are no line ends in JSON lines.
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply or out of range"
            raise UserError(f"{path}, line {number}: no valid JSON: {reason}") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: a JSON object is needed, got {type(row).__name__}")
        for column in (text_column, label_column):
            if column not in row:
                raise UserError(f"{path}, line {number}: there is no {column!r} in {', '.join(map(repr, row))}")
        text, label = row[text_column], row[label_column]
        if not isinstance(text, str):
            raise UserError(f"{path}, line {number}: {text_column!r} is no string but {type(text).__name__}")
        if not isinstance(label, (str, int)) or label == "":
            raise UserError(f"{path}, line {number}: {label_column!r} is {label!r}; a word or a whole number is needed")
        yield text, str(label)


def split(corpus: Corpus, held_out: float, seed: int, most: int = 2000) -> tuple[Corpus, Corpus]:
    """Training rows and held-out rows, each class in the same share; `held_out` of the rows, at most `most`, are held.

    A class with one row stays in training.
    """
    shuffle = random.Random(seed).shuffle
    fraction = min(held_out, most / len(corpus.texts))
    train: list[int] = []
    test: list[int] = []
    for label in range(len(corpus.names)):
        rows = [i for i, k in enumerate(corpus.labels) if k == label]
        shuffle(rows)
        cut = max(1, round(len(rows) * fraction)) if len(rows) > 1 else 0
        test += rows[:cut]
        train += rows[cut:]
    shuffle(train)
    shuffle(test)
    if not test:
        raise UserError(f"{corpus.source} holds one row for each label; at least two of one label are needed")
    return corpus.take(train), corpus.take(test)
