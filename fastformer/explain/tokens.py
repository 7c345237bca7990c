"""Tokens that can be read: ids as pieces of the text, where a byte-level token may begin or end inside a character.

A piece never ends inside what a reader takes for one character: tokens that share one are merged, and so are those that
would part a letter from its accents or an emoji from what it is joined with (the extended grapheme clusters of Unicode
Standard Annex 29, without its rules for Hangul letters and Indic conjuncts).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_JOINER = "\u200d"
_REGIONAL = range(0x1F1E6, 0x1F200)  # two of these letters are a flag
# Joiners, skin tones, tags, and the two vowels of Thai and Lao that are written after their consonant.
_EXTENDS = frozenset((0x200C, 0x200D, *range(0x1F3FB, 0x1F400), *range(0xE0020, 0xE0080), 0x0E33, 0x0EB3))
_CONTROLS = ("Cc", "Zl", "Zp")


@dataclass(frozen=True)
class Token:
    """A piece of a text.

    Attributes:
        text: what it says; the token's name for a special token, which stands for no text.
        tokens: numbers of the sequence's tokens that it is made of.
        begin, end: its characters in the text; the same number for a special token.
    """

    text: str
    tokens: tuple[int, ...]
    begin: int
    end: int

    @property
    def special(self) -> bool:
        return self.begin == self.end


def tokens_of(text: str, tokenizer: Any, **options: Any) -> list[Token]:
    """The pieces that a tokenizer cuts a text into, special tokens among them.

    Args:
        tokenizer: a fast tokenizer of transformers (FastTokenizer among them), called as tokenizer(text, **options); or
            a BPETokenizer, which adds nothing to the text.
        options: as for the batch that is explained, so that the same tokens come: truncation=True, max_length=....

    Raises:
        TypeError: text is no str, or the tokenizer cannot say where tokens stand.
    """
    if not isinstance(text, str):
        raise TypeError(f"text must be a str, got {type(text).__name__}")
    if hasattr(tokenizer, "encode_with_offsets"):
        _, offsets = tokenizer.encode_with_offsets(text, **options)
        return merge(text, [tuple(pair) for pair in offsets.tolist()])
    if not getattr(tokenizer, "is_fast", False):
        raise TypeError(f"tokenizer must be a BPETokenizer or a fast one, got {type(tokenizer).__name__}")
    found = tokenizer(text, return_offsets_mapping=True, **options)
    names = tokenizer.convert_ids_to_tokens(found["input_ids"])
    return merge(text, found["offset_mapping"], names)


def merge(text: str, offsets: Sequence[tuple[int, int]], names: Sequence[str] | None = None) -> list[Token]:
    """Pieces of a text from the places of its tokens.

    Args:
        offsets: for each token the characters [begin, end) that it stands for, all of a character that it holds only
            some bytes of; begin = end for a token that stands for no text.
        names: of the tokens, for those without text.

    Returns:
        Pieces in the order of the tokens; together their `tokens` are all tokens, each once. What no token stands for,
        as spaces between words, is in no piece.

    Raises:
        ValueError: offsets outside the text, or going back.
    """
    named = names if names is not None else [""] * len(offsets)
    pieces: list[Token] = []
    last: Token | None = None  # of the text
    for number, (begin, end) in enumerate(offsets):
        if not (last.begin if last is not None and begin < end else 0) <= begin <= end <= len(text):
            raise ValueError(f"offsets must go forward within the text, got ({begin}, {end}) for token {number}")
        if begin == end:
            pieces.append(Token(named[number], (number,), begin, end))
            continue
        if last is not None and last is pieces[-1] and (begin < last.end or not is_boundary(text, begin)):
            begin, end, tokens = last.begin, max(last.end, end), (*last.tokens, number)
            pieces.pop()
        else:
            tokens = (number,)
        last = Token(text[begin:end], tokens, begin, end)
        pieces.append(last)
    return pieces


def is_boundary(text: str, place: int) -> bool:
    """Whether text[place] begins what a reader takes for a new character."""
    if not 0 < place < len(text):
        return True
    before, here = text[place - 1], text[place]
    if before == "\r" and here == "\n":
        return False
    if unicodedata.category(before) in _CONTROLS or unicodedata.category(here) in _CONTROLS:
        return True
    if _extends(here):
        return False
    if before == _JOINER and _is_pictograph(here):
        start = place - 1
        while start > 0 and _extends(text[start]):
            start -= 1
        return not _is_pictograph(text[start])
    if ord(here) in _REGIONAL and ord(before) in _REGIONAL:
        first = place
        while first > 0 and ord(text[first - 1]) in _REGIONAL:
            first -= 1
        return (place - first) % 2 == 0
    return True


def _extends(character: str) -> bool:
    """Whether a character belongs to the one before it: accents and vowel signs, joiners, skin tones, tags."""
    return unicodedata.category(character) in ("Mn", "Me", "Mc") or ord(character) in _EXTENDS


def _is_pictograph(character: str) -> bool:
    # New emoji are not yet assigned in the tables of older Pythons.
    if ord(character) in _REGIONAL:
        return False
    return ord(character) >= 0x1F000 or (ord(character) >= 0xA9 and unicodedata.category(character) in ("So", "Sm"))


def pool(pieces: Sequence[Token], scores: Tensor) -> list[float]:
    """For each piece the sum of its tokens' scores.

    Args:
        scores: (S,), one for each token.

    Raises:
        ValueError: the pieces are of another number of tokens.
    """
    count = sum(len(piece.tokens) for piece in pieces)
    if scores.ndim != 1 or len(scores) != count:
        raise ValueError(f"scores must be one for each of the pieces' {count} tokens, got shape {tuple(scores.shape)}")
    values = scores.detach().float().cpu()
    return [float(sum(values[i] for i in piece.tokens)) for piece in pieces]


def pool_map(pieces: Sequence[Token], weights: Tensor) -> Tensor:
    """A map (S, S) between tokens as one between pieces: what a piece looks at is the mean over its tokens, how much it
    is looked at their sum, so that rows keep theirs."""
    count = sum(len(piece.tokens) for piece in pieces)
    if weights.shape != (count, count):
        raise ValueError(f"map must be of the pieces' {count} tokens, got shape {tuple(weights.shape)}")
    values = weights.detach().float().cpu()
    rows = torch.stack([values[list(piece.tokens)].mean(0) for piece in pieces])
    return torch.stack([rows[:, list(piece.tokens)].sum(1) for piece in pieces], 1)
