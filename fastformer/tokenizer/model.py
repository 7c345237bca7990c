"""What a tokenizer file says, independent of its format."""

from __future__ import annotations

import dataclasses

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
        added = [(token.content, token.id) for token in self.added.values()]
        numbers = self.vocab.values()
        if set(map(type, numbers)) - {int} or min(numbers, default=0) < 0 or max(numbers, default=0) > MAX_ID:
            suspects: list[tuple[str | bytes, int]] = [*self.vocab.items(), *added]
        else:
            suspects = [*added]
        for name, number in suspects:
            if type(number) is not int or not 0 <= number <= MAX_ID:
                raise ValueError(f"token {name!r} has the id {number!r}; ids are integers from 0 to {MAX_ID}")
        if b"" in self.vocab or "" in self.added:
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
            [name.encode("utf-8") for name, _ in added],
            np.fromiter((number for _, number in added), np.uint32, len(added)),
        )


def specials(tokens: dict[str, int]) -> dict[str, AddedToken]:
    """Plain special tokens, as tiktoken has them."""
    return {name: AddedToken(name, number) for name, number in tokens.items()}
