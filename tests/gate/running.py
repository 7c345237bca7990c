"""Finds the cases and checks them one by one; apart from the command line so that worker processes can import it."""

from __future__ import annotations

import importlib
import traceback
from pathlib import Path

from fastformer.kernels.targets import TARGETS as KNOWN
from fastformer.kernels.targets import assume

from .compiling import compile_only

TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")


def modules() -> list[str]:
    return sorted(path.stem for path in Path(__file__).parent.glob("cases_*.py"))


def check(module: str, target_name: str, name: str, cache: Path) -> tuple[str, list[str], list[str]]:
    """One case on one target: (its label, a line a kernel, why it fails)."""
    target = KNOWN[target_name]
    label = f"{target_name} {module.removeprefix('cases_')}/{name}"
    faults: list[str] = []
    with compile_only(target, cache) as launched:
        try:
            run = dict(importlib.import_module(f"tests.gate.{module}").cases())[name]
            run()
        except Exception:
            faults.append(traceback.format_exc())
        else:
            if not launched:
                faults.append("compiled no kernel")
    for resources in launched:
        faults += [f"{resources.kernel} {fault}" for fault in resources.faults(target)]
    return label, [str(resources) for resources in launched], faults


def collect(chosen: list[str], keyword: str, share: int = 1) -> list[tuple[str, str, str]]:
    """(module, target, case) of every chosen case.

    Args:
        chosen: names of targets.
        keyword: part of the cases' names.
        share: 1 takes every case on every target, N every Nth, shifted by one from target to target, so that five
            targets together still compile every case for N up to five.

    Raises:
        ValueError: a module names one case twice.
    """
    found = []
    for module in modules():
        for shift, target in enumerate(chosen):
            with assume(KNOWN[target]):
                names = [name for name, _ in importlib.import_module(f"tests.gate.{module}").cases()]
            if len(set(names)) < len(names):
                twice = sorted({name for name in names if names.count(name) > 1})
                raise ValueError(f"{module} names two cases alike: {', '.join(twice)}")
            label = module.removeprefix("cases_")
            named = [name for name in names if keyword in f"{label}/{name}"]
            found += [(module, target, name) for i, name in enumerate(named) if (i + shift) % share == 0]
    return found
