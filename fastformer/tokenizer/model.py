"""What a tokenizer file says, independent of its format."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from fastformer.tokenizer import _bpe
from fastformer.tokenizer.added import AddedToken
from fastformer.tokenizer.normalize import Form
from fastformer.tokenizer.patterns import Pattern

MAX_ID = (1 << 28) - 1


@dataclasses.dataclass
class Model:
    """A byte-level BPE model.

    Attributes:
        vocab: the bytes of every ordinary token and its id.
        merges: pairs in the order of rank; None where any two tokens merge whose concatenation is a token, by its id
            (tiktoken's models).
        whole_piece: a pretoken that is a token becomes that token, whether merges lead there or not.
        pattern: how text is cut into pretokens.
        added: strings that stand outside of the merging.
        normalizers: Unicode forms, applied in turn before anything but unnormalized added tokens.
        prefix_space: text between added tokens that does not begin with a space gets one.
        template: ids before and after a text where special tokens are added to it.
        hugging_face: added tokens are found as in Hugging Face's tokenizers, not as in tiktoken.
    """

    vocab: dict[bytes, int]
    merges: list[tuple[bytes, bytes]] | None
    whole_piece: bool
    pattern: Pattern
    added: dict[str, AddedToken]
    normalizers: tuple[Form, ...] = ()
    prefix_space: bool = False
    template: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    hugging_face: bool = False

    @property
    def plain(self) -> bool:
        """Text without allowed special tokens goes to the engine as it is."""
        return not (self.normalizers or self.prefix_space or any(not token.special for token in self.added.values()))

    def engine(self) -> _bpe.Engine:
        """The compiled vocabulary. Raises ValueError for one that cannot encode every text exactly."""
        check_added(self.added)
        numbers = self.vocab.values()
        if set(map(type, numbers)) - {int} or min(numbers, default=0) < 0 or max(numbers, default=0) > MAX_ID:
            for token, number in self.vocab.items():
                check_id(token, number)
        if b"" in self.vocab:
            raise ValueError("the vocabulary holds an empty token")
        tokens = list(self.vocab)
        merges = None
        if self.merges is not None:
            index = {token: i for i, token in enumerate(tokens)}
            rows = []
            for rank, (left, right) in enumerate(self.merges):
                try:
                    rows.append((index[left], index[right], index[left + right]))
                except KeyError as error:
                    missing = error.args[0]
                    raise ValueError(
                        f"merge {rank} ({left!r} + {right!r}) needs {missing!r}, which is no token"
                    ) from None
            merges = np.asarray(rows, dtype=np.uint32).reshape(-1, 3)
        return _bpe.Engine(
            tokens,
            np.fromiter(self.vocab.values(), np.uint32, len(tokens)),
            merges,
            self.whole_piece,
            *added_arrays(self.added),
        )


class Compiled(Model):
    """A model that exists as an engine; `vocab` and `merges` are taken out of it when first asked for.

    Args:
        engine: what holds the vocabulary.
        has_merges: the order of merging is that of a list, not that of the ids.
        others: as for Model.
    """

    def __init__(
        self, engine: _bpe.Engine, has_merges: bool, pattern: Pattern, added: dict[str, AddedToken], **others: Any
    ) -> None:
        self._engine = engine
        self.has_merges = has_merges
        self.pattern = pattern
        self.added = added
        self.whole_piece = others.pop("whole_piece", not has_merges)
        for name, value in others.items():
            setattr(self, name, value)
        if not has_merges:
            self.merges = None

    def __getattr__(self, name: str) -> Any:
        if name == "vocab":
            self.vocab = self._engine.vocabulary()
            return self.vocab
        if name == "merges":
            token_of = {number: token for token, number in self.vocab.items()}
            rows = np.frombuffer(self._engine.merges(), dtype=np.uint32).reshape(-1, 3).tolist()
            self.merges = [(token_of[left], token_of[right]) for left, right, _ in rows]
            return self.merges
        raise AttributeError(name)

    def engine(self) -> _bpe.Engine:
        return self._engine


def check_id(name: object, number: object) -> None:
    if type(number) is not int or not 0 <= number <= MAX_ID:
        raise ValueError(f"token {name!r} has the id {number!r}; ids are integers from 0 to {MAX_ID}")


def check_added(added: dict[str, AddedToken]) -> None:
    for token in added.values():
        check_id(token.content, token.id)
    if "" in added:
        raise ValueError("the vocabulary holds an empty token")


def added_arrays(added: dict[str, AddedToken]) -> tuple[list[bytes], np.ndarray]:
    """The strings and the ids of added tokens, as the engine takes them."""
    names = [token.content.encode("utf-8") for token in added.values()]
    return names, np.fromiter((token.id for token in added.values()), np.uint32, len(names))


def specials(tokens: dict[str, int]) -> dict[str, AddedToken]:
    """Plain special tokens, as tiktoken has them."""
    return {name: AddedToken(name, number) for name, number in tokens.items()}
