"""Tables of what the stages measured: OUT/summary.md, and a short one on the screen."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

from bench.gpu.machine import ROOT
from bench.gpu.results import FILE, load

Stored = dict[str, Any]


def write(folder: Path) -> str:
    """Write summary.md from the stages' JSON files.

    Returns:
        a few lines for the screen.

    Raises:
        SystemExit: no stage has results yet.
    """
    stored = load(folder)
    if not stored:
        raise SystemExit(f"no results in {folder}: run make gpu first")
    machine = next(iter(stored.values()))["machine"]
    if any(stage["machine"] != machine for stage in stored.values()):
        raise SystemExit(f"{folder} holds results of several machines or versions: run those stages again")
    lines = ["# GPU results", "", "| | |", "| --- | --- |"]
    lines += [f"| {name} | {value} |" for name, value in machine.items()]
    short = [", ".join(f"{name} {machine[name]}" for name in ("device", "torch", "triton", "commit"))]
    ceilings = _ceilings(stored)
    for name, stage in stored.items():
        lines += ["", f"## {name}", "", *_table(name, stage, ceilings)]
        short += _short(name, stage)
    text = "\n".join(lines) + "\n"
    (folder / "summary.md").write_text(text)
    return "\n".join(short)


def save(folder: Path) -> Path:
    """Copy tables and data to bench/results/<device>/.

    Raises:
        SystemExit: there is nothing to save, or it is wrong, or a rehearsal's.
    """
    write(folder)
    stored = load(folder)
    machine = next(iter(stored.values()))["machine"]
    if machine["device"] == "CPU rehearsal":
        raise SystemExit("a rehearsal's timings mean nothing; they are not saved")
    faults = [row for stage in stored.values() for row in stage["rows"] if "fault" in row]
    if faults:
        raise SystemExit(f"{len(faults)} results are wrong or missing (summary.md in {folder}); they are not saved")
    target = ROOT / "bench" / "results" / machine["device"].lower().replace(" ", "-").replace("/", "-")
    target.mkdir(parents=True, exist_ok=True)
    for name in (FILE, "summary.md"):
        shutil.copy(folder / name, target)
    return target


def _ceilings(stored: dict[str, Stored]) -> dict[str, float]:
    for stage in stored.values():
        for row in stage["rows"]:
            if row["key"] == "ceilings" and "ceilings" in row:
                return row["ceilings"]
    return {}


def _table(name: str, stage: Stored, ceilings: dict[str, float]) -> list[str]:
    rows = [row for row in stage["rows"] if row["key"] != "ceilings"]
    lines = [] if stage["complete"] else ["Not complete: the stage stopped before its last row.", ""]
    lines += [f"{key}: {value:,.1f}  " for key, value in ceilings.items()] if name.startswith("bench") else []
    rated = [row for row in rows if "fwd" in row]
    for direction in ("fwd", "bwd") if rated else ():
        lines += ["", *_rates(rated, direction, ceilings)]
    plain = [row for row in rows if "fwd" not in row]
    if plain:
        lines += ["", "| | |", "| --- | --- |"]
        lines += [f"| {row['key']} | {_outcome(row)} |" for row in plain]
    return lines


def _rates(rows: list[Stored], direction: str, ceilings: dict[str, float]) -> list[str]:
    unit, ceiling = ("tflops", "matmul_tflops") if _unit(rows) == "tflops" else ("gbs", "copy_gbs")
    names = list(dict.fromkeys(name for row in rows for name in row[direction]))
    label = {"tflops": "TFLOP/s", "gbs": "GB/s"}[unit]
    head = [f"{direction}, {label}", *names, "ours / best peer", "ours / ceiling", "µs (ours)"]
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    for row in rows:
        rates = row[direction]
        ours = rates["ours"]
        share = ours[unit] / ceilings[ceiling] if unit in ours and ceiling in ceilings else math.nan
        numbers = [_ratio(rates, unit), share, ours.get("us", math.nan)]
        cells = [f"{rates[n][unit]:.3g}" if unit in rates.get(n, {}) else "–" for n in names]
        cells += ["–" if math.isnan(value) else f"{value:.2f}" for value in numbers]
        lines.append("| " + " | ".join([row["key"], *cells]) + " |")
    return lines


def _unit(rows: list[Stored]) -> str:
    return "tflops" if "tflops" in rows[0]["fwd"]["ours"] else "gbs"


def _ratio(rates: dict[str, Any], unit: str) -> float:
    """Ours over the fastest peer; NaN where either is missing."""
    peers = [rate[unit] for name, rate in rates.items() if not name.startswith(("ours", "fastformer")) and unit in rate]
    return rates["ours"][unit] / max(peers) if peers and unit in rates["ours"] else math.nan


def _outcome(row: Stored) -> str:
    text = row.get("fault") or (f"skipped: {row['skipped']}" if "skipped" in row else row.get("line", ""))
    return text.replace("\n", " ").replace("|", "\\|")


def _short(name: str, stage: Stored) -> list[str]:
    rows = stage["rows"]
    faults = [row for row in rows if "fault" in row]
    rated = [row for row in rows if "fwd" in row]
    line = f"{name}: {len(rows)} rows" + ("" if stage["complete"] else ", NOT COMPLETE")
    if rated:
        unit = _unit(rated)
        ratios = {way: [_ratio(row[way], unit) for row in rated] for way in ("fwd", "bwd")}
        known = {way: sorted(r for r in values if not math.isnan(r)) for way, values in ratios.items()}
        parts = [f"{way} {v[0]:.2f}–{v[-1]:.2f}, median {v[len(v) // 2]:.2f}" for way, v in known.items() if v]
        line += "; ours / best peer: " + "; ".join(parts)
    found = [line]
    if name in ("bench-finetune", "correctness") or any("ceilings" in row for row in rows):
        found += [f"  {row['key']}: {_outcome(row)}" for row in rows if "line" in row and "fwd" not in row]
    return found + [f"  FAULT {row['key']}: {_outcome(row)[:300]}" for row in faults]
