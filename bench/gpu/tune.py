"""The tuner as a stage: one row a head dimension, all of them in OUT/tiles.json (rehearsed: a tiny table)."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from bench.gpu.machine import ROOT
from bench.gpu.place import rehearsing
from bench.gpu.results import Row, WrongResult

COMMAND = "import sys; from fastformer.cli import main; sys.exit(main(sys.argv[1:]))"


def cases(folder: Path) -> list[tuple[str, Callable[[], Row]]]:
    return [
        (f"head_dim {d} length {n}", functools.partial(tune, folder, d, n))
        for d in ((16,) if rehearsing() else (64, 128, 256))
        for n in ((16,) if rehearsing() else (512, 128, 64, 32, 2048, 8192))
    ]


def tune(folder: Path, head_dim: int, length: int) -> Row:
    """`fastformer tune` in a process of its own: a rehearsal decorates its kernels for the interpreter.

    Raises:
        WrongResult: it failed.
    """
    table = folder / "tiles.json"
    command = [sys.executable, "-c", COMMAND, "tune", "--output", str(table)]
    command += ["--head-dim", str(head_dim), "--length", str(length)] + ["--rehearse"] * rehearsing()
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path}
    environment.pop("FASTFORMER_TILES", None)
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    if done.returncode:
        raise WrongResult(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no message")
    lines = done.stdout.strip().splitlines()
    return {"table": table.name, "rows": lines[:-1], "line": lines[-1]}
