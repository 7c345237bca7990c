"""Fine-tune a classifier, then shrink it as far as its validation accuracy allows.

    python examples/compress.py --data reviews_zh                 # train.csv and validation.csv (or .csv.gz)
    python examples/compress.py --data reviews_zh --model ./bert  # a Hugging Face checkpoint, not a small new BERT

Trains the dense model until it has converged, then prunes attention heads and feed-forward channels while training goes
on: the rate rises while validation accuracy holds, and falls back when it does not. The test rows are taken from the
training rows and decide nothing. For comparison, the dense model is also pruned to the same rate at once, without the
gate, and trained for as many steps. report.md, with a figure, stands beside the compact model, which
fastformer.compress.load takes.
"""

import copy
import itertools
import sys
from collections.abc import Sequence
from typing import Any

import recipe
import torch
from recipe_trainer import CHECKPOINT_RATE, NEW_MODEL_RATE, Trainer
from sentiment import accuracy

from fastformer.cli import whole_number
from fastformer.compress import AdaptiveCompressionCallback, CompressionReport, compact, prune, speedup
from fastformer.demo.data import split
from fastformer.demo.errors import UserError
from fastformer.demo.model import labels
from fastformer.demo.report import atomically, output_folder

WARMUP_STEPS, FALL, LAST = 50, 6, 0.2  # the learning rate falls to a fifth within six evaluations, and so it stays


class Compressing(Trainer):
    """A Trainer for a number of steps that is not known before."""

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        end = FALL * self.recipe.interval
        falling = lambda n: min((n + 1) / WARMUP_STEPS, max(LAST, 1 - (1 - LAST) * n / end))  # noqa: E731
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, falling)
        return self.lr_scheduler

    def batches(self, loader: Any, most: int) -> list[Any]:
        """The loader's first batches, on the model's device."""
        return [self._prepare_inputs(batch) for batch in itertools.islice(loader, most)]


def test_accuracy(trainer: Trainer, rows: Any) -> float:
    return float(trainer.predict(rows).metrics["test_accuracy"])


def table(rows: int, report: CompressionReport, speeds: Sequence[float], at_once: Sequence[float], steps: int) -> str:
    """What the report begins with, in Markdown."""
    assert report.test is not None
    return f"""| | dense | adaptive | at once | at once, {steps} steps later |
|---|---|---|---|---|
| accuracy on {rows:,} test rows | {" | ".join(f"{value:.4f}" for value in [*report.test, *at_once])} |
| encoder parameters | {" | ".join(f"{count:,}" for count in report.encoder_parameters)} | as adaptive | as adaptive |
| forward, CPU time | 1× | {speeds[0]:.2f}× faster | | |
| forward and backward | 1× | {speeds[1]:.2f}× faster | | |
"""


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = recipe.arguments("compress", __doc__, ("epochs", "save_every"), batch_size=32, max_length=48, layers=4)
    recipe.add_columns(parser)
    counts = {
        "test_rows": (5000, "taken from the training rows, half of them at most"),
        "interval": (60, "steps between evaluations"),
        "evaluations": (40, "after which it ends"),
        "patience": (3, "evaluations without gain after which the dense model has converged"),
    }
    for key, (default, what) in counts.items():
        whole = {"type": whole_number(1, 2**31), "default": default, "metavar": "N"}
        parser.add_argument(f"--{key.replace('_', '-')}", help=f"{what} (default: {default})", **whole)
    for key, share, what in (("tolerance", 0.0075, "accuracy that may go"), ("rise", 0.2, "of the rate, at a time")):
        parser.add_argument(f"--{key}", type=float, default=share, metavar="X", help=f"{what} (default: {share})")
    args = parser.parse_args(argv)
    if args.resume:
        raise UserError("--resume: adaptive compression cannot go on from the middle of a run")
    if not (0 < args.tolerance < 1 and 0 < args.rise < 1):
        raise UserError(f"--tolerance and --rise must be between 0 and 1, got {args.tolerance} and {args.rise}")
    args.learning_rate = args.learning_rate or (CHECKPOINT_RATE if args.model else NEW_MODEL_RATE)

    train, validation = recipe.read_classified(args)
    train, test = split(train, 0.5, args.seed, args.test_rows)
    with output_folder(args.output):
        model, tokenizer = recipe.load(args, "SequenceClassification", train.texts, **labels(train.names))
        recipe.patch(model, args)
        *parts, tested = (recipe.encode(tokenizer, part, args.max_length) for part in (train, validation, test))
        dense: list[Any] = []

        def on_test(model: Any) -> float:
            dense.append(copy.deepcopy(model))  # the first call is on the converged dense model
            return test_accuracy(trainer, tested)

        gate = {"eval_size": len(parts[1]), "tolerance": args.tolerance, "patience": args.patience, "rise": args.rise}
        callback = AdaptiveCompressionCallback("accuracy", test=on_test, **gate)
        steps = {"max_steps": args.interval * args.evaluations, "save_strategy": "no"}
        evaluated = {"eval_strategy": "steps", "eval_steps": args.interval}
        trainer = Compressing(model, tokenizer, args, *parts, accuracy, callbacks=[callback], **steps, **evaluated)
        try:
            trainer.fit()
        except FloatingPointError as error:
            trainer.save_model(args.output)
            raise recipe.Diverged(f"{error}; the model is saved to {args.output} as it is there") from None
        report = callback.report
        assert report is not None
        print(report)
        if not report.converged:
            return trainer.finish("accuracy", test_accuracy(trainer, tested))

        timed = trainer.batches(trainer.get_test_dataloader(tested), 15)
        speeds = [speedup(dense[0], model, timed, backward) for backward in (False, True)]
        losses = (dense[0](**batch).loss for batch in trainer.batches(trainer.get_train_dataloader(), 50))
        prune(dense[0].train(), report.rate, losses)
        compact(dense[0])
        steps["max_steps"] = args.interval * sum(e.phase == "search" for e in report.history)
        steady = {"eval_strategy": "no", "lr_scheduler_type": "constant", "learning_rate": LAST * args.learning_rate}
        again = Trainer(dense[0], tokenizer, args, *parts, accuracy, warmup_steps=0, **steps, **steady)
        at_once = [test_accuracy(again, tested), test_accuracy(again.fit(), tested)]
        head = table(len(tested), report, speeds, at_once, steps["max_steps"])
        print(f"\n{head}")
        report.plot(args.output / "compression.png")
        text = f"{head}\n![metric and rate over the steps](compression.png)\n\n{report.table()}\n\n```\n{report}\n```\n"
        atomically(args.output / "report.md", lambda path: path.write_text(text, encoding="utf-8"))
        more = {"rate": report.rate, "encoder_parameters": report.encoder_parameters, "forward_speedup": speeds[0]}
        return trainer.finish("accuracy", report.test[1], dense_accuracy=report.test[0], at_once=at_once, **more)


if __name__ == "__main__":
    sys.exit(recipe.run(main))
