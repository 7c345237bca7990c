"""Decoding ids as they come."""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastformer.tokenizer.bpe import BPETokenizer


class StreamDecoder:
    """Turns ids into text piece by piece; a character is given out once its last byte is there, never in halves.

    >>> stream = tok.stream()
    >>> for token in model:
    ...     print(stream.push(token), end="")
    >>> print(stream.finish())
    """

    def __init__(self, tokenizer: BPETokenizer, errors: str = "replace") -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors)

    def push(self, ids: int | Iterable[int]) -> str:
        """The text that became complete with these ids. Raises KeyError naming an id that is no token."""
        return self._decoder.decode(self._tokenizer.decode_bytes([ids] if isinstance(ids, int) else ids))

    def finish(self) -> str:
        """What an unfinished character is decoded to (by `errors`); the stream may then be used anew."""
        text = self._decoder.decode(b"", True)
        self._decoder.reset()
        return text
