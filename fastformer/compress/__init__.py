"""Compression that adapts to validation quality and makes models really smaller and faster.

- `AdaptiveCompressor`: prunes attention heads and feed-forward channels while a model trains, as far as a validation
  metric allows, and takes back what it does not. `AdaptiveCompressionCallback` is the same for Hugging Face's Trainer.
- `compact`: takes pruned units out; `save` and `load`: keep the result, without the object that made it.
- `prune`: a rate of one's own, at once; `Pruner` and `find_sites` are its parts. `low_rank`, `quantize_int8`: further
  rungs. `speedup`, `latency`, `flops`: what came of it.
- `share_layers`: parameters shared across layers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastformer.compress.adaptive import AdaptiveCompressor
from fastformer.compress.compacting import compact, shrink
from fastformer.compress.measuring import flops, latency, speedup
from fastformer.compress.pruner import Pruner, prune
from fastformer.compress.report import CompressionReport, Evaluation
from fastformer.compress.rungs import low_rank, quantize_int8
from fastformer.compress.saving import load, save
from fastformer.compress.sharing import SharingReport, share_layers
from fastformer.compress.sites import Site, Sites, find_sites
from fastformer.compress.target import Target

if TYPE_CHECKING:
    from fastformer.compress.callback import AdaptiveCompressionCallback

__all__ = [
    "AdaptiveCompressionCallback",
    "AdaptiveCompressor",
    "CompressionReport",
    "Evaluation",
    "Pruner",
    "SharingReport",
    "Site",
    "Sites",
    "Target",
    "compact",
    "find_sites",
    "flops",
    "latency",
    "load",
    "low_rank",
    "prune",
    "quantize_int8",
    "save",
    "share_layers",
    "shrink",
    "speedup",
]


def __getattr__(name: str) -> Any:
    # The callback derives from transformers' class, so its module imports transformers.
    if name == "AdaptiveCompressionCallback":
        return importlib.import_module("fastformer.compress.callback").AdaptiveCompressionCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
