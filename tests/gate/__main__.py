"""The gate's command line; see the package's docstring."""

from __future__ import annotations

import argparse
import concurrent.futures
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gate", description="ahead-of-time compile gate")
    parser.add_argument("--triton", default="current", help="version under build/triton-VERSION, or current")
    parser.add_argument("-k", dest="keyword", default="", help="only cases whose name contains this")
    parser.add_argument("--target", action="append", help="this target instead of the usual five (repeatable)")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="processes (default: at most 2)")
    parser.add_argument("--share", type=int, default=1, help="every Nth case a target, shifted from target to target")
    parser.add_argument("--quiet", action="store_true", help="print failures and the summary only")
    arguments = parser.parse_args()

    if arguments.triton != "current":
        folder = ROOT / "build" / f"triton-{arguments.triton}"
        if not (folder / "triton").is_dir():
            print(f"no Triton {arguments.triton} in {folder}: run tools/triton.sh {arguments.triton}", file=sys.stderr)
            return 2
        if str(folder) not in os.environ.get("PYTHONPATH", "").split(os.pathsep):
            path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
            command = [sys.executable, "-m", "tests.gate", *sys.argv[1:]]
            return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, cwd=ROOT).returncode
    # The interpreter replaces what is to be compiled.
    os.environ.pop("TRITON_INTERPRET", None)

    # Only now: which Triton is imported was settled above.
    import triton

    from fastformer.kernels.targets import TARGETS as KNOWN
    from tests.gate.running import TARGETS, check, collect

    if arguments.triton not in ("current", triton.__version__):
        print(f"asked for Triton {arguments.triton}, found {triton.__version__}", file=sys.stderr)
        return 2
    start = time.monotonic()
    cache = ROOT / "build" / "gate" / f"triton-{triton.__version__}"
    chosen = arguments.target or list(TARGETS)
    if unknown := set(chosen) - set(KNOWN):
        print(f"unknown target {', '.join(sorted(unknown))}; one of {', '.join(KNOWN)}", file=sys.stderr)
        return 2
    tasks = collect(chosen, arguments.keyword, arguments.share)
    if not tasks:
        print("no case matches", file=sys.stderr)
        return 2

    failed = kernels = 0
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(arguments.jobs, mp_context=spawn) as pool:
        for future in [pool.submit(check, m, t, n, cache) for m, t, n in tasks]:
            label, lines, faults = future.result()
            kernels += len(lines)
            failed += bool(faults)
            if faults or not arguments.quiet:
                for line in lines:
                    print(f"{label}  {line}")
            for fault in faults:
                print(f"FAILED {label}: {fault}")
            sys.stdout.flush()
    verdict = f"{failed} FAILED" if failed else "all within their limits"
    print(
        f"gate: Triton {triton.__version__}, {len(tasks)} cases, {kernels} kernels for {', '.join(chosen)}: "
        f"{verdict} ({time.monotonic() - start:.0f} s)"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
