"""Rows of a stage, kept on disk as they are measured, so that a stage that was cut off goes on where it stopped."""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.gpu.machine import Machine
from bench.gpu.place import on_gpu

Row = dict[str, Any]
FILE = "results.json"


class WrongResult(AssertionError):
    """A result differs from the reference by more than it may: it is reported, and never timed."""


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """Every stage's stored results by name; {} where there are none."""
    path = folder / FILE
    return json.loads(path.read_text())["stages"] if path.exists() else {}


class Results:
    """The rows of one stage in OUT/results.json, which all stages share: a loan brings few files back.

    Args:
        stage: its name.
        folder: where the file lies or will lie.
        machine: rows of another machine or another version of the sources are dropped.
        fresh: drop what is there.
    """

    def __init__(self, stage: str, folder: Path, machine: Machine, fresh: bool = False) -> None:
        self.path = folder / FILE
        self.stage = stage
        self.machine = machine
        self.complete = False
        self.rows: dict[str, Row] = {}
        stored = load(folder).get(stage)
        if stored is not None and not fresh and stored["machine"] == machine.as_dict():
            self.rows = {row["key"]: row for row in stored["rows"]}
            self.complete = stored["complete"]

    def add(self, key: str, row: Row) -> None:
        self.rows[key] = {"key": key, **row}
        self.write()

    def write(self) -> None:
        stages = load(self.path.parent)
        stages[self.stage] = {
            "stage": self.stage,
            "machine": self.machine.as_dict(),
            "complete": self.complete,
            "rows": list(self.rows.values()),
        }
        content = {"stages": dict(sorted(stages.items()))}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(partial, self.path)

    def faults(self) -> list[str]:
        """One line a row that is wrong or failed."""
        return [f"{key}: {row['fault']}" for key, row in self.rows.items() if "fault" in row]


def measure(results: Results, cases: list[tuple[str, Callable[[], Row]]], seconds: float) -> None:
    """Run the cases that have no sound row yet, until `seconds` have passed.

    A case that raises gets a row with its fault and is tried again the next time; the others go on: one broken case
    must not cost the rest of a rented hour.
    """
    start = time.monotonic()
    left = [(key, case) for key, case in cases if "fault" in results.rows.get(key, {"fault": ""})]
    results.complete = False
    for done, (key, case) in enumerate(left):
        if time.monotonic() - start > seconds:
            print(f"  time is up: {len(left) - done} of {len(cases)} rows are left; run the stage again to go on")
            results.write()
            return
        try:
            row = case()
        except WrongResult as error:
            row = {"fault": f"WRONG RESULT: {error}"}
        except torch.OutOfMemoryError:
            row = {"skipped": "out of memory"}
        except Exception as error:
            row = {"fault": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        results.add(key, row)
        print(f"  {key}: {row.get('fault') or row.get('skipped') or row.get('line', 'done')}", flush=True)
        if on_gpu():
            torch.cuda.empty_cache()
    results.complete = True
    results.write()


def check_close(name: str, ours: torch.Tensor, stock: torch.Tensor, reference: torch.Tensor) -> float:
    """Relative error ‖ours − reference‖ / ‖reference‖.

    Args:
        name: for the message.
        ours, stock: results in the working dtype, from us and from PyTorch's own operator.
        reference: in higher precision.

    Raises:
        WrongResult: the error is NaN, or over twice the stock operator's plus one ulp of the dtype.
    """
    scale = reference.double().norm().item() or 1.0
    error = (ours.double() - reference.double()).norm().item() / scale
    allowed = 2 * (stock.double() - reference.double()).norm().item() / scale + torch.finfo(ours.dtype).eps
    if not error <= allowed:
        raise WrongResult(f"{name}: relative error {error:.2e}, allowed {allowed:.2e}")
    return error
