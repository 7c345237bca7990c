"""The demo from beginning to end: data, tokenizer, model, three runs, one table."""

from __future__ import annotations

import argparse
import contextlib
import copy
import platform
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import fastformer as ff

from . import model as models
from .data import Corpus, split
from .encoder import Encoder, load_tokenizer, own_encoder
from .errors import UserError
from .memory import default_device, describe
from .report import Row, draw, table, write_json
from .training import (
    Passages,
    Run,
    accuracy,
    batches,
    fine_tune,
    largest_difference,
    peak_memory,
    without_dropout,
)

STOCK, DYNAMIC, PATCHED = "stock, padded to max_length", "stock, dynamic padding", "patched, padded to max_length"
EXACT_STEPS = 10  # steps of the comparison with dropout off
NEW_MODEL_RATE, CHECKPOINT_RATE = 1e-3, 5e-5
EVALUATION_BATCH = 32


def fine_tune_and_compare(corpus: Corpus, args: argparse.Namespace, output: Path) -> None:
    """Run the comparison that `args` describe (see fastformer.cli) on `corpus`; print it and write it to `output`.

    Raises UserError for a model, a tokenizer or sizes that cannot be used.
    """
    _quiet_transformers()
    started = time.perf_counter()
    device = default_device()
    train, test = split(corpus, held_out=0.15, seed=args.seed)
    print(f"data       {len(train.texts):,} passages to learn from, {len(test.texts):,} held out: {corpus.source}")
    if corpus.note:
        print(f"           {corpus.note}")
    print(f"classes    {_shortened(corpus.names)}")
    base, encoder, tokenizer = _model_and_tokenizer(train, args)
    passages, held_out = (Passages(encoder.encode(part.texts), part.labels) for part in (train, test))
    _check_ids(base, passages, held_out)
    plan = batches(len(passages.ids), args.batch_size, args.epochs, args.seed)[: args.steps]
    lengths = [len(ids) for ids in passages.ids]
    print(f"tokenizer  {encoder.what}")
    print(f"model      {_describe_model(base)}; {_describe_machine(device)}")
    print(
        f"batches    {len(plan)} of {args.batch_size}; passages have {sum(lengths) / len(lengths):.0f} tokens on "
        f"average, so {1 - sum(lengths) / len(lengths) / args.max_length:.0%} of a batch padded to {args.max_length} "
        f"is padding; {sum(n == args.max_length for n in lengths) / len(lengths):.1%} of the passages are cut or full",
        flush=True,
    )

    rate = args.learning_rate or (CHECKPOINT_RATE if args.model else NEW_MODEL_RATE)
    runs, report = _runs(base, encoder.pad_id, args.max_length, len(plan), rate, args.seed, device)
    print(f"\n{report}")
    if not report:
        print("Nothing was replaced, so the run called patched is a third stock one.")
    print(flush=True)
    peaks = [peak_memory(run, passages, plan) for run in runs]
    with _bar("fine-tuning", len(runs) * len(plan), "step") as bar:

        def progress(steps: int) -> None:
            losses = " / ".join(f"{run.losses[-1]:.2f}" for run in runs if run.losses)
            bar.set_postfix_str(f"loss {losses}", refresh=False)
            bar.update(steps)

        fine_tune(runs, passages, plan, progress=progress)
    exact = plan[:EXACT_STEPS]
    differences = _exact_differences(base, encoder.pad_id, args, exact, rate, passages, device)
    with _bar("evaluating", len(runs), "run") as bar:
        scores = []
        for run in runs:
            scores.append(accuracy(run, held_out, EVALUATION_BATCH))
            bar.update()

    tail = max(1, len(plan) // 10)
    rows = [
        Row(
            name=run.name,
            tokens_per_second=run.tokens / run.seconds,
            cpu_tokens_per_second=run.tokens / run.cpu_seconds,
            seconds=run.seconds,
            peak_memory=peak,
            final_loss=sum(run.losses[-tail:]) / tail,
            accuracy=score,
            difference=difference,
        )
        for run, peak, difference, (score, _) in zip(runs, peaks, differences, scores, strict=True)
    ]
    print(f"\n{table(rows)}\n")
    print(_notes(rows, base, len(exact), test, tail))
    print(f"\nHeld-out passages, {PATCHED}:\n{_classification_report(test, scores[2][1])}")
    curves = [run.losses for run in runs]
    settings = {
        "fastformer": ff.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": _describe_machine(device),
        "data": corpus.source,
        "model": args.model or _describe_model(base),
        "tokenizer": encoder.what,
        "passages": len(passages.ids),
        "held_out": len(held_out.ids),
        "max_length": args.max_length,
        "batch_size": args.batch_size,
        "epochs": args.epochs,
        "steps": len(plan),
        "learning_rate": rate,
        "seed": args.seed,
        "exact_steps": len(exact),
        "patch_report": str(report).splitlines(),
    }
    written = _write(output, rows, settings, curves, tokenizer, picture=not args.no_plot)
    print(f"{time.perf_counter() - started:.0f} s in all. Written: {', '.join(map(str, written))}")


def _model_and_tokenizer(train: Corpus, args: argparse.Namespace) -> tuple[nn.Module, Encoder, Any]:
    """The untrained model, its encoder, and the tokenizer to save where one was learned."""
    if args.model:
        model, encoder = models.load_checkpoint(args.model, args.tokenizer, train.names, args.max_length, args.seed)
        return model, encoder, None
    learned = None
    if args.tokenizer:
        encoder = own_encoder(load_tokenizer(Path(args.tokenizer)), args.max_length, f"{args.tokenizer}")
    else:
        start = time.perf_counter()
        with _bar("tokenizer", models.VOCAB_SIZE, "id") as bar:
            learned = models.new_tokenizer(train.texts, lambda size: bar.update(size - bar.n))
            bar.update(learned.vocab_size - bar.n)
        what = f"byte-level BPE, {learned.vocab_size:,} ids, learned in {time.perf_counter() - start:.1f} s"
        encoder = own_encoder(learned, args.max_length, what)
    model = models.new_model(encoder.vocab_size, encoder.pad_id, train.names, args.max_length, args.seed)
    return model, encoder, learned


def _runs(
    base: nn.Module, pad_id: int, max_length: int, steps: int, rate: float, seed: int, device: torch.device
) -> tuple[list[Run], Any]:
    """Three runs from the same weights, seed and order of batches, and the report of the patch."""
    patched = copy.deepcopy(base)
    report = ff.patch(patched, unpad="auto")
    runs = [
        Run(name, model, length, pad_id, steps, rate, seed, device)
        for name, model, length in (
            (STOCK, copy.deepcopy(base), max_length),
            (DYNAMIC, copy.deepcopy(base), None),
            (PATCHED, patched, max_length),
        )
    ]
    return runs, report


def _exact_differences(
    base: nn.Module,
    pad_id: int,
    args: argparse.Namespace,
    plan: list[list[int]],
    rate: float,
    passages: Passages,
    device: torch.device,
) -> list[float | None]:
    """Largest difference of each run's losses from the first run's over the batches of `plan`, in fp32, dropout off."""
    twin = without_dropout(base)
    runs, _ = _runs(twin, pad_id, args.max_length, len(plan), rate, args.seed, device)
    with _bar("dropout off", len(runs) * len(plan), "step") as bar:
        for run in runs:
            run.full_precision = True
        fine_tune(runs, passages, plan, progress=bar.update)
    return [None, *(largest_difference(run.losses, runs[0].losses) for run in runs[1:])]


def _check_ids(model: Any, *parts: Passages) -> None:
    if any(not ids for part in parts for ids in part.ids):
        raise UserError("the tokenizer gives no ids for some of the passages")
    highest = max(max(ids) for part in parts for ids in part.ids)
    rows = model.get_input_embeddings().num_embeddings
    if highest >= rows:
        raise UserError(f"the tokenizer gives ids up to {highest} but the model has embeddings for {rows}")


def _notes(rows: list[Row], base: nn.Module, exact_steps: int, test: Corpus, tail: int) -> str:
    stock, dynamic, patched = rows
    error = (patched.accuracy * (1 - patched.accuracy) / len(test.texts)) ** 0.5

    def ratio(other: Row) -> str:
        wall = patched.tokens_per_second / other.tokens_per_second
        return f"{wall:.2f}x ({patched.cpu_tokens_per_second / other.cpu_tokens_per_second:.2f}x by CPU time)"

    notes = [
        f"Patched against stock padded to max_length: {ratio(stock)}; against dynamic padding: {ratio(dynamic)}.",
        "- real tokens/s: padding not counted. The runs took turns, a few steps each, in one process; seconds are "
        "of training steps only.",
        "- peak memory: forward and backward of the run's largest batch, above weights and optimizer state.",
        f"- final loss: mean of the last {tail} training losses. accuracy: {len(test.texts)} held-out passages, "
        f"standard error {error:.1%}; always answering the most frequent class would get "
        f"{test.majority_share:.1%}.",
        f"- largest loss difference: from the first row, over {exact_steps} training steps of their own, from the same "
        "start, in fp32 with dropout off, where the losses must be equal to rounding. With dropout on "
        f"({_dropout_rates(base)}) each run drops other elements, so its final loss and accuracy differ from the "
        "others' by chance, as with another seed.",
    ]
    return "\n".join(textwrap.fill(note, 115, subsequent_indent="  ") for note in notes)


def _dropout_rates(model: Any) -> str:
    rates = {v for k, v in model.config.to_dict().items() if "drop" in k and isinstance(v, float)}
    return "rate " + " and ".join(f"{rate:g}" for rate in sorted(rates)) if rates else "none here"


def _classification_report(test: Corpus, predicted: list[int]) -> str:
    from sklearn.metrics import classification_report

    labels = list(range(len(test.names)))
    return classification_report(test.labels, predicted, labels=labels, target_names=test.names, zero_division=0)


def _write(
    output: Path,
    rows: list[Row],
    settings: dict[str, Any],
    curves: list[list[float]],
    tokenizer: Any,
    picture: bool,
) -> list[Path]:
    """Write the files and return their paths; a tokenizer only where one was learned."""
    try:
        written = [output / "results.json"]
        write_json(written[0], rows, settings, curves)
        if tokenizer is not None:
            written.append(output / "tokenizer.json")
            tokenizer.save(written[-1])
        if picture:
            written.append(output / "demo.png")
            steps = f"{settings['steps']} steps of {settings['batch_size']}"
            title = f"One fine-tuning, three ways: {steps} ({settings['machine']})"
            draw(written[-1], rows, curves, title)
    except OSError as error:
        raise UserError(f"--output {output} cannot be written: {error.strerror}") from None
    return written


def _describe_model(model: Any) -> str:
    config = model.config
    size = sum(p.numel() for p in model.parameters()) / 1e6
    layers, width = (getattr(config, name, None) for name in ("num_hidden_layers", "hidden_size"))
    shape = f", {layers} layers of width {width}" if layers and width else ""
    return f"{type(model).__name__}{shape}, {size:.1f} M parameters"


def _describe_machine(device: torch.device) -> str:
    return (
        f"{describe(device)}, {'bf16 autocast' if device.type == 'cuda' and torch.cuda.is_bf16_supported() else 'fp32'}"
    )


def _shortened(names: list[str]) -> str:
    shown = ", ".join(names[:12])
    return shown if len(names) <= 12 else f"{shown} and {len(names) - 12} more"


@contextlib.contextmanager
def _bar(what: str, total: int, unit: str) -> Iterator[tqdm]:
    # Where stderr is a file, a line every few seconds is enough.
    interval = 0.2 if sys.stderr.isatty() else 5.0
    # Fixed sizes: terminals that do not know theirs would get no bar.
    with tqdm(
        total=total, desc=what, unit=unit, mininterval=interval, maxinterval=2 * interval, ncols=110, nrows=24
    ) as bar:
        yield bar


def _quiet_transformers() -> None:
    """What transformers says while it loads (new head, unused weights) is expected here and would hide the report."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
