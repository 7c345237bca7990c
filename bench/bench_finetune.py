"""Fine-tuning on real reviews: stock with its ways of padding against the patched model, results checked before timing.

    python -m bench.bench_finetune --size tiny base-2 --max-length 128          # FASTFORMER_DATA names the data

Rows: stock eager and SDPA at padding="max_length", SDPA padded to the longest of a batch, SDPA grouped by length (which
biases what meets in a batch), ours on the ordinarily padded batch, ours on packed batches of a fixed number of tokens.
Every row trains on the same reviews, forward + backward + AdamW. The number is real tokens a second: of CPU time with
one thread on a CPU, of wall time on a GPU, where peak memory is given too.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

import fastformer as ff
from fastformer.integrations.transformers import PackedCollator, TokenBudget

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512},
    "base-2": {"hidden_size": 768, "num_hidden_layers": 2, "num_attention_heads": 12, "intermediate_size": 3072},
    "base-6": {"hidden_size": 768, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 3072},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
}
FAMILIES = ("bert", "roberta", "distilbert")
Batches = Callable[[int], Iterator[dict[str, Any]]]
PAD = 0
VOCAB = 8000


def build(family: str, size: str, implementation: str, max_length: int) -> Any:
    """A random classifier in training mode without dropout, whose randomness would differ between rows."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {"vocab_size": VOCAB, "max_position_embeddings": max_length + 2, "num_labels": 2}
    if family == "distilbert":
        names = {"hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads"}
        names["intermediate_size"] = "hidden_dim"
        settings |= {names[k]: v for k, v in SIZES[size].items()}
        settings |= {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}
    else:
        settings |= {**SIZES[size], "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    prefix = {"bert": "Bert", "roberta": "Roberta", "distilbert": "DistilBert"}[family]
    config = getattr(transformers, f"{prefix}Config")(**settings, pad_token_id=PAD, attn_implementation=implementation)
    return getattr(transformers, f"{prefix}ForSequenceClassification")(config).train()


def reviews(folder: Path, count: int, max_length: int) -> list[dict[str, Any]]:
    """`count` tokenised reviews; the vocabulary is learnt from the same file."""
    with gzip.open(folder / "train.csv.gz", "rt", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    tokenizer = ff.BPETokenizer.train(
        (row["text"] for row in rows[:5000]), VOCAB - 1, special_tokens=["<pad>"], pattern="gpt2"
    )
    chosen = random.Random(0).sample([row for row in rows if row["text"].strip()], count)
    shift = 1  # id 0 pads
    return [
        {"input_ids": [i + shift for i in tokenizer.encode(row["text"])[:max_length]], "labels": int(row["label"])}
        for row in chosen
    ]


def pad(rows: list[dict[str, Any]], width: int | None = None) -> dict[str, torch.Tensor]:
    longest = width or max(len(row["input_ids"]) for row in rows)
    ids = torch.full((len(rows), longest), PAD)
    for i, row in enumerate(rows):
        ids[i, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
    return {
        "input_ids": ids,
        "attention_mask": (torch.arange(longest) < torch.tensor([[len(r["input_ids"])] for r in rows])).long(),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


def variants(
    rows: list[dict[str, Any]], size: int, max_length: int, first_position: int
) -> dict[str, tuple[str, bool, Batches]]:
    """name: (attention of stock, whether patched, batches of an epoch)."""

    def fixed(width: int | None) -> Batches:
        def make(epoch: int) -> Iterator[dict[str, Any]]:
            order = random.Random(epoch).sample(rows, len(rows))
            for i in range(0, len(order), size):
                yield pad(order[i : i + size], width)

        return make

    def grouped(epoch: int) -> Iterator[dict[str, Any]]:
        order = sorted(rows, key=lambda row: len(row["input_ids"]), reverse=True)
        groups = [order[i : i + size] for i in range(0, len(order), size)]
        for group in random.Random(epoch).sample(groups, len(groups)):
            yield pad(group)

    lengths = [len(row["input_ids"]) for row in rows]
    # A little more than the mean batch holds, so that an epoch has as many optimizer steps as the others'.
    budget = max(max(lengths), round(1.05 * size * statistics.mean(lengths)))

    def packed(epoch: int) -> Iterator[dict[str, Any]]:
        collate = PackedCollator(first_position, budget)
        for indices in TokenBudget(lengths, budget, seed=epoch):
            yield collate([rows[i] for i in indices])

    return {
        "stock eager, max_length": ("eager", False, fixed(max_length)),
        "stock sdpa, max_length": ("sdpa", False, fixed(max_length)),
        "stock sdpa, dynamic": ("sdpa", False, fixed(None)),
        "stock sdpa, length-grouped": ("sdpa", False, grouped),
        "ours, padded batches": ("sdpa", True, fixed(max_length)),
        "ours, packed batches": ("sdpa", True, packed),
    }


def check(family: str, size: str, rows: list[dict[str, Any]], max_length: int, first_position: int) -> float:
    """Largest relative error of loss, logits and gradients, ours against stock eager, padded and packed.

    Raises:
        SystemExit: it is above 1e-4.
    """
    stock, ours = build(family, size, "eager", max_length), build(family, size, "eager", max_length)
    ff.patch(ours)
    few = rows[:4]
    want = stock(**pad(few, max_length))
    want.loss.backward()
    worst = 0.0
    for batch in (pad(few, max_length), PackedCollator(first_position)(few)):
        ours.zero_grad()
        got = ours(**batch)
        got.loss.backward()
        scale = max(p.grad.norm().item() for p in stock.parameters() if p.grad is not None)
        worst = max(worst, ((got.logits - want.logits).norm() / want.logits.norm()).item())
        for p, q in zip(stock.parameters(), ours.parameters(), strict=True):
            if p.grad is not None:
                worst = max(worst, (p.grad - q.grad).norm().item() / scale)
    if worst > 1e-4:
        sys.exit(f"{family} {size}: patched and stock differ by {worst:.1e}; nothing was timed")
    return worst


def epoch_seconds(model: Any, optimizer: torch.optim.Optimizer, batches: Iterator[dict[str, Any]]) -> float:
    device = next(model.parameters()).device
    prepared = [{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in b.items()} for b in batches]
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = clock()
    for batch in prepared:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def run(family: str, size: str, data: str, arguments: argparse.Namespace, device: torch.device) -> None:
    rows = reviews(Path(os.environ["FASTFORMER_DATA"]) / data, arguments.reviews, arguments.max_length)
    tokens = sum(len(row["input_ids"]) for row in rows)
    first = 1 + PAD if family == "roberta" else 0
    error = check(family, size, rows, arguments.max_length, first)
    print(f"\n{family} {size}, {data}, max_length {arguments.max_length}, batch {arguments.batch}, {len(rows)} texts, "
          f"{tokens / len(rows):.1f} tokens each; largest error before timing {error:.1e}")  # fmt: skip
    models: dict[str, Any] = {}
    choices = variants(rows, arguments.batch, arguments.max_length, first)
    if arguments.rows:
        kept = ("sdpa, max_length", *arguments.rows)
        choices = {name: choice for name, choice in choices.items() if any(part in name for part in kept)}
    seconds: dict[str, list[float]] = {name: [] for name in choices}
    peaks: dict[str, float] = dict.fromkeys(choices, 0.0)
    for name, (implementation, patched, _) in choices.items():
        model = build(family, size, implementation, arguments.max_length).to(device)
        if patched:
            ff.patch(model)
        models[name] = model, torch.optim.AdamW(model.parameters(), lr=1e-5)
    # Rows take turns, so that whatever else the machine does meets all of them.
    for epoch in range(arguments.repeats + 1):
        for name, (_, _, batches) in choices.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            taken = epoch_seconds(*models[name], batches(epoch))
            if epoch or not arguments.repeats:
                seconds[name].append(taken)
            if device.type == "cuda":
                peaks[name] = torch.cuda.max_memory_allocated() / 2**20
    base = statistics.median(seconds["stock sdpa, max_length"])
    for name, taken in seconds.items():
        middle = statistics.median(taken)
        memory = f"{peaks[name]:8.0f} MiB peak" if peaks[name] else ""
        print(f"  {name:28} {tokens / middle:9.0f} real tokens/s  {base / middle:5.2f}x  "
              f"(epochs {min(taken):.2f} to {max(taken):.2f} s) {memory}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=["bert"])
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["tiny"])
    parser.add_argument("--data", nargs="+", default=["reviews_en"], help="folders below FASTFORMER_DATA")
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16, help="reviews a batch; packed batches hold as many tokens")
    parser.add_argument("--reviews", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3, help="epochs timed after one that warms up; 0: that one")
    parser.add_argument("--rows", nargs="+", help="parts of the names of the rows to run; default: all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    if "FASTFORMER_DATA" not in os.environ:
        parser.error("FASTFORMER_DATA must name the folder of the reviews")
    device = torch.device(arguments.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {device}, fastformer {ff.__version__}")
    for family in arguments.family:
        for size in arguments.size:
            for data in arguments.data:
                run(family, size, data, arguments, device)


if __name__ == "__main__":
    main()
