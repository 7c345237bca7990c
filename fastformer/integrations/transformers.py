"""What plugs into Hugging Face transformers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastformer.integrations.attention import register
from fastformer.integrations.collating import PackedCollator, PackedSeq2SeqCollator, TokenBudget

if TYPE_CHECKING:
    from fastformer.compress.callback import AdaptiveCompressionCallback
    from fastformer.integrations.tokenizing import FastTokenizer

__all__ = [
    "AdaptiveCompressionCallback",
    "FastTokenizer",
    "PackedCollator",
    "PackedSeq2SeqCollator",
    "TokenBudget",
    "register",
]


# What derives from transformers' classes stands in modules that import transformers.
_HOMES = {
    "AdaptiveCompressionCallback": "fastformer.compress.callback",
    "FastTokenizer": "fastformer.integrations.tokenizing",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
