"""`python -m bench.gpu prove`: enters the GPU and Triton of a passed correctness stage in HOPPER_PROVEN.

Attention takes the Hopper kernels by itself only where they have passed; that table is source and is committed.
"""

from __future__ import annotations

import re
from pathlib import Path

from bench.gpu.machine import ROOT
from bench.gpu.results import load

TESTS = "tests/gpu/test_gpu_hopper.py"
TABLE = ROOT / "kernels" / "targets.py"
_ENTRIES = re.compile(
    r"(?<=HOPPER_PROVEN: frozenset\[tuple\[str, str\]\] = )frozenset\(.*?\)$", re.DOTALL | re.MULTILINE
)


def prove(folder: Path, table: Path = TABLE) -> tuple[str, str]:
    """Enters what the results in `folder` prove, and returns it: (name of the GPU, major.minor of Triton).

    Raises:
        ValueError: the correctness stage is not complete there, a file of it failed, or its machine took not one of
            the Hopper tests.
    """
    stage = load(folder).get("correctness")
    if stage is None or not stage["complete"]:
        raise ValueError(f"{folder} holds no complete correctness stage: run make gpu STAGE=correctness there")
    if faults := [row["key"] for row in stage["rows"] if "fault" in row]:
        raise ValueError(f"the correctness stage in {folder} failed: {', '.join(faults)}")
    counts = next((row["counts"] for row in stage["rows"] if row["key"] == TESTS), {"passed": 0})
    machine = stage["machine"]
    if not counts["passed"] or machine["driver"] == "none" or "rehearsal" in machine["device"]:
        raise ValueError(f"no Hopper GPU: {machine['device']} passed {counts['passed']} tests of {TESTS}")
    entry = machine["device"], ".".join(machine["triton"].split(".")[:2])
    source = table.read_text()
    found = _ENTRIES.search(source)
    if found is None:
        raise ValueError(f"{table} has no HOPPER_PROVEN")
    entries = {*re.findall(r'\("([^"]+)", "([^"]+)"\)', found.group()), entry}
    lines = "".join(f'        ("{gpu}", "{version}"),\n' for gpu, version in sorted(entries))
    table.write_text(f"{source[: found.start()]}frozenset(\n    {{\n{lines}    }}\n){source[found.end() :]}")
    return entry
