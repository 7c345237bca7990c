"""Texts with their scores and maps as one HTML file: no network, no library, readable without scripts."""

from __future__ import annotations

import html as escaping
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from fastformer.explain.gradients import Attribution
from fastformer.explain.tokens import Token, pool, pool_map

Values = Attribution | Tensor
_RED, _BLUE, _ORANGE = "178,24,43", "33,102,172", "217,119,6"
_STRONGEST = 0.75  # opacity; more would hide the text

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --faint: #6b7280; --line: #d8dbe0; --paper: #ffffff;
  --font: system-ui, "Noto Sans", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", "Noto Color Emoji",
    sans-serif; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e7e9; --faint: #9aa1ab; --line: #3a3f47; --paper: #17191c; } }
body { margin: 2rem auto; max-width: 60rem; padding: 0 1.25rem; color: var(--ink); background: var(--paper);
  font: 16px/1.5 var(--font); }
h1 { font-size: 1.35rem; margin: 0 0 1.5rem; }
section { border-top: 1px solid var(--line); padding: 1rem 0 1.25rem; }
.caption { margin: 0 0 .5rem; font-weight: 600; }
.bar { display: flex; flex-wrap: wrap; gap: .4rem 1.25rem; align-items: center; color: var(--faint);
  font-size: .85rem; }
select { font: inherit; padding: .1rem .3rem; }
.key { display: inline-flex; align-items: center; gap: .35rem; }
.key[hidden] { display: none; }
.rest { color: var(--faint); font-style: normal; }
.swatch { width: 4.5rem; height: .75rem; border-radius: 2px; border: 1px solid var(--line); }
.text { margin: .75rem 0 .5rem; font-size: 1.15rem; line-height: 2; white-space: pre-wrap; overflow-wrap: anywhere; }
.text span { border-radius: 3px; padding: .18em 0; cursor: default; }
.text span.special { font: .68em/1 ui-monospace, monospace; color: var(--faint); border: 1px solid var(--line);
  padding: .25em .4em; margin: 0 .3em; vertical-align: .12em; }
.text span:hover, .text span:focus { outline: 1px solid var(--ink); outline-offset: 0; }
.text span.chosen { outline: 2px solid var(--ink); }
.readout { min-height: 1.4em; color: var(--faint); font-size: .85rem; font-variant-numeric: tabular-nums; margin: 0; }
"""

_SCRIPT = """
"use strict";
for (const section of document.querySelectorAll("section")) {
  const views = JSON.parse(section.querySelector("script").textContent);
  const spans = [...section.querySelectorAll(".text span")];
  const select = section.querySelector("select"), readout = section.querySelector(".readout");
  const keys = section.querySelectorAll(".key");
  let view = views[0], pinned = -1;
  const number = v => (v < 0 ? "\\u2212" : "") + Math.abs(v).toFixed(4);
  const name = i => "\\u201c" + spans[i].textContent + "\\u201d";
  const values = row => view.map ? (row < 0 ? view.mean : view.map[row]) : view.scores;
  function paint(row) {
    const shown = values(row), most = view.map ? Math.max(...shown, 1e-12) : view.most;
    spans.forEach((span, i) => {
      const share = Math.min(1, Math.abs(shown[i]) / most) * STRONGEST;
      const color = view.map ? ORANGE : shown[i] > 0 ? RED : BLUE;
      span.style.backgroundColor = "rgba(" + color + "," + share.toFixed(3) + ")";
      span.classList.toggle("chosen", view.map !== undefined && i === row);
    });
    keys.forEach(key => { key.hidden = key.dataset.kind !== (view.map ? "map" : "scores"); });
  }
  function tell(i) {
    if (!view.map) readout.textContent = i < 0 ? view.note : name(i) + " adds " + number(view.scores[i]);
    else if (i < 0) readout.textContent = view.note;
    else {
      const best = view.map[i].map((v, j) => [v, j]).sort((a, b) => b[0] - a[0]).slice(0, 5);
      readout.textContent = name(i) + " looks at " + best.map(([v, j]) => name(j) + " " + number(v)).join(", ");
    }
  }
  function show(i) { if (view.map) paint(i); tell(i); }
  spans.forEach((span, i) => {
    const enter = () => show(i), leave = () => show(pinned);
    span.addEventListener("mouseenter", enter);
    span.addEventListener("focus", enter);
    span.addEventListener("mouseleave", leave);
    span.addEventListener("blur", leave);
    span.addEventListener("click", () => { pinned = pinned === i ? -1 : i; show(pinned); });
  });
  if (select) select.addEventListener("change", () => {
    view = views[select.selectedIndex];
    paint(pinned);
    tell(pinned);
  });
}
"""


@dataclass(frozen=True)
class Passage:
    """A text on a page.

    Attributes:
        text: as it was tokenised; tokens: its pieces, by `tokens_of`.
        values: an `Attribution`, scores (S,) or a map (S, S); or several by name, of which the reader chooses one.
        caption: a line above, as what the model answered.
    """

    text: str
    tokens: Sequence[Token]
    values: Values | Mapping[str, Values]
    caption: str = ""


def html(
    passages: Passage | Sequence[Passage], path: str | Path | None = None, title: str = "fastformer: explain"
) -> str:
    """A page of texts whose tokens are coloured by their scores, or by what the token under the pointer looks at.

    Scores are red where a token adds to what is explained, blue where it takes away. Of a map, the colours say how much
    each token is looked at on average, until one is pointed at, or chosen with a click. Tokens that share a character
    are one piece, so Chinese and emoji stay whole.

    Args:
        passages: one or several.
        path: where to write the page as well, UTF-8.

    Returns:
        The page. It loads nothing, and text from the passages cannot become markup or script.

    Raises:
        TypeError, ValueError: values of another type or shape, or pieces that are not of the text.
    """
    if isinstance(passages, Passage):
        passages = [passages]
    if not passages:
        raise ValueError("passages must hold at least one passage, got none")
    script = _SCRIPT.replace("STRONGEST", str(_STRONGEST))
    for name, color in (("RED", _RED), ("BLUE", _BLUE), ("ORANGE", _ORANGE)):
        script = script.replace(name, f'"{color}"')
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    page = (
        f'<!DOCTYPE html>\n<html>\n<head>\n<meta charset="utf-8">\n<meta http-equiv="Content-Security-Policy" '
        f'content="{policy}">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escaping.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escaping.escape(title)}</h1>\n{''.join(map(_section, passages))}"
        f"<script>{script}</script>\n</body>\n</html>\n"
    )
    # Lone surrogates, which a str may hold and a file may not.
    page = page.encode("utf-8", "replace").decode("utf-8")
    if path is not None:
        Path(path).write_text(page, encoding="utf-8")
    return page


def _section(passage: Passage) -> str:
    named = passage.values if isinstance(passage.values, Mapping) else {"": passage.values}
    if not named:
        raise ValueError("values must hold at least one entry, got none")
    views = [_view(name, values, passage.tokens) for name, values in named.items()]
    # Whatever stands in the text, "</script>" and "<!--" among it, stays data.
    data = json.dumps(views, ensure_ascii=True).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    choice = ""
    if len(views) > 1:
        options = "".join(f"<option>{escaping.escape(str(name))}</option>" for name in named)
        choice = f"<select aria-label='what is shown'>{options}</select>"
    caption = f'<p class="caption" dir="auto">{escaping.escape(passage.caption)}</p>\n' if passage.caption else ""
    return (
        f'<section>\n{caption}<div class="bar">{choice}{_keys("map" in views[0])}</div>\n'
        f'<div class="text" dir="auto">{_spans(passage, views[0])}</div>\n'
        f'<p class="readout">{escaping.escape(str(views[0]["note"]))}</p>\n'
        f'<script type="application/json">{data}</script>\n</section>\n'
    )


def _view(name: str, values: Values, tokens: Sequence[Token]) -> dict[str, object]:
    scores = values.scores if isinstance(values, Attribution) else values
    if not isinstance(scores, Tensor) or scores.ndim not in (1, 2):
        raise TypeError(f"values must be an Attribution or a tensor (S,) or (S, S), got {type(values).__name__} {name}")
    if scores.ndim == 1:
        pooled = [round(v, 5) for v in pool(tokens, scores)]
        note = "Point at a token to see what it adds."
        if isinstance(values, Attribution):
            what = "the score" if values.target is None else f"the logit of class {values.target}"
            without = f"{values.baseline_value:.4f} without the words"
            note = f"{what[0].upper()}{what[1:]} is {values.value:.4f}, {without}. {note}"
        return {"scores": pooled, "most": max((abs(v) for v in pooled), default=0.0) or 1.0, "note": note}
    # Gradients times weights may be negative; a map shows how much, not which way.
    square = pool_map(tokens, scores).abs()
    return {
        "map": [[round(v, 4) for v in row] for row in square.tolist()],
        "mean": [round(v, 4) for v in square.mean(0).tolist()],
        "note": "Point at a token to see what it looks at; the colours now are means over all tokens.",
    }


def _spans(passage: Passage, view: dict[str, object]) -> str:
    """The text with its pieces marked; what is in no piece stands between them as it is."""
    shown = view.get("scores", view.get("mean"))
    assert isinstance(shown, list)
    most = max(*(abs(v) for v in shown), 1e-12) if "map" in view else view["most"]
    assert isinstance(most, float)
    parts, place = [], 0
    for token, value in zip(passage.tokens, shown, strict=True):
        if token.special:
            content, kind = token.text, ' class="special"'
        else:
            if passage.text[token.begin : token.end] != token.text:
                raise ValueError(f"tokens must be pieces of the passage's text, got {token.text!r} at {token.begin}")
            parts.append(escaping.escape(passage.text[place : token.begin]))
            content, kind, place = token.text, "", token.end
        color = _ORANGE if "map" in view else _RED if value > 0 else _BLUE
        share = min(1.0, abs(value) / most) * _STRONGEST
        style = f"background-color:rgba({color},{share:.3f})"
        parts.append(f'<span{kind} tabindex="0" style="{style}">{escaping.escape(content)}</span>')
    rest = escaping.escape(passage.text[place:])  # what was cut off
    return "".join(parts) + (f'<i class="rest">{rest}</i>' if rest.strip() else rest)


def _keys(is_map: bool) -> str:
    def key(kind: str, left: str, right: str, colors: str, hidden: bool) -> str:
        gradient = f"background:linear-gradient(90deg,{colors})"
        return (
            f'<span class="key" data-kind="{kind}"{" hidden" if hidden else ""}>{left}<span class="swatch" '
            f'style="{gradient}"></span>{right}</span>'
        )

    clear = "transparent"
    both = f"rgba({_BLUE},{_STRONGEST}),{clear},rgba({_RED},{_STRONGEST})"
    return key("scores", "takes away", "adds", both, is_map) + key(
        "map", "little", "much looked at", f"{clear},rgba({_ORANGE},{_STRONGEST})", not is_map
    )
