"""Training steps as CUDA graphs: the tests of `ff.graphed` on real graphs, losses, and what the replays gain.

The last rows are the ones that decide: BERT-base in bf16, batch 32, max_length 128, against stock and torch.compile
with dynamic padding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import torch

import fastformer as ff
from bench.gpu import finetune
from bench.gpu.correctness import tests
from bench.gpu.machine import ROOT
from bench.gpu.place import rehearsing
from bench.gpu.results import Row, WrongResult

STEPS, WITHIN = 100, 1e-6
VARIANTS = (
    "stock max_length",
    "stock dynamic",
    "compiled dynamic",
    "patched dynamic",
    "graphed max_length",
    "graphed dynamic",
)


def cases(folder: Path) -> list[tuple[str, Callable[[], Row]]]:
    log = folder / "graphs.txt"
    found: list[tuple[str, Callable[[], Row]]] = []
    for path in sorted((ROOT / "tests" / "graphs").glob("test_*.py")):
        # A rehearsal only proves that the files are found and run; make test runs all of them on the CPU.
        options = ("-k", "undoing or host_reads or reduce_overhead or kept_outside") if rehearsing() else ()
        found.append((path.relative_to(ROOT).as_posix(), functools.partial(tests, path, log, *options)))
    found.append(("losses agree with and without graphs, fp32", losses_agree))
    batch, length = (4, 32) if rehearsing() else (32, 128)
    for variant in VARIANTS[2::3] if rehearsing() else VARIANTS:
        found.append((f"BERT {batch}x{length} {variant}", functools.partial(finetune.steps, variant, batch, length)))
    return found


def losses_agree() -> Row:
    """Largest relative difference between the losses of a patched model with and without graphs, dropout off.

    Raises:
        WrongResult: it is more than WITHIN, or steps ran without a graph.
    """
    curves = []
    count = 3 if rehearsing() else STEPS
    for captured in (False, True):
        model = finetune._model(dropout=0.0)
        ff.patch(model)
        report = ff.graphed(model, progress=None) if captured else None
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
        batches = [finetune._batch(seed, 4, 32 if rehearsing() else 128, dynamic=True) for seed in range(count)]
        curves.append([finetune._step(model, optimizer, batch, autocast=False).item() for batch in batches])
        if report is not None and not rehearsing() and report.replays < count:
            raise WrongResult(f"steps ran without a graph: {report}")
    largest = max(abs(a - b) / abs(a) for a, b in zip(*curves, strict=True))
    if not largest <= WITHIN:
        raise WrongResult(f"losses differ by {largest:.2e} of their value, allowed {WITHIN:.0e}")
    return {"largest_difference": largest, "steps": count, "line": f"largest difference {largest:.1e}"}
