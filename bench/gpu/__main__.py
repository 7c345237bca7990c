"""The command line of `make gpu`; see the package's docstring."""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STAGES = (
    "correctness",
    "races",
    "tune",
    "bench-attention",
    "bench-fused",
    "host-cost",
    "bench-finetune",
    "graphs",
    "report",
)
COMMANDS = ("save", "wheels", "subjects", "prove")
# A stage starts no further row after this long; with its longest row it then ends inside ten minutes.
STAGE_SECONDS = 480.0


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description="Correctness and benchmarks on a GPU. Without a name every stage that is not finished runs, then "
        f"the report. Stages (also make gpu STAGE=name): {', '.join(STAGES)}.",
    )
    parser.add_argument("command", nargs="?", choices=(*STAGES, *COMMANDS), help="one stage, or a command")
    parser.add_argument("folder", nargs="?", type=Path, help="wheels: the folder to fill")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with tiny shapes")
    arguments = parser.parse_args()
    if arguments.rehearse:
        os.environ["FASTFORMER_REHEARSE"] = "1"
    # Compiled kernels outlive the run, so that a stage that goes on does not compile again.
    os.environ.setdefault("TRITON_CACHE_DIR", str(ROOT / "build" / "gpu-triton-cache"))

    from bench.gpu import wheels

    if arguments.command == "wheels":
        if arguments.folder is None:
            parser.error("wheels needs the folder to fill")
        return wheels.gather(arguments.folder)
    wheels.use(os.environ.get("WHEELS"))
    command = arguments.command or os.environ.get("STAGE") or None
    if command is not None and command not in (*STAGES, *COMMANDS):
        parser.error(f"STAGE={command} is none of {', '.join(STAGES)}")

    from bench.gpu import report
    from bench.gpu.place import rehearsing

    folder = Path(os.environ.get("OUT") or ROOT / "gpu-results").resolve()
    if rehearsing():
        folder = ROOT / "build" / "gpu-rehearsal"
    folder.mkdir(parents=True, exist_ok=True)
    if command == "subjects":
        return subjects()
    if command == "save":
        print(f"saved to {report.save(folder)}")
        return 0
    if command == "prove":
        from bench.gpu.prove import prove

        try:
            print("kernels/targets.py: proven on {} with Triton {}".format(*prove(folder)))
        except ValueError as error:
            print(error, file=sys.stderr)
            return 1
        return 0
    if command is None:
        return everything(folder)
    if command == "report":
        print(report.write(folder))
        return 0
    return stage(command, folder)


def everything(folder: Path) -> int:
    """Every stage in a process of its own, the finished ones left out; then the report."""
    from bench.gpu.machine import this_machine
    from bench.gpu.place import rehearsing
    from bench.gpu.results import Results

    failed = []
    for name in STAGES:
        if name != "report" and not rehearsing():
            done = Results(name, folder, this_machine())
            if done.complete and not done.faults():
                print(f"== {name}: done before")
                continue
        status = subprocess.run([sys.executable, "-m", "bench.gpu", name], cwd=ROOT, env=os.environ).returncode
        failed += [name] if status else []
    if failed:
        print(f"FAILED: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def stage(name: str, folder: Path) -> int:
    """Run one stage's cases that have no sound row yet."""
    from bench.gpu import results
    from bench.gpu.machine import this_machine
    from bench.gpu.place import rehearsing

    print(f"== {name}", flush=True)
    start = time.monotonic()
    # Asked for by name a finished stage runs anew, an unfinished one goes on.
    kept = results.Results(name, folder, this_machine(), fresh=rehearsing())
    if kept.complete and not kept.faults():
        kept = results.Results(name, folder, this_machine(), fresh=True)
    module = importlib.import_module(f"bench.gpu.{name.removeprefix('bench-').replace('-', '_')}")
    cases: list[tuple[str, Callable[[], results.Row]]]
    cases = module.cases(folder) if name in ("correctness", "graphs", "tune") else module.cases()
    if name.startswith("bench-"):
        cases.insert(0, ("ceilings", _ceilings))
    results.measure(kept, cases, STAGE_SECONDS)
    print(f"-- {name}: {time.monotonic() - start:.0f} s")
    return 1 if kept.faults() else 0


def subjects() -> int:
    """One small call of everything, for the sanitizer to watch."""
    from bench.gpu.place import synchronize
    from bench.gpu.races import subjects as small

    for name, run in small(small=True).items():
        run()
        synchronize()
        print(name, flush=True)
    return 0


def _ceilings() -> dict:
    from bench.gpu.machine import ceilings

    measured = ceilings()
    return {"ceilings": measured, "line": ", ".join(f"{name} {value:.4g}" for name, value in measured.items())}


if __name__ == "__main__":
    sys.exit(main())
