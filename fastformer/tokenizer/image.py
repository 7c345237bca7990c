"""The binary form of a tokenizer, `.ffbpe`: what the engine built, ready to be read back.

Layout: the magic bytes, the length and the blake2b-64 of a JSON header (pattern, added tokens, normalizers, template),
the header, the engine's image, which carries a version and a checksum of its own (csrc/bpe/image.cpp).

With the environment variable FASTFORMER_TOKENIZER_CACHE naming a folder, BPETokenizer.from_file keeps such a file there
for every vocabulary it builds, under a name made from the content of the source and the arguments, and reads it the
next time. A file there that is damaged or of another version is made anew.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import struct
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from fastformer.tokenizer import _bpe
from fastformer.tokenizer.added import AddedToken
from fastformer.tokenizer.model import Compiled, Model
from fastformer.tokenizer.patterns import resolve

MAGIC = b"FFBPE\x001\n"
CACHE_VARIABLE = "FASTFORMER_TOKENIZER_CACHE"


def dumps(model: Model, engine: _bpe.Engine) -> bytes:
    has_merges = model.has_merges if isinstance(model, Compiled) else model.merges is not None
    header = json.dumps(
        {
            "pattern": model.pattern.name if model.pattern.number is not None else list(model.pattern.expressions),
            "added": [dataclasses.astuple(token) for token in model.added.values()],
            "has_merges": has_merges,
            "whole_piece": model.whole_piece,
            "normalizers": model.normalizers,
            "prefix_space": model.prefix_space,
            "template": model.template,
            "hugging_face": model.hugging_face,
        }
    ).encode("utf-8")
    return MAGIC + struct.pack("<Q", len(header)) + _digest(header) + header + engine.image()


def loads(data: bytes) -> Compiled:
    """The model. Raises ValueError for what is damaged, of another version, or no such file."""
    view = memoryview(data)
    if view[: len(MAGIC)] != MAGIC:
        raise ValueError("this is no .ffbpe file of this version")
    start = len(MAGIC) + 16
    if len(view) < start:
        raise ValueError("the file is cut off")
    (length,) = struct.unpack_from("<Q", view, len(MAGIC))
    raw = bytes(view[start : start + length])
    if len(raw) != length or _digest(raw) != view[len(MAGIC) + 8 : start]:
        raise ValueError("the file is damaged")
    header = json.loads(raw)
    pattern = header.pop("pattern")
    return Compiled(
        _bpe.Engine.from_image(view[start + length :]),
        header.pop("has_merges"),
        resolve(pattern if isinstance(pattern, str) else tuple(pattern)),
        {content: AddedToken(content, *rest) for content, *rest in header.pop("added")},
        whole_piece=header["whole_piece"],
        normalizers=tuple(header["normalizers"]),
        prefix_space=header["prefix_space"],
        template=(tuple(header["template"][0]), tuple(header["template"][1])),
        hugging_face=header["hugging_face"],
    )


def cached(sources: Iterable[Path], arguments: Any, build: Callable[[], Model]) -> Model:
    """What `build` gives, from the cache folder if there is one and it is there, else built and put there."""
    folder = os.environ.get(CACHE_VARIABLE)
    if not folder:
        return build()
    key = hashlib.blake2b(repr((MAGIC, arguments)).encode(), digest_size=16)
    for source in sources:
        key.update(hashlib.blake2b(source.read_bytes()).digest())
    path = Path(folder) / f"{key.hexdigest()}.ffbpe"
    try:
        return loads(path.read_bytes())
    except (OSError, ValueError):
        pass  # not there, or not usable: made anew below
    model = build()
    from fastformer.tokenizer.files import write_atomic

    try:
        write_atomic(path, dumps(model, model.engine()))
    except OSError as error:
        warnings.warn(f"{CACHE_VARIABLE}={folder}: the tokenizer could not be kept there: {error}", stacklevel=4)
    return model


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=8).digest()
