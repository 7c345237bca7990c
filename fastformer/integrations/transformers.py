"""What plugs into Hugging Face transformers."""

from fastformer.integrations.attention import register
from fastformer.integrations.collating import PackedCollator, TokenBudget

__all__ = ["PackedCollator", "TokenBudget", "register"]
