"""Pre-train a model on plain text, tokenizer included: masked words, next sentences, or the next token.

    python examples/pretrain.py --data folder-of-txt-files                  # masked language modelling
    python examples/pretrain.py --data folder --objective mlm+nsp           # BERT's two objectives
    python examples/pretrain.py --data folder --objective clm               # a small Llama
    python examples/pretrain.py --data folder --resume                      # after Ctrl-C, with the same arguments

Files (.txt, .txt.gz, .txt.xz, one paragraph between blank lines) are streamed. A checkpoint holds the weights, the
optimizer, the place in the stream and every random state: a run that was interrupted and resumed ends with the same
weights, bit for bit, as one that was not.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import recipe
import torch
import transformers
from pretraining_data import Batches, TextStream, held_out, is_held_out, paragraphs, perplexity, text_files, to_device
from recipe_trainer import LOG_EVERY, NEW_MODEL_RATE, WARMUP, Clock, LossWatch, finish
from tqdm import tqdm

from fastformer.demo.errors import UserError
from fastformer.demo.memory import default_device
from fastformer.demo.report import atomically, output_folder
from fastformer.demo.training import autocast
from fastformer.integrations.transformers import FastTokenizer

HEADS = {"mlm": "MaskedLM", "mlm+nsp": "PreTraining", "clm": "CausalLM"}
FREE = ("output", "resume", "save_every")  # arguments that may change when a run is resumed


class Run:
    """Model, optimizer, data and counts of a run: all that a checkpoint holds."""

    def __init__(self, args: argparse.Namespace, model: Any, batches: Batches, device: torch.device) -> None:
        self.args, self.model, self.batches, self.device = args, model.to(device).train(), batches, device
        rate = args.learning_rate or NEW_MODEL_RATE
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01, fused=True)
        warmup = round(WARMUP * args.steps)
        self.schedule = transformers.get_linear_schedule_with_warmup(self.optimizer, warmup, args.steps)
        self.watch, self.clock, self.step, self.tokens = LossWatch(), Clock(), 0, 0
        torch.manual_seed(args.seed)

    @property
    def path(self) -> Path:
        return self.args.output / "checkpoint.pt"

    def settings(self) -> dict[str, Any]:
        return {name: str(value) for name, value in vars(self.args).items() if name not in FREE}

    def save(self) -> None:
        state = {
            "settings": self.settings(),
            "counts": [self.step, self.tokens, self.clock.seconds, self.clock.cpu_seconds, self.watch.losses],
            "parts": [part.state_dict() for part in (self.model, self.optimizer, self.schedule)],
            "data": self.batches.state(),
            "random": [torch.get_rng_state(), *(torch.cuda.get_rng_state_all())],
        }
        atomically(self.path, lambda path: torch.save(state, path))

    def restore(self) -> None:
        """Go on from the checkpoint. Raises UserError where it is one of other arguments."""
        state = torch.load(self.path, map_location="cpu", weights_only=True)
        for name, value in self.settings().items():
            if state["settings"].get(name) != value:
                was = state["settings"].get(name)
                raise UserError(
                    f"--{name.replace('_', '-')} was {was} when the checkpoint was saved, now it is {value}"
                )
        self.step, self.tokens, self.clock.seconds, self.clock.cpu_seconds, self.watch.losses = state["counts"]
        for part, saved in zip((self.model, self.optimizer, self.schedule), state["parts"], strict=True):
            part.load_state_dict(saved)
        self.batches.restore(state["data"])
        torch.set_rng_state(state["random"][0])
        torch.cuda.set_rng_state_all(state["random"][1:])

    def train_step(self) -> None:
        batch = next(self.batches)
        self.tokens += int(batch["cu_seq_lens_q"][-1] if "cu_seq_lens_q" in batch else batch["attention_mask"].sum())
        with autocast(self.device):
            loss = self.model(**to_device(batch, self.device)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.watch.see(loss)
        self.step += 1

    def train(self) -> None:
        """The steps that are left. Diverged and KeyboardInterrupt say which checkpoint is the last good one."""
        try:
            with tqdm(total=self.args.steps, initial=self.step, unit="step", mininterval=1) as bar:
                while self.step < self.args.steps:
                    self.clock.start()
                    self.train_step()
                    bar.update()
                    saves = self.step % self.args.save_every == 0 or self.step == self.args.steps
                    if saves or self.step % LOG_EVERY == 0:
                        self.clock.stop()
                        self.watch.check(self.model)
                        bar.set_postfix(loss=f"{self.watch.losses[-1]:.3f}")
                    if saves:
                        self.save()
        except (recipe.Diverged, KeyboardInterrupt) as error:
            there = f"the last good checkpoint is {self.path}, to go on from with --resume"
            error.add_note(there if self.path.is_file() else "there was no checkpoint yet")
            raise


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = recipe.arguments("pretrain", __doc__, without=("epochs", "rows"), max_length=128, save_every=500)
    parser.add_argument("--objective", choices=tuple(HEADS), default="mlm", help="(default: mlm)")
    whole = recipe.whole_number(1, 10**9)
    parser.add_argument("--steps", type=whole, default=2000, metavar="N", help="(default: 2000)")
    args = parser.parse_args(argv)
    recipe.quiet()
    files, device, kind = text_files(args.data), default_device(), HEADS[args.objective]
    texts = held_out(files, 200)
    saved = (args.output / "checkpoint.pt").is_file()
    if saved and not args.resume:
        raise UserError(
            f"{args.output} holds a checkpoint of a run that did not end; give --resume or another --output"
        )
    with output_folder(args.output):
        if saved and not args.model:
            tokenizer = FastTokenizer.from_pretrained(args.output)
            model = recipe.new_model(args, kind, tokenizer)
        else:
            learned = (text for path in files for _, text in paragraphs(path) if not is_held_out(text))
            model, tokenizer = recipe.load(args, kind, learned)
            tokenizer.save_pretrained(args.output)
        recipe.patch(model, args)
        limit = args.max_length - 3
        stream = TextStream(files, tokenizer, limit, args.seed, pairs=args.objective == "mlm+nsp")
        collate = recipe.collator(model, tokenizer, args.patch, per_token=True)
        run = Run(args, model, Batches(args.objective, args.batch_size, stream, tokenizer, collate, args.seed), device)
        if saved:
            run.restore()
        run.train()
        model.save_pretrained(args.output)
        value = perplexity(model, run.batches, texts, limit, device)
        run.path.unlink()
        return finish(args, "perplexity", value, run.tokens, run.clock, run.watch.losses)


if __name__ == "__main__":
    sys.exit(recipe.run(main))
