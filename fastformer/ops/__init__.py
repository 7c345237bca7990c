"""The operators: plain functions of tensors, differentiable, the same on every backend.

Each validates its arguments, chooses a backend (`fastformer.ops.backend`) and carries its reference in PyTorch beside
it, which the tests and benchmarks import.
"""

import importlib
from typing import Any

_HOMES = {
    "add_layer_norm": "norm",
    "add_rms_norm": "norm",
    "attention_varlen": "attention",
    "layer_norm": "norm",
    "rms_norm": "norm",
    "scaled_dot_product_attention": "attention",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastformer.ops' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"fastformer.ops.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
