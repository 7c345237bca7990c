"""Counting kernel launches: where a small model's training step spends its time on a GPU."""

from fastformer.launches.step import Comparison, StepCount, compare, count_launches

__all__ = ["Comparison", "StepCount", "compare", "count_launches"]
