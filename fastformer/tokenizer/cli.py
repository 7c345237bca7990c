"""`fastformer tokenizer train|encode|decode|count|convert`, on files and pipes."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fastformer.tokenizer.bpe import BPETokenizer
from fastformer.tokenizer.files import open_atomic
from fastformer.tokenizer.progress import Bar

_CHUNK = 1 << 24


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Add the command `tokenizer` to what `ArgumentParser.add_subparsers` returned. Its `run` takes the arguments."""
    parser = subparsers.add_parser("tokenizer", help="train and use byte-level BPE tokenizers")
    commands = parser.add_subparsers(dest="tokenizer_command", required=True)

    def command(name: str, text: str, run: Any) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    train = command("train", "learn a vocabulary from text files", _train)
    train.add_argument("files", nargs="+", type=Path, help="UTF-8 text, read line by line")
    train.add_argument("-o", "--output", required=True, type=Path, help="a .tiktoken, a .json, or a folder")
    train.add_argument("--vocab-size", type=int, default=32000)
    train.add_argument("--pattern", default="gpt2", help="a name (gpt2, cl100k, o200k, …) or a regular expression")
    train.add_argument("--min-frequency", type=int, default=0)
    train.add_argument("--max-token-length", type=int, help="in bytes")
    train.add_argument("--special", action="append", default=[], help="a special token; may be given several times")

    encode = command("encode", "text to ids: decimal, or uint32 with --binary", _encode)
    decode = command("decode", "ids to text", _decode)
    count = command("count", "the number of tokens of each file", _count)
    for sub in (encode, decode, count):
        sub.add_argument("tokenizer", type=Path, help="a .tiktoken, a tokenizer.json, or a folder")
        sub.add_argument("--pattern", help="the pre-tokenizer, where the file does not say it")
    for sub in (encode, decode):
        sub.add_argument("input", nargs="?", default="-", help="a file, or - for standard input")
        sub.add_argument("-o", "--output", default="-", help="a file, or - for standard output")
        sub.add_argument("--binary", action="store_true", help="ids are little-endian uint32, not decimal numbers")
    encode.add_argument("--special", action="store_true", help="recognise special tokens in the text")
    count.add_argument("files", nargs="*", default=["-"], help="files, or - for standard input")

    convert = command("convert", "write a vocabulary in another format", _convert)
    convert.add_argument("tokenizer", type=Path)
    convert.add_argument("output", type=Path, help="a .tiktoken, a .json, or a folder")
    convert.add_argument("--pattern", help="the pre-tokenizer, where the file does not say it")
    return parser


@contextlib.contextmanager
def _open(name: str, mode: str) -> Iterator[BinaryIO]:
    if name == "-":
        stream = sys.stdin.buffer if mode == "rb" else sys.stdout.buffer
        yield stream
        stream.flush() if mode == "wb" else None
    elif mode == "wb" and (Path(name).is_file() or not Path(name).exists()):
        with open_atomic(Path(name)) as file:
            yield file
    else:  # to read, or a pipe or device
        with open(name, mode) as file:
            yield file  # type: ignore[misc]


def _train(args: argparse.Namespace) -> int:
    tokenizer = BPETokenizer.train(
        args.files,
        args.vocab_size,
        args.pattern,
        args.special,
        args.min_frequency,
        args.max_token_length,
        progress=True,
    )
    tokenizer.save(args.output)
    print(f"{tokenizer.vocab_size} tokens written to {args.output}", file=sys.stderr)
    return 0


def _encode(args: argparse.Namespace) -> int:
    tokenizer = BPETokenizer.from_file(args.tokenizer, args.pattern)
    with _open(args.input, "rb") as source, _open(args.output, "wb") as target:
        # One document: how a text is cut depends on what follows, so it is read whole.
        ids = tokenizer.encode_array(source.read(), allowed_special="all" if args.special else ())
        if args.binary:
            target.write(ids.astype("<u4").tobytes())
        else:
            bar = Bar("encode", len(ids), " tokens")
            for low in range(0, len(ids), _CHUNK):
                if low:
                    target.write(b" ")
                target.write(" ".join(map(str, ids[low : low + _CHUNK].tolist())).encode())
                bar.update(min(len(ids), low + _CHUNK))
            target.write(b"\n")
            bar.close()
    return 0


def _decode(args: argparse.Namespace) -> int:
    tokenizer = BPETokenizer.from_file(args.tokenizer, args.pattern)
    with _open(args.input, "rb") as source, _open(args.output, "wb") as target:
        data = source.read()
        if args.binary:
            if len(data) % 4:
                raise ValueError(f"{args.input}: {len(data)} bytes are no whole number of uint32 ids")
            ids = np.frombuffer(data, dtype="<u4")
        else:
            try:
                ids = np.array(data.split(), dtype=np.int64)
            except ValueError:
                raise ValueError(f"{args.input}: needs decimal ids, or --binary") from None
        target.write(tokenizer.decode_bytes(ids))
    return 0


def _count(args: argparse.Namespace) -> int:
    tokenizer = BPETokenizer.from_file(args.tokenizer, args.pattern)
    total, bar = 0, Bar("count", len(args.files), " files")
    for done, name in enumerate(args.files, 1):
        with _open(name, "rb") as source:
            number = tokenizer.count(source.read())
        total += number
        bar.update(done)
        print(f"{number}\t{name}")
    bar.close()
    if len(args.files) > 1:
        print(f"{total}\ttotal")
    return 0


def _convert(args: argparse.Namespace) -> int:
    BPETokenizer.from_file(args.tokenizer, args.pattern).save(args.output)
    return 0
