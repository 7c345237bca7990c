"""What is known about model families: one small table each, over one shared mechanism."""

from fastformer.integrations.families import bert, torch_nn
from fastformer.integrations.families.rule import Rule

RULES: dict[str, Rule] = {**torch_nn.RULES, **bert.RULES}
NAMES = ("torch.nn Transformer encoder layers and attention", "Hugging Face BERT")

__all__ = ["NAMES", "RULES", "Rule"]
