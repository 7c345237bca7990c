"""tiktoken's encode_with_unstable: the tokens that more text cannot change, and how the rest may go on.

The completions are those of tiktoken 0.14 (`_encode_unstable_native` of its lib.rs), by its rules: the last pretoken is
unstable, with the white space before it if it is white space; every token that may straddle the end of the text is
tried.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from fastformer.tokenizer import _bpe
from fastformer.tokenizer.patterns import resolve

if TYPE_CHECKING:
    from fastformer.tokenizer.bpe import BPETokenizer

_WHOLE = resolve("whole").number or 0


def split(tokenizer: BPETokenizer, ids: list[int], tokens: list[bytes]) -> tuple[list[int], list[list[int]]]:
    """The stable ones of a text's ids, and the completions of what is left.

    Args:
        tokenizer: with a tiktoken vocabulary.
        ids: the text's, special tokens among them.
        tokens: the bytes of the ordinary tokens, sorted.
    """
    engine = tokenizer._engine
    bytes_of = tokenizer.id_to_token
    specials = set(tokenizer.special_tokens.values())
    first = next((i + 1 for i in range(len(ids) - 1, -1, -1) if ids[i] in specials), 0)
    rest = b"".join(bytes_of(number) for number in ids[first:])
    if not rest:
        return ids, []
    last, taken = _last_piece(tokenizer, rest), 0
    while sum(len(bytes_of(number)) for number in ids[len(ids) - taken :]) < len(rest) - last:
        taken += 1

    def blank(number: int) -> bool:
        return number not in specials and not bytes_of(number).strip(b" \n\t")

    if blank(ids[-taken]):
        while taken < len(ids) and blank(ids[-taken - 1]):
            taken += 1
    stable, unstable = ids[:-taken], b"".join(bytes_of(number) for number in ids[-taken:])
    found: set[tuple[int, ...]] = {(tokenizer.token_to_id(token),) for token in _starting(tokens, unstable)}
    for i in range(1, len(unstable)):
        for token in _starting(tokens, unstable[i:]):
            possible = unstable[:i] + token
            try:
                encoded = tokenizer.encode(possible.decode("utf-8"))
            except UnicodeDecodeError:
                encoded = engine.encode(possible, _WHOLE)
            length, end = 0, 0
            while length < len(unstable):
                length += len(bytes_of(encoded[end]))
                end += 1
            found.add(tuple(encoded[:end]))
    # White space at the end may be split off by what follows.
    character = unstable.decode("utf-8", "replace")[-1]
    cut = len(unstable) - len(character.encode("utf-8"))
    if cut > 0 and character.isspace() and not "\x1c" <= character <= "\x1f":
        found.add((*engine.encode(unstable[:cut], _WHOLE), *engine.encode(unstable[cut:], _WHOLE)))
    return stable, [list(completion) for completion in found]


def _last_piece(tokenizer: BPETokenizer, rest: bytes) -> int:
    """Where the last pretoken begins."""
    pattern = tokenizer.pattern
    if pattern.number is None:
        ends = pattern.boundaries(rest.decode("utf-8"))
    else:
        ends = np.frombuffer(tokenizer._engine.scan(rest, pattern.number, _bpe.best_isa), np.uint32)
    return int(ends[-2]) if len(ends) > 1 else 0


def _starting(tokens: list[bytes], prefix: bytes) -> Iterator[bytes]:
    for i in range(bisect.bisect_left(tokens, prefix), len(tokens)):
        if not tokens[i].startswith(prefix):
            return
        yield tokens[i]
