"""What the demo prints and writes: the table, the notes under it, the picture and the numbers as JSON."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .errors import UserError


@dataclass(frozen=True)
class Row:
    """What was measured of one run.

    tokens_per_second and cpu_tokens_per_second: tokens that are no padding, by wall clock and by process CPU time;
    peak_memory: bytes above weights and optimizer, None where not measured; final_loss: mean training loss of the last
    tenth of the steps; difference: largest difference of losses from the first run's with dropout off, None for it.
    """

    name: str
    tokens_per_second: float
    cpu_tokens_per_second: float
    seconds: float
    peak_memory: int | None
    final_loss: float
    accuracy: float
    difference: float | None


COLUMNS = ("run", "real tokens/s", "speed", "seconds", "peak memory", "final loss", "accuracy", "largest loss diff.")


def table(rows: Sequence[Row]) -> str:
    """The rows under their headings, the first column left, the others right aligned; speed is relative to row one."""
    cells = [COLUMNS] + [
        (
            row.name,
            f"{row.tokens_per_second:,.0f}",
            f"{row.tokens_per_second / rows[0].tokens_per_second:.2f}x",
            f"{row.seconds:.1f}",
            human_bytes(row.peak_memory),
            f"{row.final_loss:.3f}",
            f"{row.accuracy:.1%}",
            "reference" if row.difference is None else f"{row.difference:.1e}",
        )
        for row in rows
    ]
    widths = [max(len(line[k]) for line in cells) for k in range(len(COLUMNS))]
    lines = [
        "  ".join(cell.ljust(width) if k == 0 else cell.rjust(width) for k, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(line, widths, strict=True)) for line in cells)
    ]
    rule = "-" * len(lines[0])
    return "\n".join([lines[0], rule, *lines[1:]])


def human_bytes(count: int | None) -> str:
    if count is None:
        return "n/a"
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def smooth(losses: Sequence[float]) -> list[float]:
    """Running mean of the losses over the last twentieth of the steps."""
    window = max(1, len(losses) // 20)
    return [sum(losses[max(0, i - window + 1) : i + 1]) / min(i + 1, window) for i in range(len(losses))]


def draw(path: Path, rows: Sequence[Row], curves: Sequence[Sequence[float]], title: str) -> None:
    """A PNG: training losses of the runs on the left, their real tokens a second on the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colors = ("#9aa0a6", "#4f81bd", "#d9622b")
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), width_ratios=(3, 2), layout="constrained")
    try:
        for row, losses, color in zip(rows, curves, colors, strict=True):
            steps = range(1, len(losses) + 1)
            left.plot(steps, losses, color=color, alpha=0.2, linewidth=0.8)
            left.plot(steps, smooth(losses), color=color, label=row.name, linewidth=1.8)
        left.set(xlabel="step", ylabel="training loss (running mean, raw behind)")
        left.legend(frameon=False)
        speeds = [row.tokens_per_second for row in rows]
        bars = right.barh([row.name for row in rows], speeds, color=colors)
        right.bar_label(bars, [f"{s:,.0f}  ({s / speeds[0]:.2f}x)" for s in speeds], padding=4)
        right.set(xlabel="tokens per second, padding not counted", xlim=(0, 1.35 * max(speeds)))
        right.invert_yaxis()
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
        figure.suptitle(title, fontsize=11)
        atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=130))
    finally:
        pyplot.close(figure)


def write_json(path: Path, rows: Sequence[Row], settings: dict[str, Any], curves: Sequence[Sequence[float]]) -> None:
    """All numbers of the report, settings and per-step losses."""
    content = {
        "settings": settings,
        "runs": [{**asdict(row), "losses": list(curve)} for row, curve in zip(rows, curves, strict=True)],
    }
    text = json.dumps(content, indent=1) + "\n"
    atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file beside `path`, then rename it: `path` is whole, the old one, or not there.

    The file that `write` was filling is removed if anything, Ctrl-C included, ends it early.
    """
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes files that only their owner may read
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


@contextlib.contextmanager
def output_folder(path: Path) -> Iterator[Path]:
    """Make sure, before any work, that files can be written into `path`; take it away again if nothing was.

    Raises UserError where the folder cannot be made or written into.
    """
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        _remove_empty(missing)
        raise UserError(f"--output {path} cannot be written: {error.strerror}") from None
    try:
        yield path
    finally:
        _remove_empty(missing)


def _remove_empty(folders: Sequence[Path]) -> None:
    """Remove those of the folders, innermost first, that hold nothing."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()
