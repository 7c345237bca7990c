"""From text to token ids for either tokenizer: fastformer's own, or the one of a Hugging Face checkpoint."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastformer.tokenizer import BPETokenizer

from .errors import UserError

SPECIAL_TOKENS = ("[PAD]", "[CLS]", "[SEP]")


@dataclass(frozen=True)
class Encoder:
    """encode: texts to ids, special tokens included, cut to the maximum length; what: the tokenizer in a few words."""

    encode: Callable[[list[str]], list[list[int]]]
    pad_id: int
    vocab_size: int
    what: str


def own_encoder(tokenizer: BPETokenizer, max_length: int, what: str) -> Encoder:
    """BERT's form, [CLS] text [SEP], over our tokenizer.

    A special token that the tokenizer does not have gets an id beyond its vocabulary.
    """
    known = dict(tokenizer.special_tokens)
    size = tokenizer.vocab_size
    for token in SPECIAL_TOKENS:
        if token not in known:
            known[token] = size
            size += 1
    pad, first, last = (known[token] for token in SPECIAL_TOKENS)

    def encode(texts: list[str]) -> list[list[int]]:
        ids, starts = tokenizer.encode_packed(texts)
        flat, bounds = ids.tolist(), starts.tolist()
        return [
            [first, *flat[start : min(end, start + max_length - 2)], last] for start, end in itertools.pairwise(bounds)
        ]

    return Encoder(encode, pad, size, what)


def load_tokenizer(path: Path) -> BPETokenizer:
    """BPETokenizer.from_file with its errors made the user's."""
    try:
        return BPETokenizer.from_file(path)
    except (OSError, ValueError) as error:
        raise UserError(f"--tokenizer {path} cannot be used: {one_line(error)}") from None


def checkpoint_encoder(tokenizer: Any, max_length: int) -> Encoder:
    """A Hugging Face tokenizer as its checkpoint uses it. One without a padding token pads with its end token."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if pad is None:
        raise UserError("the checkpoint's tokenizer has neither a padding nor an end token, so no batch can be padded")

    def encode(texts: list[str]) -> list[list[int]]:
        return tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]

    return Encoder(encode, pad, len(tokenizer), type(tokenizer).__name__)


def one_line(error: BaseException) -> str:
    """The first line of an error's message, for the one sentence that the user gets."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:")
