"""The operators: plain functions of tensors, differentiable, the same on every backend.

Each validates its arguments, chooses a backend (`fastformer.ops.backend`) and carries its reference in PyTorch beside
it, which the tests and benchmarks import.
"""

import importlib
from typing import Any

_HOMES = {
    "add_layer_norm": "norm",
    "add_rms_norm": "norm",
    "attention_kv_cache": "attention",
    "attention_varlen": "attention",
    "attention_weights": "attention",
    "bias_dropout_add": "activation",
    "bias_gelu": "activation",
    "cross_entropy": "loss",
    "embedding_layer_norm": "embedding",
    "geglu": "activation",
    "layer_norm": "norm",
    "linear_cross_entropy": "linear_loss",
    "merge_attention": "attention",
    "pool_packed": "pooling",
    "relu_squared": "activation",
    "rms_norm": "norm",
    "rotary_embedding": "rotary",
    "scaled_dot_product_attention": "attention",
    "swiglu": "activation",
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
