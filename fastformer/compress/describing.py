"""The description of a compact model, from which its sizes can be made again.

It is a plain dictionary on the model, `model.fastformer_compression`, and in `model.config` of a Hugging
Face model, where save_pretrained writes it into config.json:

    {"version": 1, "sites": {path: {"kind", "kept", "of"}}, "low_rank": {path: rank}, "shared": {path: [first, …]},
     "int8": bool}

Sizes that the stock configuration can tell (all layers alike, and a field for it) are written there and are not in
"sites"; when nothing is left, stock from_pretrained loads the model.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

ATTRIBUTE = "fastformer_compression"


def description(model: torch.nn.Module) -> dict[str, Any]:
    """A copy of the description a model carries, empty if it carries none."""
    spec = getattr(model, ATTRIBUTE, None) or getattr(getattr(model, "config", None), ATTRIBUTE, None)
    empty: dict[str, Any] = {"version": 1, "sites": {}, "low_rank": {}, "shared": {}, "int8": False}
    return {**empty, **copy.deepcopy(spec or {})}


def put(model: torch.nn.Module, spec: dict[str, Any]) -> None:
    """Put a description on the model and its configuration; nothing, if it describes nothing."""
    config: Any = getattr(model, "config", None)
    if any(spec[part] for part in ("sites", "low_rank", "shared", "int8")):
        model.__dict__[ATTRIBUTE] = spec
        if config is not None:
            setattr(config, ATTRIBUTE, spec)
    else:
        model.__dict__.pop(ATTRIBUTE, None)
        if config is not None:
            config.__dict__.pop(ATTRIBUTE, None)
