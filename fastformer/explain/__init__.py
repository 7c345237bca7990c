"""What a patched model looks at, and what its answers come from.

- `attention_maps`: attention probabilities at flash attention's memory, recomputed map by map; their rollout (Abnar and
  Zuidema 2020), and their gradients times themselves.
- `head_importance`: how much a loss changes with each head (Michel et al. 2019).
- `integrated_gradients`: what each token adds to an answer (Sundararajan et al. 2017).
- `tokens_of`, `plot`, `html`: the same over readable tokens, as a picture and as a page.
"""

from fastformer.explain.gradients import Attribution, head_importance, integrated_gradients
from fastformer.explain.maps import AttentionMaps, attention_maps
from fastformer.explain.page import Passage, html
from fastformer.explain.picture import plot
from fastformer.explain.tokens import Token, merge, tokens_of

__all__ = [
    "AttentionMaps",
    "Attribution",
    "Passage",
    "Token",
    "attention_maps",
    "head_importance",
    "html",
    "integrated_gradients",
    "merge",
    "plot",
    "tokens_of",
]
