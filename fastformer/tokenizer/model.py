"""What a tokenizer file says, independent of its format."""

from __future__ import annotations

import dataclasses

import numpy as np

from fastformer.tokenizer import _bpe
from fastformer.tokenizer.patterns import Pattern

UINT32_MAX_ID = (1 << 28) - 1


@dataclasses.dataclass
class Model:
    """A byte-level BPE model.

    Attributes:
        vocab: the bytes of every ordinary token and its id.
        merges: pairs in the order of rank; None where any two tokens merge whose concatenation is a token, by its id
            (tiktoken's models).
        whole_piece: a pretoken that is a token becomes that token, whether merges lead there or not.
        pattern: how text is cut into pretokens.
        special_tokens: strings that stand outside of the merging, and their ids.
    """

    vocab: dict[bytes, int]
    merges: list[tuple[bytes, bytes]] | None
    whole_piece: bool
    pattern: Pattern
    special_tokens: dict[str, int]

    def engine(self) -> _bpe.Engine:
        """The compiled vocabulary. Raises ValueError for one that cannot encode every text exactly."""
        for name, number in [*self.vocab.items(), *self.special_tokens.items()]:
            if not isinstance(number, int) or not 0 <= number <= UINT32_MAX_ID:
                raise ValueError(f"token {name!r} has the id {number!r}; ids are integers from 0 to {UINT32_MAX_ID}")
        tokens = list(self.vocab)
        merges = None
        if self.merges is not None:
            index = {token: i for i, token in enumerate(tokens)}
            rows = []
            for rank, (left, right) in enumerate(self.merges):
                try:
                    rows.append((index[left], index[right], index[left + right]))
                except KeyError as error:
                    raise ValueError(
                        f"merge {rank} ({left!r} + {right!r}) needs {error.args[0]!r}, which is no token"
                    ) from None
            merges = np.asarray(rows, dtype=np.uint32).reshape(-1, 3)
        return _bpe.Engine(
            tokens,
            np.fromiter(self.vocab.values(), np.uint32, len(tokens)),
            merges,
            self.whole_piece,
            [name.encode("utf-8") for name in self.special_tokens],
            np.fromiter(self.special_tokens.values(), np.uint32, len(self.special_tokens)),
        )
