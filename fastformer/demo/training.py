"""The standard fine-tuning loop, run for several models side by side so that their speeds can be compared.

One `Run` is one model with its own optimizer, schedule and random state; `fine_tune` takes a few steps of each run in
turn. Whatever else the machine does in the meantime slows all runs alike, and each run still sees exactly the random
numbers it would see alone.
"""

from __future__ import annotations

import contextlib
import copy
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .memory import peak_increase

CLIP_NORM = 1.0
WEIGHT_DECAY = 0.01
WARMUP = 0.1  # share of the steps over which the learning rate climbs from 0


@dataclass(frozen=True)
class Passages:
    """Tokenized passages. ids: one list of token ids a passage, special tokens included; labels: class indices."""

    ids: list[list[int]]
    labels: list[int]


def batches(count: int, batch_size: int, epochs: int, seed: int) -> list[list[int]]:
    """Row numbers of every batch of `epochs` passes over `count` rows, each pass in a new order drawn from `seed`."""
    draw = random.Random(seed)
    plan = []
    for _ in range(epochs):
        order = list(range(count))
        draw.shuffle(order)
        plan += [order[i : i + batch_size] for i in range(0, count, batch_size)]
    return plan


def collate(passages: Passages, rows: Sequence[int], pad_id: int, length: int | None) -> dict[str, Tensor]:
    """Pad the rows to `length`, or to the longest of them when it is None.

    Returns input_ids and attention_mask, int64 of shape (len(rows), length), and labels, int64 of shape (len(rows),).
    """
    width = length if length is not None else max(len(passages.ids[i]) for i in rows)
    input_ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(rows), width), dtype=torch.int64)
    for k, i in enumerate(rows):
        ids = torch.tensor(passages.ids[i], dtype=torch.int64)
        input_ids[k, : len(ids)] = ids
        mask[k, : len(ids)] = 1
    labels = torch.tensor([passages.labels[i] for i in rows], dtype=torch.int64)
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}


@dataclass
class Run:
    """One fine-tuning run and what was measured of it.

    model: any Hugging Face model for sequence classification; length: the padded length of every batch, None pads each
    batch to its longest passage; seconds and cpu_seconds: wall and process time of the steps, collating included;
    tokens: tokens of the passages, padding not counted; slots: tokens with padding, as the batches were given.
    """

    name: str
    model: nn.Module
    length: int | None
    pad_id: int
    steps: int
    learning_rate: float
    seed: int
    device: torch.device
    full_precision: bool = False  # no autocast on a GPU either
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    tokens: int = 0
    slots: int = 0
    rounds: list[tuple[int, float]] = field(default_factory=list)  # (tokens, seconds) of each chunk of steps

    def __post_init__(self) -> None:
        self.model.to(self.device).train()
        decayed = [p for p in self.model.parameters() if p.requires_grad and p.ndim > 1]
        plain = [p for p in self.model.parameters() if p.requires_grad and p.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}],
            lr=self.learning_rate,
        )
        warmup = max(1, round(self.steps * WARMUP))
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda step: min((step + 1) / warmup, max(0.0, (self.steps - step) / max(1, self.steps - warmup))),
        )
        with _random_state(self.device):
            torch.manual_seed(self.seed)
            self._random = _get_random(self.device)

    def collate(self, passages: Passages, rows: Sequence[int]) -> dict[str, Tensor]:
        batch = collate(passages, rows, self.pad_id, self.length)
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """The model's loss, () fp32; under bf16 autocast on a GPU that can."""
        with contextlib.nullcontext() if self.full_precision else autocast(self.device):
            return self.model(**batch).loss

    def step(self, passages: Passages, rows: Sequence[int]) -> Tensor:
        """One step of the usual loop. Returns the batch's loss before the step, () fp32, still on the device."""
        loss = self.loss(self.collate(passages, rows))
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def advance(self, passages: Passages, plan: Sequence[Sequence[int]]) -> None:
        """Take the steps of `plan` under this run's own random state, and time them."""
        with _random_state(self.device):
            _set_random(self.device, self._random)
            synchronize(self.device)
            cpu, start = time.process_time(), time.perf_counter()
            losses = [self.step(passages, rows) for rows in plan]
            synchronize(self.device)
            seconds = time.perf_counter() - start
            self.cpu_seconds += time.process_time() - cpu
            self._random = _get_random(self.device)
        tokens = sum(len(passages.ids[i]) for rows in plan for i in rows)
        self.losses += [float(loss) for loss in losses]
        self.seconds += seconds
        self.tokens += tokens
        self.slots += sum(self.padded(passages, rows) for rows in plan)
        self.rounds.append((tokens, seconds))

    def padded(self, passages: Passages, rows: Sequence[int]) -> int:
        """Tokens of the batch as it is given to the model, padding included."""
        return len(rows) * (self.length or max(len(passages.ids[i]) for i in rows))


def fine_tune(
    runs: Sequence[Run],
    passages: Passages,
    plan: Sequence[Sequence[int]],
    chunk: int = 4,
    progress: Callable[[int], None] = lambda steps: None,
) -> None:
    """Train every run on the batches of `plan`, `chunk` steps of each run in turn.

    The run that goes first changes from round to round. progress is called with the number of steps just taken.
    """
    for turn, start in enumerate(range(0, len(plan), chunk)):
        steps = plan[start : start + chunk]
        for k in range(len(runs)):
            runs[(turn + k) % len(runs)].advance(passages, steps)
            progress(len(steps))


def accuracy(run: Run, passages: Passages, batch_size: int) -> tuple[float, list[int]]:
    """Share of passages classified rightly with dropout off, and the predicted class of each passage."""
    run.model.eval()
    predicted: list[int] = []
    with torch.no_grad(), autocast(run.device):
        for start in range(0, len(passages.ids), batch_size):
            batch = run.collate(passages, range(start, min(start + batch_size, len(passages.ids))))
            del batch["labels"]
            predicted += run.model(**batch).logits.argmax(-1).tolist()
    run.model.train()
    right = sum(a == b for a, b in zip(predicted, passages.labels, strict=True))
    return right / len(passages.labels), predicted


def peak_memory(run: Run, passages: Passages, plan: Sequence[Sequence[int]]) -> int | None:
    """Bytes that forward and backward of the largest batch of `plan` need at most, above what the run already holds.

    Weights, random state and optimizer stay as they are. None where the system cannot tell.
    """

    def forward_backward(rows: Sequence[int]) -> None:
        run.loss(run.collate(passages, rows)).backward()

    largest = max(plan, key=lambda rows: (run.padded(passages, rows), sum(len(passages.ids[i]) for i in rows)))
    with _random_state(run.device):
        forward_backward(plan[-1][:1])  # what the first call sets up once is not the batch's
        run.optimizer.zero_grad(set_to_none=True)
        peak = peak_increase(lambda: forward_backward(largest), run.device)
        run.optimizer.zero_grad(set_to_none=True)
    return peak


def without_dropout(model: Any) -> nn.Module:
    """A new model with the same weights on the CPU in which every dropout rate of the configuration is 0."""
    from transformers import AutoModelForSequenceClassification

    config = copy.deepcopy(model.config)
    for name, value in config.to_dict().items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    twin = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    twin.load_state_dict(model.state_dict())
    return twin


def largest_difference(losses: Sequence[float], reference: Sequence[float]) -> float:
    """The largest absolute difference between the losses of two runs at the same step."""
    return max(abs(a - b) for a, b in zip(losses, reference, strict=True))


def autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """bf16 autocast on a GPU that has bf16; on a CPU fp32 as it stands."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        return torch.autocast("cuda", dtype=torch.bfloat16)
    return contextlib.nullcontext()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


RandomState = tuple[Tensor, Tensor | None]  # of the CPU and, on a GPU, of the GPU


def _get_random(device: torch.device) -> RandomState:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random(device: torch.device, state: RandomState) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


@contextlib.contextmanager
def _random_state(device: torch.device) -> Iterator[None]:
    """Put the global random state back afterwards as it was before the block."""
    before = _get_random(device)
    try:
        yield
    finally:
        _set_random(device, before)
