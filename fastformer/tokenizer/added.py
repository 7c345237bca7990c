"""Added tokens: strings that are found in the text before it is cut and merged.

Special ones are looked for only where the caller allows them; the others always are. Source of the rules: the
AddedVocabulary of Hugging Face's tokenizers, and tiktoken's `encode`.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator

_BLANK = "".join(
    chr(c) for c in [*range(9, 14), 32, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F]
)
WHITE_SPACE = _BLANK + "\u205f\u3000"


@dataclasses.dataclass(frozen=True)
class AddedToken:
    """One added token.

    Attributes:
        content: the string.
        id: its id.
        special: recognised only where `allowed_special` names it.
        lstrip, rstrip: the white space to its left or right belongs to it.
        normalized: looked for in the normalized text, normalized itself.
    """

    content: str
    id: int
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False


@functools.lru_cache(maxsize=256)
def matcher(tokens: frozenset[str]) -> re.Pattern[str]:
    """Finds the leftmost of the tokens, of several at one place the longest."""
    return re.compile("|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True)))


def split(
    text: str, tokens: dict[str, AddedToken], allowed: frozenset[str], consume: bool
) -> Iterator[tuple[str, AddedToken | None]]:
    """The parts of `text`: added tokens, and what lies between them with None.

    Args:
        tokens: by the string to look for.
        allowed: the special tokens to recognise.
        consume: a special token that is not allowed still hides what begins within it, as in Hugging Face's
            `encode_special_tokens`; otherwise it is not looked for at all, as in tiktoken.
    """
    wanted = frozenset(s for s, t in tokens.items() if consume or not t.special or t.content in allowed)
    start = 0
    for match in matcher(wanted).finditer(text) if wanted else ():
        token = tokens[match.group()]
        if token.special and token.content not in allowed:
            continue
        low, high = match.span()
        if token.lstrip:
            low = max(start, len(text[:low].rstrip(WHITE_SPACE)))
        if token.rstrip:
            high += len(text) - high - len(text[high:].lstrip(WHITE_SPACE))
        if start < low:
            yield text[start:low], None
        yield match.group(), token
        start = high
    if start < len(text):
        yield text[start:], None
