"""What is known about model families: one small table each, over shared mechanisms."""

from __future__ import annotations

import torch

from fastformer.integrations.families import albert, bert, decoders, distilbert, losses, norms, seq2seq, torch_nn
from fastformer.integrations.families.interface import uses_interface
from fastformer.integrations.families.rule import Rule
from fastformer.integrations.swap import class_path, original_class

RULES: dict[str, Rule] = {
    **torch_nn.RULES,
    **bert.RULES,
    **distilbert.RULES,
    **albert.RULES,
    **norms.RULES,
    **decoders.RULES,
    **seq2seq.RULES,
    **losses.RULES,
}
NAMES = (
    "torch.nn Transformers, their layers, attention and norms",
    "Hugging Face BERT, RoBERTa, XLM-RoBERTa, ELECTRA, DistilBERT, ALBERT, ModernBERT",
    "T5, BART, mBART",
    "GPT-2, Llama, Mistral, Qwen 2 and 3, Gemma 2 and 3, GPT-OSS",
    "attention and norms of any other Hugging Face model",
)


def rule_for(module: torch.nn.Module, in_transformers: bool, norms_owned: bool) -> Rule | None:
    """The rule for a module: its class's, or one for what it is recognised to be.

    Args:
        in_transformers: whether the module belongs to a Hugging Face model.
        norms_owned: whether a behaviour above it deals with its norms.
    """
    rule = RULES.get(class_path(module))
    if rule is not None:
        return rule
    if not in_transformers:
        return torch_nn.NORMS.get(class_path(module))
    if uses_interface(module):
        return decoders.ATTENTION
    return losses.recognise(module) or (None if norms_owned else norms.recognise(module))


def known_base(module: torch.nn.Module) -> str:
    """Name of a class with a rule that a module's class without one derives from, or ""."""
    cls = original_class(module)
    if cls.__module__.startswith("fastformer."):
        return ""
    for base in cls.__mro__[1:]:
        path = f"{base.__module__}.{base.__qualname__}"
        if path in RULES or path in torch_nn.NORMS:
            return base.__qualname__
    return ""


__all__ = ["NAMES", "RULES", "Rule", "known_base", "rule_for"]
