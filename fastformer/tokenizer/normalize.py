"""Unicode normalization as Hugging Face's tokenizers do it: by Unicode 9.0.0, whatever Python's own version is.

Normalization of assigned characters never changes between versions. So text is cut at every character that is younger
than 9.0.0, those pass untouched, and Python normalizes what lies between.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from typing import Literal

from fastformer.tokenizer.unassigned import RANGES

Form = Literal["NFC", "NFD", "NFKC", "NFKD"]
FORMS: tuple[Form, ...] = ("NFC", "NFD", "NFKC", "NFKD")


@functools.cache
def _young() -> re.Pattern[str]:
    parts = []
    for item in RANGES.split():
        low, _, high = item.partition("-")
        parts.append(f"\\U{int(low, 16):08x}-\\U{int(high or low, 16):08x}")
    return re.compile(f"([{''.join(parts)}])")


def normalize(form: Form, text: str) -> str:
    """`text` in one of the four forms."""
    if text.isascii():
        return text
    if not _young().search(text):
        return unicodedata.normalize(form, text)
    # Every second part is one young character, a part of its own so that none composes with another.
    parts = _young().split(text)
    return "".join([p if i & 1 else unicodedata.normalize(form, p) for i, p in enumerate(parts)])
