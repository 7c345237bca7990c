"""What plugs into Hugging Face transformers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastformer.integrations.attention import register
from fastformer.integrations.collating import PackedCollator, TokenBudget

if TYPE_CHECKING:
    from fastformer.integrations.tokenizing import FastTokenizer

__all__ = ["FastTokenizer", "PackedCollator", "TokenBudget", "register"]


def __getattr__(name: str) -> Any:
    # The tokenizer derives from transformers' class, so its module imports transformers.
    if name == "FastTokenizer":
        return importlib.import_module("fastformer.integrations.tokenizing").FastTokenizer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
