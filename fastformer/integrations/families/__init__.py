"""What is known about model families: one small table each, over one shared mechanism."""

import torch

from fastformer.integrations.families import bert, torch_nn
from fastformer.integrations.families.rule import Rule
from fastformer.integrations.swap import class_path

RULES: dict[str, Rule] = {**torch_nn.RULES, **bert.RULES}
NAMES = ("torch.nn Transformers, their layers, attention and norms", "Hugging Face BERT")


def rule_for(module: torch.nn.Module, in_transformers: bool) -> Rule | None:
    """The rule for a module.

    Args:
        in_transformers: whether the module belongs to a Hugging Face model.
    """
    rule = RULES.get(class_path(module))
    return rule if rule is not None or in_transformers else torch_nn.NORMS.get(class_path(module))


__all__ = ["NAMES", "RULES", "Rule", "rule_for"]
