"""The test suite on the GPU: tests/gpu, and tests/ops through the compiled kernels."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import xml.etree.ElementTree
from collections.abc import Callable
from pathlib import Path

from bench.gpu.machine import ROOT
from bench.gpu.place import rehearsing
from bench.gpu.results import Row, WrongResult

SECONDS = 540


def cases(folder: Path) -> list[tuple[str, Callable[[], Row]]]:
    return [("tests", lambda: tests(folder))]


def tests(folder: Path) -> Row:
    """pytest over the GPU's tests; OUT/correctness.xml holds every result.

    Raises:
        WrongResult: a test failed, or none ran.
        RuntimeError: pytest is not installed.
    """
    if importlib.util.find_spec("pytest") is None:
        raise RuntimeError("pytest is not installed: bring its wheels along (python -m bench.gpu wheels FOLDER)")
    report = folder / "correctness.xml"
    report.unlink(missing_ok=True)
    environment = {**os.environ, "FASTFORMER_TEST_DEVICE": "cuda"}
    chosen = ["tests/gpu", "tests/ops"]
    if rehearsing():
        # tests/ops has its own stage in make test; what needs proof here is that tests/gpu itself is sound.
        environment |= {"FASTFORMER_TEST_DEVICE": "cpu", "FASTFORMER_BACKEND": "triton", "TRITON_INTERPRET": "1"}
        chosen = ["tests/gpu"]
    command = [sys.executable, "-m", "pytest", *chosen, "-p", "no:cacheprovider", "--tb=short", f"--junitxml={report}"]
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, timeout=SECONDS, stdout=subprocess.PIPE, text=True)
    except subprocess.TimeoutExpired as error:
        raise WrongResult(f"the tests took longer than {SECONDS} s") from error
    (folder / "correctness.txt").write_text(done.stdout)
    # 5: no test collected.
    if not report.exists() or done.returncode == 5:
        raise WrongResult(f"pytest ran no test (exit status {done.returncode}): {done.stdout[-1500:]}")
    counts = _counts(report)
    line = ", ".join(f"{count} {name}" for name, count in counts.items() if count or name == "passed")
    if done.returncode or not counts["passed"]:
        print(done.stdout[-6000:])
        raise WrongResult(line)
    return {"counts": counts, "line": line}


def _counts(report: Path) -> dict[str, int]:
    suites = list(xml.etree.ElementTree.parse(report).getroot().iter("testsuite"))
    total = {
        name: sum(int(suite.get(name, 0)) for suite in suites) for name in ("tests", "failures", "errors", "skipped")
    }
    bad = total["failures"] + total["errors"]
    return {"passed": total["tests"] - bad - total["skipped"], "failed": bad, "skipped": total["skipped"]}
