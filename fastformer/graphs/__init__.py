"""Replaying training steps as CUDA graphs, for models whose kernels take longer to launch than to run."""

from fastformer.graphs.model import GraphReport, graphed, ungraphed

__all__ = ["GraphReport", "graphed", "ungraphed"]
