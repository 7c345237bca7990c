"""An object with the methods of tiktoken.Encoding, and its defaults: special tokens in a text raise ValueError."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fastformer.tokenizer import unstable

if TYPE_CHECKING:
    from fastformer.tokenizer.bpe import BPETokenizer

Special = Literal["all"] | Collection[str]


class TiktokenEncoding:
    """See tiktoken.Encoding."""

    def __init__(self, tokenizer: BPETokenizer, name: str) -> None:
        self.name = name
        self._tokenizer = tokenizer

    def __repr__(self) -> str:
        return f"<Encoding {self.name!r}>"

    def encode_ordinary(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)

    def encode(self, text: str, *, allowed_special: Special = (), disallowed_special: Special = "all") -> list[int]:
        return self._tokenizer.encode(text, allowed_special=allowed_special, disallowed_special=disallowed_special)

    def encode_to_numpy(
        self, text: str, *, allowed_special: Special = (), disallowed_special: Special = "all"
    ) -> np.ndarray:
        return self._tokenizer.encode_array(
            text, allowed_special=allowed_special, disallowed_special=disallowed_special
        )

    def encode_ordinary_batch(self, text: list[str], *, num_threads: int = 8) -> list[list[int]]:
        return self._tokenizer.encode_batch(text)

    def encode_batch(
        self,
        text: list[str],
        *,
        num_threads: int = 8,
        allowed_special: Special = (),
        disallowed_special: Special = "all",
    ) -> list[list[int]]:
        return self._tokenizer.encode_batch(
            text, allowed_special=allowed_special, disallowed_special=disallowed_special
        )

    def encode_with_unstable(
        self, text: str, *, allowed_special: Special = (), disallowed_special: Special = "all"
    ) -> tuple[list[int], list[list[int]]]:
        """The ids that more text cannot change, and the ways in which the rest of `text` may go on."""
        ids = self.encode(text, allowed_special=allowed_special, disallowed_special=disallowed_special)
        return unstable.split(self._tokenizer, ids, self._sorted_tokens)

    @functools.cached_property
    def _sorted_tokens(self) -> list[bytes]:
        return sorted(self._tokenizer.vocab)

    def encode_single_token(self, text_or_bytes: str | bytes) -> int:
        return self._tokenizer.token_to_id(text_or_bytes)

    def _encode_bytes(self, text: bytes) -> list[int]:
        return self._tokenizer.encode(text)

    def decode_bytes(self, tokens: Iterable[int]) -> bytes:
        return self._tokenizer.decode_bytes(tokens)

    def decode(self, tokens: Iterable[int], errors: str = "replace") -> str:
        return self._tokenizer.decode(tokens, errors)

    def decode_single_token_bytes(self, token: int) -> bytes:
        return self._tokenizer.id_to_token(token)

    def decode_tokens_bytes(self, tokens: Iterable[int]) -> list[bytes]:
        return [self._tokenizer.id_to_token(token) for token in tokens]

    def decode_with_offsets(self, tokens: Iterable[int]) -> tuple[str, list[int]]:
        """The text, and for each token the index of the character that its first byte belongs to."""
        offsets, length = [], 0
        parts = self.decode_tokens_bytes(tokens)
        for part in parts:
            offsets.append(max(0, length - (0x80 <= part[0] < 0xC0)))
            length += sum(1 for byte in part if not 0x80 <= byte < 0xC0)
        return b"".join(parts).decode("utf-8", errors="strict"), offsets

    def decode_batch(
        self, batch: Sequence[Iterable[int]], *, errors: str = "replace", num_threads: int = 8
    ) -> list[str]:
        return self._tokenizer.decode_batch(batch, errors)

    def decode_bytes_batch(self, batch: Sequence[Iterable[int]], *, num_threads: int = 8) -> list[bytes]:
        return [self._tokenizer.decode_bytes(tokens) for tokens in batch]

    def token_byte_values(self) -> list[bytes]:
        return list(self._sorted_tokens)

    @property
    def eot_token(self) -> int:
        return self._tokenizer.special_tokens["<|endoftext|>"]

    @property
    def special_tokens_set(self) -> set[str]:
        return set(self._tokenizer.special_tokens)

    def is_special_token(self, token: int) -> bool:
        return token in self._tokenizer.special_tokens.values()

    @property
    def n_vocab(self) -> int:
        return self._tokenizer.vocab_size

    @property
    def max_token_value(self) -> int:
        return self._tokenizer.vocab_size - 1

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._tokenizer, self.name)
