"""Speeding up models that already exist: `patch` and `unpatch`."""

from fastformer.integrations.patching import PatchReport, patch, unpatch

__all__ = ["PatchReport", "patch", "unpatch"]
