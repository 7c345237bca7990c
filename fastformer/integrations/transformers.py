"""What plugs into Hugging Face transformers."""

from fastformer.integrations.attention import register

__all__ = ["register"]
