"""The test suite on the GPU: tests/gpu, and tests/ops through the compiled kernels. One row a test file."""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree
from collections.abc import Callable
from pathlib import Path

from bench.gpu.machine import ROOT
from bench.gpu.place import rehearsing
from bench.gpu.results import Row, WrongResult

# With the stage's own limit on starting another file, a stage ends inside ten minutes.
SECONDS = 300
# Most of a first run is compiling, which has the other cores to itself.
WORKERS = 6


def cases(folder: Path) -> list[tuple[str, Callable[[], Row]]]:
    # tests/ops has its own stage in make test; what a rehearsal proves is that tests/gpu itself is sound.
    folders = ("gpu",) if rehearsing() else ("gpu", "ops")
    files = [path for name in folders for path in sorted((ROOT / "tests" / name).glob("test_*.py"))]
    log = folder / "correctness.txt"
    return [(path.relative_to(ROOT).as_posix(), functools.partial(tests, path, log)) for path in files]


def tests(path: Path, log: Path, *options: str) -> Row:
    """pytest over one file; its output goes to the end of `log`.

    Args:
        options: further ones of pytest's command line.

    Raises:
        WrongResult: a test failed, none passed, or they took too long.
        RuntimeError: pytest is not installed.
    """
    if importlib.util.find_spec("pytest") is None:
        raise RuntimeError("pytest is not installed: bring its wheels along (python -m bench.gpu wheels FOLDER)")
    environment = {**os.environ, "FASTFORMER_TEST_DEVICE": "cuda"}
    if rehearsing():
        environment |= {"FASTFORMER_TEST_DEVICE": "cpu", "FASTFORMER_BACKEND": "triton", "TRITON_INTERPRET": "1"}
    # A rehearsal pays for no GPU, and the interpreter shares its cores with whatever else runs.
    seconds = 4 * SECONDS if rehearsing() else SECONDS
    command = [sys.executable, "-m", "pytest", str(path), "-p", "no:cacheprovider", "--tb=short", "-rs", *options]
    if not rehearsing() and importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(min(WORKERS, os.cpu_count() or 1))]
    with tempfile.TemporaryDirectory() as scratch, log.open("a") as out:
        report = Path(scratch, "junit.xml")
        print(f"\n$ pytest {path.relative_to(ROOT)}", file=out, flush=True)
        try:
            status = subprocess.run(
                [*command, f"--junitxml={report}"],
                cwd=ROOT,
                env=environment,
                timeout=seconds,
                stdout=out,
                stderr=subprocess.STDOUT,
            ).returncode
        except subprocess.TimeoutExpired as error:
            raise WrongResult(f"took longer than {seconds} s; what it compiled is kept, so try again") from error
        if not report.exists():
            raise WrongResult(f"pytest exited with status {status} before its report; see {log}")
        counts, failed = _read(report)
    line = ", ".join(f"{count} {name}" for name, count in counts.items() if count or name == "passed")
    # A file of which everything is skipped here is no proof, but no fault either: status 0.
    if status:
        raise WrongResult(f"{line}: {'; '.join(failed[:5]) or f'status {status}'}")
    return {"counts": counts, "line": line}


def _read(report: Path) -> tuple[dict[str, int], list[str]]:
    """Counts, and the names of failed tests with the first line of why."""
    root = xml.etree.ElementTree.parse(report).getroot()
    counts = dict.fromkeys(("passed", "failed", "skipped"), 0)
    failed = []
    for case in root.iter("testcase"):
        bad = next((child for child in case if child.tag in ("failure", "error")), None)
        kind = "failed" if bad is not None else "skipped" if case.find("skipped") is not None else "passed"
        counts[kind] += 1
        if bad is not None:
            failed.append(f"{case.get('name')}: {(bad.get('message') or 'no message').splitlines()[0][:160]}")
    return counts, failed
