"""fastformer: custom kernels for Transformers that drop into the fine-tuning loops people already have.

>>> import fastformer as ff
>>> report = ff.patch(model)      # a stock Hugging Face or torch.nn model, now faster, with the same numbers
>>> ff.unpatch(model)             # and back, leaving no trace

Importing this package imports neither triton nor transformers (and torch only with the first name that needs it).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastformer.version import __version__

if TYPE_CHECKING:
    from fastformer import compress, explain, nn, ops
    from fastformer.graphs import graphed, ungraphed
    from fastformer.info import info
    from fastformer.integrations import patch, unpatch
    from fastformer.tokenizer import BPETokenizer

_HOMES = {
    "BPETokenizer": "fastformer.tokenizer",
    "graphed": "fastformer.graphs",
    "info": "fastformer.info",
    "patch": "fastformer.integrations",
    "ungraphed": "fastformer.graphs",
    "unpatch": "fastformer.integrations",
}
_MODULES = ("compress", "explain", "nn", "ops")

__all__ = [
    "BPETokenizer",
    "__version__",
    "compress",
    "explain",
    "graphed",
    "info",
    "nn",
    "ops",
    "patch",
    "ungraphed",
    "unpatch",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"fastformer.{name}")
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'fastformer' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
