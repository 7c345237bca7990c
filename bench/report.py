"""`fastformer bench report`: tables (Markdown) and plots (PNG) of measured results, under bench/results/<device>/.

Sources are pytest-benchmark's JSON (`pytest --benchmark --benchmark-json=FILE`) and result folders of `make gpu`. Every
figure is set beside the best peer's and beside the machine's own limit measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OURS = "fastformer"
MACHINE = ("device", "driver", "torch", "triton", "transformers", "python", "commit")


class ReportError(Exception):
    """A source that cannot be reported, in one sentence."""


@dataclass
class Figure:
    """One implementation of one case.

    Attributes:
        seconds: median time of a call.
        share: of the limit that binds (copy bandwidth, matrix rate), NaN if unknown.
        rate: as text, with its unit.
        peak: MiB alive at once, NaN if not measured.
    """

    seconds: float
    share: float = math.nan
    rate: str = ""
    peak: float = math.nan


@dataclass
class Suite:
    """Cases of one source: {case: {implementation: figure}}."""

    name: str
    machine: dict[str, str]
    ceilings: dict[str, float]
    date: str
    cases: dict[str, dict[str, Figure]] = field(default_factory=dict)
    host: dict[str, dict[str, float]] = field(default_factory=dict)


def read(source: Path) -> list[Suite]:
    """The suites of a pytest-benchmark file or of a folder of `make gpu`.

    Raises:
        ReportError: it is neither, or holds a wrong result.
    """
    if source.is_dir():
        from bench.gpu.results import FILE, load

        path = source / FILE
        try:
            found = [_stage(path, stage) for stage in load(source).values()]
        except (KeyError, TypeError, ValueError):
            raise ReportError(f"{path} was not written by make gpu") from None
        suites = [suite for suite in found if suite is not None]
        if not suites:
            raise ReportError(f"{source} holds no result of make gpu")
        return suites
    try:
        content = json.loads(source.read_text())
    except OSError as error:
        raise ReportError(f"{source}: {error.strerror}") from None
    except ValueError:
        raise ReportError(f"{source} is no JSON") from None
    if not isinstance(content, dict) or "benchmarks" not in content or "fastformer" not in content:
        raise ReportError(f"{source} was not written by pytest --benchmark --benchmark-json=FILE in this repository")
    return _benchmarks(content)


def _benchmarks(content: dict[str, Any]) -> list[Suite]:
    suites: dict[str, Suite] = {}
    own = content["fastformer"]
    for entry in content["benchmarks"]:
        # bench/bench_norm.py::test_norm[...]
        name = Path(entry["fullname"].split("::")[0]).stem.removeprefix("bench_")
        suite = suites.setdefault(name, Suite(name, own["machine"], own["ceilings"], content["datetime"][:10]))
        extra = entry["extra_info"]
        seconds = extra["device_us"] / 1e6 if "device_us" in extra else entry["stats"]["median"]
        rate = f"{extra['GB/s']:.3g} GB/s" if "GB/s" in extra else ""
        figure = Figure(seconds, extra.get("of_copy", math.nan), rate, extra.get("peak_MiB", math.nan))
        peer = (entry.get("params") or {}).get("peer") or extra.get("peer") or OURS
        suite.cases.setdefault(entry["group"] or entry["name"], {})[peer] = figure
    return list(suites.values())


def _stage(path: Path, stage: dict[str, Any]) -> Suite | None:
    faults = [row["key"] for row in stage["rows"] if "fault" in row]
    if faults:
        raise ReportError(f"{path} holds wrong or missing results ({', '.join(faults[:3])}), which are not reported")
    ceilings: dict[str, float] = next((row["ceilings"] for row in stage["rows"] if "ceilings" in row), {})
    date = datetime.fromtimestamp(path.stat().st_mtime, UTC).date().isoformat()
    suite = Suite(stage["stage"], stage["machine"], ceilings, date)
    limits = {"tflops": ("matmul_tflops", "TFLOP/s"), "gbs": ("copy_gbs", "GB/s")}
    for row in stage["rows"]:
        if "host_us" in row:
            suite.host[row["key"]] = row["host_us"]
        for way in ("fwd", "bwd", "both"):
            for name, rate in row.get(way, {}).items():
                if "us" not in rate:
                    continue
                unit = next(u for u in limits if u in rate)
                ceiling, label = limits[unit]
                share = rate[unit] / ceilings[ceiling] if ceiling in ceilings else math.nan
                figure = Figure(rate["us"] / 1e6, share, f"{rate[unit]:.3g} {label}", rate.get("peak_MiB", math.nan))
                suite.cases.setdefault(f"{row['key']} {way}", {})[OURS if name == "ours" else name] = figure
    return suite if suite.cases or suite.host else None


def write(suite: Suite, root: Path) -> list[Path]:
    """Write <root>/<device>/<suite>.md and .png.

    Returns:
        what was written.
    """
    device = suite.machine["device"]
    folder = root / device.lower().replace(" ", "-").replace("/", "-")
    folder.mkdir(parents=True, exist_ok=True)
    table = folder / f"{suite.name}.md"
    lines = [f"# {suite.name}", "", f"{suite.date}; {', '.join(f'{k} {suite.machine[k]}' for k in MACHINE)}.", ""]
    if suite.ceilings:
        limits = ", ".join(f"{name} {value:.4g}" for name, value in suite.ceilings.items())
        lines += [f"Limits of this machine, measured in the same run: {limits}.", ""]
    if suite.host:
        lines += [
            "An eager call, its kernels excluded; PyTorch's include theirs where it ran on a CPU. bench/host.py",
            "",
        ]
        lines[-2] += " says how it is measured; floor is what any operator with a backward in Python pays."
    elif device.startswith("CPU"):
        lines += ["CPU time of one thread; fastformer runs PyTorch's own operators here.", ""]
    lines += _host_table(suite.host) if suite.host else _table(suite)
    table.write_text("\n".join(lines) + "\n")
    picture = table.with_suffix(".png")
    (_plot_host if suite.host else _plot)(suite, picture)
    return [table, picture]


def best_peer(figures: dict[str, Figure]) -> str | None:
    """The fastest implementation that is not ours."""
    peers = (name for name in figures if not name.startswith(OURS))
    return min(peers, key=lambda name: figures[name].seconds, default=None)


def _table(suite: Suite) -> list[str]:
    names = list(dict.fromkeys(name for figures in suite.cases.values() for name in figures))
    names.sort(key=lambda name: name != OURS)
    peaks = any(not math.isnan(f.peak) for figures in suite.cases.values() for f in figures.values())
    head = ["case", *(f"{name}, µs" for name in names), "best peer ÷ ours", "rate (ours)", "of the limit"]
    head += ["peak MiB (ours)", "peak MiB (best peer)"] if peaks else []
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for case, figures in suite.cases.items():
        ours, peer = figures.get(OURS), best_peer(figures)
        cells = [case, *(_number(figures[n].seconds * 1e6) if n in figures else "–" for n in names)]
        if ours is None:
            cells += ["–"] * (5 if peaks else 3)
        else:
            rival = figures[peer] if peer else Figure(math.nan)
            cells += [_number(rival.seconds / ours.seconds), ours.rate or "–", _number(ours.share)]
            cells += [_number(ours.peak), _number(rival.peak)] if peaks else []
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _host_table(host: dict[str, dict[str, float]]) -> list[str]:
    kinds = ("inference", "forward", "both", "stock_forward", "stock_both")
    titles = ("no_grad", "forward", "forward + backward", "PyTorch's forward", "PyTorch's both")
    lines = [f"| µs a call | {' | '.join(titles)} |", "|" + " --- |" * (len(titles) + 1)]
    lines += [f"| {n} | {' | '.join(_number(row.get(k, math.nan)) for k in kinds)} |" for n, row in host.items()]
    return lines


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _axes(count: int) -> tuple[Any, Any]:
    try:
        import matplotlib
    except ImportError:
        raise ReportError("plots need matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(9, 1.2 + 0.28 * count), layout="constrained")


def _plot(suite: Suite, path: Path) -> None:
    """One row a case: every implementation's speed over the best peer's."""
    figure, axes = _axes(len(suite.cases))
    names = list(dict.fromkeys(name for figures in suite.cases.values() for name in figures))
    for name in sorted(names, key=lambda name: name == OURS):
        points = []
        for place, figures in enumerate(suite.cases.values()):
            peer = best_peer(figures) or OURS
            if name in figures:
                points.append((figures[peer].seconds / figures[name].seconds, place))
        axes.plot(*zip(*points, strict=True), "o" if name == OURS else "|", markersize=8, label=name)
    axes.axvline(1.0, color="grey", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlabel("speed over the best peer's (right of 1: faster)")
    _finish(figure, axes, suite, list(suite.cases), path)


def _plot_host(suite: Suite, path: Path) -> None:
    figure, axes = _axes(len(suite.host))
    for kind, mark in (("forward", "o"), ("both", "s"), ("stock_both", "|")):
        points = [(row[kind], place) for place, row in enumerate(suite.host.values()) if kind in row]
        label = {"both": "forward + backward", "stock_both": "PyTorch, both, its CPU kernels included"}.get(kind, kind)
        axes.plot(*zip(*points, strict=True), mark, markersize=7, label=label)
    axes.set_xlabel("host time of one eager call, µs")
    _finish(figure, axes, suite, list(suite.host), path)


def _finish(figure: Any, axes: Any, suite: Suite, labels: Iterable[str], path: Path) -> None:
    labels = list(labels)
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.grid(axis="x", linewidth=0.3)
    axes.legend(fontsize=7)
    axes.set_title(f"{suite.name}, {suite.machine['device']}, torch {suite.machine['torch']}", fontsize=9)
    figure.savefig(path, dpi=110)
    figure.clear()


def run(arguments: argparse.Namespace, say: Callable[[str], None] = print) -> int:
    """The command. Raises ReportError."""
    for source in arguments.source:
        for suite in read(source):
            if suite.machine["device"] == "CPU rehearsal":
                raise ReportError(f"{source} comes from a rehearsal, whose timings mean nothing")
            for path in write(suite, arguments.output):
                say(str(path))
    return 0
