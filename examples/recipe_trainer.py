"""The Trainer of transformers as the recipes use it, with batches without padding for a patched model, a watch over the
loss, a clock that counts real tokens, and the line that says how good and how fast it was.
"""

import argparse
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from recipe import Diverged, collator
from torch import Tensor
from transformers.trainer_utils import get_last_checkpoint

from fastformer.demo.errors import UserError
from fastformer.demo.report import atomically

LOG_EVERY = 25  # steps; so often the device is waited for and the loss looked at
WARMUP = 0.1  # share of the steps over which the learning rate climbs
NEW_MODEL_RATE, CHECKPOINT_RATE = 5e-4, 5e-5


def real_tokens(batch: dict[str, Any]) -> Tensor:
    """bool [batch, longest], True at the tokens of a batch that came padded or packed, as in the model's outputs."""
    if "cu_seq_lens_q" not in batch:
        return batch["attention_mask"] != 0
    lengths = batch["cu_seq_lens_q"].diff()
    return torch.arange(int(batch["max_length_q"]), device=lengths.device) < lengths[:, None]


class LossWatch:
    """The losses of a run, and an end to it where they are no finite numbers.

    Losses stay on the device until `check`, so that no step waits for them.
    """

    def __init__(self) -> None:
        self.losses: list[float] = []
        self._pending: list[Tensor] = []

    def see(self, loss: Tensor) -> None:
        """The loss () of the next step."""
        self._pending.append(loss.detach().float())

    def check(self, model: torch.nn.Module, steps_before: int = 0) -> None:
        """Raises Diverged, naming the step, for a loss or a weight that is NaN or infinite.

        steps_before: steps of the run before the first loss that was seen.
        """
        first = steps_before + len(self.losses) + 1
        new = torch.stack(self._pending).tolist() if self._pending else []
        self.losses += new
        self._pending.clear()
        for step, loss in enumerate(new, first):
            if not math.isfinite(loss):
                raise Diverged(f"the loss became {loss} at step {step}")
        names, weights = zip(*model.named_parameters(), strict=True)
        finite = torch.stack([torch.isfinite(p.detach()).all() for p in weights]).tolist()  # the device is read once
        if not all(finite):
            bad = names[finite.index(False)]
            raise Diverged(f"weights became NaN or infinite by step {steps_before + len(self.losses)}, {bad} first")


class Clock:
    """Seconds, and CPU seconds of the process, between start and stop, summed up."""

    def __init__(self) -> None:
        self.seconds = self.cpu_seconds = 0.0
        self._since: tuple[float, float] | None = None

    def start(self) -> None:
        """Does nothing if it runs."""
        if self._since is None:
            self._since = (time.perf_counter(), time.process_time())

    def stop(self) -> None:
        """Does nothing if it stands."""
        if self._since is not None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds += time.perf_counter() - self._since[0]
            self.cpu_seconds += time.process_time() - self._since[1]
            self._since = None


class _Watching(transformers.TrainerCallback):
    """Runs the clock while steps are taken, and looks at losses and weights before anything is evaluated or saved."""

    def __init__(self, trainer: "Trainer") -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.steps_before = state.global_step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.clock.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_log or control.should_evaluate or control.should_save:
            self.on_epoch_end(args, state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.clock.stop()
        self.trainer.watch.check(self.trainer.model, self.trainer.steps_before)


class Trainer(transformers.Trainer):
    """AdamW (fused), warm-up and linear decay, clipping at 1, bf16 autocast on a GPU; checkpoints under --output.

    Args:
        model, tokenizer: as loaded and patched; args: of recipe.arguments.
        train, validation: lists of examples with input_ids and labels, one a sequence or (per_token) one a token.
        metrics: from (logits, labels) to a dict of numbers.
        packs: batches without padding; by default as --patch says.
        settings: more of transformers.TrainingArguments.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        args: argparse.Namespace,
        train: Sequence[dict[str, Any]],
        validation: Sequence[dict[str, Any]],
        metrics: Callable[[Any], dict[str, float]] | None = None,
        per_token: bool = False,
        packs: bool | None = None,
        callbacks: Sequence[transformers.TrainerCallback] = (),
        **settings: Any,
    ) -> None:
        self.recipe, self.clock, self.watch, self.steps_before = args, Clock(), LossWatch(), 0
        self._tokens: Tensor | int = 0
        cuda = torch.cuda.is_available()
        steps = settings.get("max_steps") or args.epochs * math.ceil(len(train) / args.batch_size)
        when = (
            {"save_strategy": "steps", "save_steps": args.save_every} if args.save_every else {"save_strategy": "epoch"}
        )
        super().__init__(
            model,
            transformers.TrainingArguments(
                **{
                    "output_dir": str(self.checkpoints(args)),
                    **({} if "max_steps" in settings else {"num_train_epochs": args.epochs}),
                    "per_device_train_batch_size": args.batch_size,
                    "per_device_eval_batch_size": 2 * args.batch_size,
                    "learning_rate": args.learning_rate or (CHECKPOINT_RATE if args.model else NEW_MODEL_RATE),
                    "warmup_steps": round(WARMUP * steps),
                    "weight_decay": 0.01,
                    "optim": "adamw_torch_fused",
                    "max_grad_norm": 1.0,
                    "bf16": cuda and torch.cuda.is_bf16_supported(),
                    "seed": args.seed,
                    "eval_strategy": "epoch",
                    "save_total_limit": 1,
                    "logging_steps": LOG_EVERY,
                    "logging_nan_inf_filter": False,
                    "report_to": "none",
                    "disable_tqdm": False,
                    "remove_unused_columns": False,
                    "dataloader_pin_memory": cuda,
                    **when,
                    **settings,
                }
            ),
            data_collator=collator(model, tokenizer, args.patch if packs is None else packs, per_token),
            train_dataset=train,
            eval_dataset=validation,
            processing_class=tokenizer,
            compute_metrics=metrics,
            callbacks=[*callbacks, _Watching(self)],
        )

    @staticmethod
    def checkpoints(args: argparse.Namespace) -> Path:
        return args.output / "checkpoints"

    def fit(self) -> "Trainer":
        """Train, from the start or with --resume from the last checkpoint, if there is one.

        Raises UserError where there are checkpoints and no --resume; Diverged and KeyboardInterrupt say which one is
        the last good one.
        """
        folder = self.checkpoints(self.recipe)
        last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
        if self.recipe.resume:
            print(f"Going on from {last}." if last else f"There is no checkpoint in {folder}: from the start.")
        if last is not None and not self.recipe.resume:
            raise UserError(f"{folder} holds checkpoints of a run that did not end; give --resume or another --output")
        try:
            self.train(resume_from_checkpoint=last)
        except (Diverged, KeyboardInterrupt) as error:
            last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
            error.add_note(f"the last good checkpoint is {last}" if last else "there was no checkpoint yet")
            raise
        finally:
            self.clock.stop()
        return self

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        self._tokens = self._tokens + (
            inputs["input_ids"].numel() if "cu_seq_lens_q" in inputs else inputs["attention_mask"].sum()
        )
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.watch.see(loss)
        return loss

    @property
    def tokens(self) -> int:
        """Tokens trained on so far, padding not counted."""
        return int(self._tokens)

    def add_time_of(self, other: "Trainer") -> None:
        """Count what another Trainer took in as well."""
        self._tokens = self.tokens + other.tokens
        self.clock.seconds += other.clock.seconds
        self.clock.cpu_seconds += other.clock.cpu_seconds

    def finish(self, metric: str, value: float, model: Any = None, **more: Any) -> dict[str, Any]:
        """Save model and tokenizer, print the result, write it to result.json; the checkpoints are done with.

        model: what to save, by default the one that was trained.
        """
        (model or self.model).save_pretrained(self.recipe.output)
        self.processing_class.save_pretrained(self.recipe.output)
        shutil.rmtree(self.checkpoints(self.recipe), ignore_errors=True)
        return finish(self.recipe, metric, value, self.tokens, self.clock, self.watch.losses, **more)


def finish(
    args: argparse.Namespace,
    metric: str,
    value: float,
    tokens: int,
    clock: Clock,
    losses: Sequence[float],
    **more: Any,
) -> dict[str, Any]:
    """Print the line that every recipe ends with, and write it with what else there is to result.json.

    metric: what `value` is; tokens: trained on, padding not counted, in the time of the clock.
    """
    result = {
        "recipe": args.recipe,
        "patched": args.patch,
        "metric": metric,
        "value": value,
        "tokens_per_second": tokens / clock.seconds if clock.seconds else 0.0,
        "cpu_tokens_per_second": tokens / clock.cpu_seconds if clock.cpu_seconds else 0.0,
        "seconds": clock.seconds,
        "tokens": tokens,
        "losses": list(losses),
        **more,
    }
    text = json.dumps(result, indent=1) + "\n"
    atomically(args.output / "result.json", lambda path: path.write_text(text, encoding="utf-8"))
    print(
        f"{metric} {value:.4f}; {result['tokens_per_second']:,.0f} tokens/s of training, padding not counted "
        f"({result['cpu_tokens_per_second']:,.0f} by CPU time), {'patched' if args.patch else 'stock'}; "
        f"saved to {args.output}"
    )
    return result
