"""The published pre-tokenizer patterns and the scanners that stand for them.

A pattern is named ("gpt2", "cl100k", "o200k", "llama3", "qwen2", "deepseek", "whole") or given as a regular
expression. The published expressions of the named ones are recognised and run by the hand-written scanners of
csrc/bpe; any other goes through the `regex` package, which is exact and slower.

Sources: tiktoken's openai_public.py (gpt2, cl100k, o200k); the tokenizer.json of Llama 3, Qwen 2 and 3, DeepSeek V3.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import warnings
from typing import Any

import numpy as np

GPT2 = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
CL100K = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]"""
    r"""|\s+(?!\S)|\s"""
)
_WORD = r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)"""
O200K = "|".join(
    [
        r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+""" + _WORD + "?",
        r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*""" + _WORD + "?",
        r"""\p{N}{1,3}""",
        r""" ?[^\s\p{L}\p{N}]+[\r\n/]*""",
        r"""\s*[\r\n]+""",
        r"""\s+(?!\S)""",
        r"""\s+""",
    ]
)
_LINES = r"""| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
LLAMA3 = _WORD + r"""|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}""" + _LINES
QWEN2 = _WORD + r"""|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}""" + _LINES
# cl100k as Oniguruma, the engine of Hugging Face's tokenizers, must be told it: there `$` is the end of a line, and
# `{1,3}+` is no possessive quantifier.
CL100K_ONIGURUMA = _WORD + r"""|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}""" + _LINES.replace(r"|\s*[", r"|\s+\z|\s*[")
# DeepSeek splits three times; the engine does it in one pass.
DEEPSEEK = (
    r"""\p{N}{1,3}""",
    r"""[一-龥぀-ゟ゠-ヿ]+""",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
)

_NUMBERS = {"gpt2": 0, "cl100k": 1, "o200k": 2, "llama3": 3, "qwen2": 4, "deepseek": 5, "whole": 6}
_ALIASES = {
    "r50k": "gpt2",
    "p50k": "gpt2",
    "r50k_base": "gpt2",
    "p50k_base": "gpt2",
    "cl100k_base": "cl100k",
    "o200k_base": "o200k",
    "llama-3": "llama3",
    "qwen3": "qwen2",
    "deepseek-v3": "deepseek",
}
_EXPRESSIONS: dict[str, tuple[str, ...]] = {
    "gpt2": (GPT2,),
    "cl100k": (CL100K,),
    "o200k": (O200K,),
    "llama3": (LLAMA3,),
    "qwen2": (QWEN2,),
    "deepseek": DEEPSEEK,
    "whole": (),
}
# Other spellings of the same splits.
_KNOWN: dict[tuple[str, ...], str] = {
    **{expressions: name for name, expressions in _EXPRESSIONS.items()},
    (r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s""",): "gpt2",
    (CL100K_ONIGURUMA,): "cl100k",
    (r"""'s|'t|'re|'ve|'m|'ll|'d| ?[\p{L}]+| ?[\p{N}]+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""",): "gpt2",
}
# The same for what Hugging Face's regex engine reads: without tiktoken's spellings, which mean something else there.
ONIGURUMA_KNOWN = {k: v for k, v in _KNOWN.items() if not any(re.search(r"\$\||[0-9]\}\+", e) for e in k)}


@dataclasses.dataclass(frozen=True)
class Pattern:
    """How text is cut into pretokens.

    Attributes:
        name: one of the named patterns, or "regex".
        number: the scanner's number in the engine, None for "regex".
        expressions: regular expressions; each cuts the pieces that the one before it left.
    """

    name: str
    number: int | None
    expressions: tuple[str, ...]

    def boundaries(self, text: str) -> np.ndarray:
        """Ends of the pretokens of `text` in bytes of its UTF-8, uint32 [pretokens]; for patterns without a scanner."""
        ends = [len(text)]
        for expression in self.expressions:
            compiled, start, cut = _compile(expression), 0, set(ends)
            for end in ends:
                for match in compiled.finditer(text[start:end]):
                    cut.update((start + match.start(), start + match.end()))
                start = end
            ends = sorted(cut - {0})
        if not text.isascii():
            widths = np.cumsum([len(c.encode("utf-8", "surrogatepass")) for c in text])
            ends = [int(widths[end - 1]) if end else 0 for end in ends]
        return np.asarray(ends, dtype=np.uint32)


@functools.lru_cache(maxsize=64)
def _compile(expression: str) -> Any:
    try:
        import regex
    except ImportError as error:
        raise ImportError(
            f"the pattern {expression!r} has no scanner in the engine and needs the package `regex`: "
            "pip install fastformer[tokenizer]"
        ) from error
    return regex.compile(expression)


@functools.lru_cache(maxsize=64)
def resolve(pattern: str | tuple[str, ...]) -> Pattern:
    """The Pattern of a name, a regular expression, or several that cut one after the other.

    Raises:
        TypeError: `pattern` is no str and no tuple of str.
        ValueError: a regular expression that does not compile.
        ImportError: the expression needs the package `regex`, which is not installed.
    """
    if isinstance(pattern, str):
        name = _ALIASES.get(pattern, pattern)
        if name in _NUMBERS:
            return Pattern(name, _NUMBERS[name], _EXPRESSIONS[name])
        expressions: tuple[str, ...] = (pattern,)
    elif isinstance(pattern, tuple) and all(isinstance(p, str) for p in pattern):
        expressions = pattern
    else:
        raise TypeError(f"pattern must be a name or a regular expression, got {type(pattern).__name__}")
    if expressions in _KNOWN:
        return resolve(_KNOWN[expressions])
    for expression in expressions:
        try:
            _compile(expression)
        except ImportError:
            raise
        except Exception as error:
            names = ", ".join(_NUMBERS)
            raise ValueError(
                f"pattern {expression!r} is none of {names} and no valid regular expression: {error}"
            ) from error
    warnings.warn(
        f"the pattern {expressions!r} has no scanner in the engine; the `regex` package splits the text, exactly but "
        "slower",
        stacklevel=3,
    )
    return Pattern("regex", None, expressions)
