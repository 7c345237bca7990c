"""Every recipe of examples/ on real data, stock and patched: `make recipes`, or `python -m bench.recipes [NAME...]`.

Each runs twice in a process of its own, on one thread, from the same seed; what it prints goes to build/recipes/. The
table says how good the model became and how many real tokens a second training took in; speeds are by CPU time, since
other work may share the machine. FASTFORMER_DATA names the folder of the data.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.bench_tokenizer import commit, cpu_name

ROOT = Path(__file__).parents[1]
RUNS = ROOT / "build" / "recipes"
KEPT = RUNS / "rows.json"


@dataclass(frozen=True)
class Case:
    """name: of the row and of the folder of its runs; script: of examples/; data: below FASTFORMER_DATA; base: the
    case whose model this one begins with."""

    name: str
    script: str
    data: str
    arguments: tuple[str, ...]
    base: str = ""


SHORT = ("--max-length", "64")
LONG = ("--max-length", "128")
CHINESE = ("--vocab-size", "8000", *LONG)
RATE = ("--learning-rate", "1e-3")
PRETRAIN = ("--steps", "300", *RATE, *SHORT)
CASES = (
    Case("sentiment, English", "sentiment", "reviews_en", ("--epochs", "4", *SHORT)),
    Case("sentiment, Chinese", "sentiment", "reviews_zh", ("--epochs", "1", "--rows", "12000", *CHINESE)),
    Case("named entities", "ner", "wnut17", ("--epochs", "10", *RATE)),
    Case("pre-training, masked words", "pretrain", "text/english.txt.xz", ("--steps", "1000", *RATE, *SHORT)),
    Case("pre-training, next sentences", "pretrain", "text/english.txt.xz", ("--objective", "mlm+nsp", *PRETRAIN)),
    Case("pre-training, next token", "pretrain", "text/english.txt.xz", ("--objective", "clm", *PRETRAIN)),
    Case("distillation, 4 layers to 2", "distill", "reviews_en", ("--epochs", "2", "--rows", "4000", *SHORT)),
    Case("LoRA", "peft_lora", "reviews_zh", ("--epochs", "1", "--rows", "8000", *LONG), "sentiment, Chinese"),
    Case("int8, trained for it", "quantize", "reviews_en", ("--rows", "4000", *SHORT), "sentiment, English"),
    Case("noise, FGM, R-Drop", "robust", "reviews_zh", ("--epochs", "1", "--rows", "8000", *CHINESE)),
    Case("compression", "compress", "reviews_zh", ("--rows", "11000", "--vocab-size", "8000", *RATE)),
    Case("translation", "translation", "multi30k", ("--width", "128", "--steps", "2200", "--learning-rate", "2e-3")),
)


def run(case: Case, patched: bool, data: Path) -> dict[str, Any]:
    """The result.json of one run. Raises SystemExit, with the end of its output, where it fails."""
    folder = folder_of(case, patched)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    base = () if not case.base else ("--model", str(folder_of(by_name(case.base), patched)))
    command = [sys.executable, str(ROOT / "examples" / f"{case.script}.py"), "--data", str(data / case.data)]
    command += ["--output", str(folder), "--patch" if patched else "--no-patch", *base, *case.arguments]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    log = folder.with_suffix(".log")
    with log.open("w") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=RUNS).returncode
    if code:
        raise SystemExit(f"{case.name} failed with exit code {code}; {log} ends:\n{log.read_text()[-2000:]}")
    return json.loads((folder / "result.json").read_text())


def folder_of(case: Case, patched: bool) -> Path:
    return RUNS / f"{slug(case.name)}-{'patched' if patched else 'stock'}"


def slug(name: str) -> str:
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")


def by_name(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def table(rows: dict[str, Any]) -> str:
    """Markdown of the results by name."""
    lines = [
        "| recipe | metric | stock | patched | tokens/s stock | patched | speed-up |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        stock, patched = row["stock"], row["patched"]
        speeds = [result["cpu_tokens_per_second"] for result in (stock, patched)]
        lines.append(
            f"| {name} | {stock['metric']} | {stock['value']:.3f} | {patched['value']:.3f} | {speeds[0]:,.0f} "
            f"| {speeds[1]:,.0f} | {speeds[1] / speeds[0]:.2f}x |"
        )
    return "\n".join(lines)


def write(rows: dict[str, Any]) -> Path:
    target = ROOT / "bench" / "results" / f"cpu-{slug(cpu_name())}" / "recipes.md"
    target.parent.mkdir(parents=True, exist_ok=True)
    commands = "\n".join(
        f"- {c.name}: {c.script}.py, {c.data}, {' '.join(c.arguments)}" for c in CASES if c.name in rows
    )
    commits = ", ".join(sorted({row["commit"] for row in rows.values()}))
    missing = ", ".join(case.name for case in CASES if case.name not in rows)
    load = f"{os.getloadavg()[1]:.0f} processes at a time on {os.cpu_count()} cores"
    target.write_text(
        f"# Recipes, stock and patched\n\n{time.strftime('%Y-%m-%d')}, {cpu_name()}, one thread, Python "
        f"{platform.python_version()}, torch {importlib.metadata.version('torch')}, transformers "
        f"{importlib.metadata.version('transformers')}, commit {commits}. New BERT (a Llama for next "
        "tokens, a torch.nn.Transformer of 3 + 3 layers for translation) of width 128 and 2 layers, 4 in distillation "
        "and compression, batch 16 (32 and 64 in the last two), dropout 0.1, the recipes' defaults otherwise. "
        "Stock pads each batch to its longest sequence, patched packs it. Tokens of training, padding not counted, a "
        "second of CPU time. Dropout draws other elements in the two runs, so metrics differ by chance; perplexity: "
        f"lower is better. Load of the machine at the end: {load}.\n\n{table(rows)}\n\n"
        f"{f'Not run: {missing}.{chr(10)}{chr(10)}' if missing else ''}Arguments:\n\n{commands}\n"
    )
    return target


def main(names: list[str]) -> int:
    data = os.environ.get("FASTFORMER_DATA")
    if not data or not Path(data).is_dir():
        print("make recipes needs FASTFORMER_DATA to name the folder of the data", file=sys.stderr)
        return 2
    unknown = set(names) - {case.name for case in CASES}
    if unknown:
        print(f"there is no recipe {sorted(unknown)}; one of {[case.name for case in CASES]}", file=sys.stderr)
        return 2
    rows = {} if not names else kept_rows()
    for case in CASES:
        if names and case.name not in names:
            continue
        started = time.perf_counter()
        both = [run(case, patched, Path(data).resolve()) for patched in (False, True)]
        kept = {"arguments": list(case.arguments), "commit": commit()}
        rows[case.name] = {**kept, "stock": both[0], "patched": both[1]}
        KEPT.write_text(json.dumps(rows))
        print(
            f"{table({case.name: rows[case.name]}).splitlines()[-1]} {time.perf_counter() - started:.0f} s", flush=True
        )
        written = write({case.name: rows[case.name] for case in CASES if case.name in rows})
    print(f"written: {written}")
    return 0


def kept_rows() -> dict[str, Any]:
    """Rows of earlier runs, for a table of which only some are run again; what ran with other arguments is dropped."""
    rows = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    return {c.name: rows[c.name] for c in CASES if c.name in rows and rows[c.name]["arguments"] == list(c.arguments)}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
