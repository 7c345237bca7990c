"""Maps and scores as a matplotlib figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fastformer.explain.gradients import Attribution
from fastformer.explain.tokens import Token, pool, pool_map

# Fonts that have Chinese, Japanese, Korean or pictures, where they are installed; matplotlib's own has none of them.
_FONTS = ("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC",
          "WenQuanYi Zen Hei", "Microsoft YaHei", "PingFang SC",
          "Noto Emoji", "Symbola")  # fmt: skip


def plot(
    values: Attribution | Tensor,
    tokens: Sequence[Token],
    *,
    path: str | Path | None = None,
    title: str | None = None,
) -> Any:
    """A picture of scores (bars) or of a map (a square of colours) over readable tokens.

    Args:
        values: an `Attribution`; scores (S,); or a map (S, S), as AttentionMaps gives them.
        tokens: of the same sequence, by `tokens_of`.
        path: where to write the picture, in the format that its ending says; None: it is not written.
        title: over the picture.

    Returns:
        The matplotlib Figure, closed for pyplot.

    Raises:
        ImportError: matplotlib is missing.
        TypeError, ValueError: values of another type or shape.
    """
    scores = values.scores if isinstance(values, Attribution) else values
    if not isinstance(scores, Tensor) or scores.ndim not in (1, 2):
        raise TypeError(f"values must be an Attribution or a tensor (S,) or (S, S), got {type(values).__name__}")
    from matplotlib import font_manager
    from matplotlib.figure import Figure

    installed = {font.name for font in font_manager.fontManager.ttflist}
    fonts = [name for name in _FONTS if name in installed]
    names = [token.text.strip() or "␣" for token in tokens]
    size = 2.0 + 0.22 * len(names)
    # A $ would begin a formula.
    labels: dict[str, Any] = {
        "labels": [name.replace("$", r"\$") for name in names],
        "fontfamily": fonts,
        "fontsize": 8,
    }
    figure = Figure(figsize=(max(4.0, size), 3.0 if scores.ndim == 1 else max(3.5, size)), layout="constrained")
    axes = figure.add_subplot()
    if scores.ndim == 1:
        heights = pool(tokens, scores)
        axes.bar(range(len(names)), heights, color=["#b2182b" if h > 0 else "#2166ac" for h in heights])
        axes.axhline(0, color="#666666", linewidth=0.8)
        axes.set_ylabel("adds to the score")
        axes.spines[["top", "right"]].set_visible(False)
    else:
        square = pool_map(tokens, scores).numpy()
        limit = float(abs(square).max()) or 1.0
        signed = bool((square < 0).any())
        image = axes.imshow(square, cmap="RdBu_r" if signed else "Blues", vmin=-limit if signed else 0.0, vmax=limit)
        figure.colorbar(image, ax=axes, shrink=0.7)
        axes.set_yticks(range(len(names)), **labels)
        axes.set_ylabel("looks")
        axes.set_xlabel("at")
    axes.set_xticks(range(len(names)), rotation=90, **labels)
    if title:
        axes.set_title(title, fontfamily=fonts, fontsize=10)
    if path is not None:
        figure.savefig(path, dpi=130)
    return figure
