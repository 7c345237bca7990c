"""Fine-tuning on real reviews: stock with its ways of padding against the patched model, results checked before timing.

    python -m bench.bench_finetune --size tiny base-2 --max-length 128          # FASTFORMER_DATA names the data
    python -m bench.bench_finetune --family bert roberta distilbert t5 gpt2 vit --size base --compile

Rows: stock eager, SDPA and torch.compile at padding="max_length"; SDPA, and compiled, padded to the longest of a batch;
SDPA grouped by length (which biases what meets in a batch); ours on the ordinarily padded batch, ours on packed batches
of a fixed number of tokens, these compiled, and these replayed as CUDA graphs, which need a GPU. Compiled rows run with
--compile. Encoders classify, GPT-2 models language (ours with fused_loss), T5 writes the label out, ViT classifies
random images, which have no padding. Every row trains on the same examples, forward + backward + AdamW. The number is
real tokens a second: of CPU time with one thread on a CPU, of wall time on a GPU, where peak memory and the host's time
a step are given too. `base` is the published width and depth (T5: small's) with a vocabulary of 8,000.
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
from typing import Any, NamedTuple

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
T5_SIZES: dict[str, dict[str, int]] = {
    "tiny": {"d_model": 128, "d_kv": 64, "d_ff": 512, "num_layers": 2, "num_heads": 2},
    "base-2": {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 2, "num_heads": 8},
    "base-6": {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8},
    "base": {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8},
}
# family: (class, names of its sizes and dropouts where they are not BERT's)
FAMILIES: dict[str, tuple[str, dict[str, str]]] = {
    "bert": ("BertForSequenceClassification", {}),
    "roberta": ("RobertaForSequenceClassification", {}),
    "distilbert": (
        "DistilBertForSequenceClassification",
        {"hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads",
         "intermediate_size": "hidden_dim", "hidden_dropout_prob": "dropout",
         "attention_probs_dropout_prob": "attention_dropout"},
    ),
    "t5": ("T5ForConditionalGeneration", {"hidden_dropout_prob": "dropout_rate"}),
    "gpt2": (
        "GPT2LMHeadModel",
        {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
         "intermediate_size": "n_inner", "hidden_dropout_prob": "resid_pdrop",
         "attention_probs_dropout_prob": "attn_pdrop", "max_position_embeddings": "n_positions"},
    ),
    "vit": ("ViTForImageClassification", {}),
}  # fmt: skip
PACKED = ("bert", "roberta", "distilbert", "gpt2")
Batches = Callable[[int], Iterator[dict[str, Any]]]


class Variant(NamedTuple):
    """A row: the attention of the stock model, what is done to it, and the batches of an epoch."""

    attention: str
    batches: Batches
    patched: bool = False
    compiled: bool = False
    graphed: bool = False


PAD, VOCAB = 0, 8000
IMAGE_TOKENS = 197  # of 224 x 224 pixels in patches of 16, and the one that is classified


def build(family: str, size: str, implementation: str, max_length: int) -> Any:
    """A random model in training mode without dropout, whose randomness would differ between rows."""
    torch.manual_seed(0)
    name, names = FAMILIES[family]
    settings: dict[str, Any] = {**SIZES[size], "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if (family, size) == ("distilbert", "base"):
        settings = {**settings, "num_hidden_layers": 6}
    if family == "t5":
        settings = {**T5_SIZES[size], "hidden_dropout_prob": 0.0, "decoder_start_token_id": PAD}
    if family != "vit":
        settings |= {"vocab_size": VOCAB, "pad_token_id": PAD}
    if family not in ("vit", "t5"):
        settings["max_position_embeddings"] = max_length + 2
    if family == "distilbert":
        settings["seq_classif_dropout"] = 0.0
    if family == "gpt2":
        settings |= {"embd_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 1}
    settings = {names.get(key, key): value for key, value in settings.items()}
    config = getattr(transformers, name.split("For")[0].removesuffix("LMHeadModel") + "Config")
    return getattr(transformers, name)(config(**settings, attn_implementation=implementation)).train()


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


def examples(family: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Reviews as a family's head takes them."""
    if family == "vit":
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(len(rows), 3, 224, 224, generator=generator)
        return [{"pixel_values": image, "labels": row["labels"]} for image, row in zip(images, rows, strict=True)]
    if family == "gpt2":
        return [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in rows]
    if family == "t5":
        return [{"input_ids": row["input_ids"], "labels": [2 + row["labels"], 1]} for row in rows]
    return rows


def tokens_of(row: dict[str, Any]) -> int:
    return len(row["input_ids"]) if "input_ids" in row else IMAGE_TOKENS


def pad(rows: list[dict[str, Any]], width: int | None = None) -> dict[str, torch.Tensor]:
    if "pixel_values" in rows[0]:
        return {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}
    longest = width or max(len(row["input_ids"]) for row in rows)
    ids = torch.full((len(rows), longest), PAD)
    for i, row in enumerate(rows):
        ids[i, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
    labels = torch.tensor([row["labels"] for row in rows if not isinstance(row["labels"], list)])
    if not len(labels):
        parts = [torch.tensor(row["labels"]) for row in rows]
        labels = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=-100)
        if max(map(len, parts)) == max(len(row["input_ids"]) for row in rows):
            labels = torch.nn.functional.pad(labels, (0, longest - labels.shape[1]), value=-100)
    return {
        "input_ids": ids,
        "attention_mask": (torch.arange(longest) < torch.tensor([[len(r["input_ids"])] for r in rows])).long(),
        "labels": labels,
    }


def variants(
    family: str,
    rows: list[dict[str, Any]],
    size: int,
    max_length: int,
    first_position: int,
    compiles: bool,
    epochs: int = 1,
) -> dict[str, Variant]:
    def fixed(width: int | None) -> Batches:
        def make(epoch: int) -> Iterator[dict[str, Any]]:
            order = random.Random(epoch).sample(rows, len(rows))
            for i in range(0, len(order), size):
                yield pad(order[i : i + size], width)

        return make

    def grouped(epoch: int) -> Iterator[dict[str, Any]]:
        order = sorted(rows, key=tokens_of, reverse=True)
        groups = [order[i : i + size] for i in range(0, len(order), size)]
        for group in random.Random(epoch).sample(groups, len(groups)):
            yield pad(group)

    lengths = [tokens_of(row) for row in rows]
    # A little more than the mean batch holds, so that an epoch has as many optimizer steps as the others'.
    budget, steps = max(max(lengths), round(size * statistics.mean(lengths))), -(-len(rows) // size)
    while any(len(TokenBudget(lengths, budget, seed=epoch)) > steps for epoch in range(epochs)):
        budget += 1

    def packed(epoch: int) -> Iterator[dict[str, Any]]:
        collate = PackedCollator(first_position, budget)
        for indices in TokenBudget(lengths, budget, seed=epoch):
            yield collate([rows[i] for i in indices])

    if family == "vit":
        found = {
            "stock eager": Variant("eager", fixed(None)),
            "stock sdpa": Variant("sdpa", fixed(None)),
            "stock compiled": Variant("sdpa", fixed(None), compiled=True),
            "ours": Variant("sdpa", fixed(None), patched=True),
            "ours compiled": Variant("sdpa", fixed(None), patched=True, compiled=True),
        }
    else:
        found = {
            "stock eager, max_length": Variant("eager", fixed(max_length)),
            "stock sdpa, max_length": Variant("sdpa", fixed(max_length)),
            "stock compiled, max_length": Variant("sdpa", fixed(max_length), compiled=True),
            "stock sdpa, dynamic": Variant("sdpa", fixed(None)),
            "stock compiled, dynamic": Variant("sdpa", fixed(None), compiled=True),
            "stock sdpa, length-grouped": Variant("sdpa", grouped),
            "ours, padded batches": Variant("sdpa", fixed(max_length), patched=True),
        }
        if family in PACKED:
            found["ours, packed batches"] = Variant("sdpa", packed, patched=True)
            found["ours compiled, packed batches"] = Variant("sdpa", packed, patched=True, compiled=True)
            found["ours with graphs, padded batches"] = Variant("sdpa", fixed(max_length), patched=True, graphed=True)
            found["ours with graphs, packed batches"] = Variant("sdpa", packed, patched=True, graphed=True)
        else:
            found["ours compiled, padded batches"] = Variant("sdpa", fixed(max_length), patched=True, compiled=True)
    return {name: choice for name, choice in found.items() if compiles or not choice.compiled}


def patch(family: str, model: Any) -> None:
    ff.patch(model, fused_loss=family == "gpt2")


def check(family: str, size: str, rows: list[dict[str, Any]], max_length: int, first_position: int) -> float:
    """Largest relative error of loss and gradients, ours against stock eager, padded and packed.

    Raises:
        SystemExit: it is above 1e-4.
    """
    stock, ours = build(family, size, "eager", max_length), build(family, size, "eager", max_length)
    patch(family, ours)
    few = rows[:4]
    want = stock(**pad(few, max_length))
    want.loss.backward()
    worst = 0.0
    for batch in (pad(few, max_length), *([PackedCollator(first_position)(few)] if family in PACKED else [])):
        ours.zero_grad()
        got = ours(**batch)
        got.loss.backward()
        scale = max(p.grad.norm().item() for p in stock.parameters() if p.grad is not None)
        worst = max(worst, abs(got.loss.item() - want.loss.item()) / abs(want.loss.item()))
        for p, q in zip(stock.parameters(), ours.parameters(), strict=True):
            if p.grad is not None:
                worst = max(worst, (p.grad - q.grad).norm().item() / scale)
    if worst > 1e-4:
        sys.exit(f"{family} {size}: patched and stock differ by {worst:.1e}; nothing was timed")
    return worst


def epoch_seconds(
    model: Any, optimizer: torch.optim.Optimizer, batches: Iterator[dict[str, Any]]
) -> tuple[float, float]:
    """Seconds of an epoch, and the host's seconds a step until all of its work was handed out."""
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
    host = clock() - start
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start, host / len(prepared)


def run(family: str, size: str, data: str, arguments: argparse.Namespace, device: torch.device) -> None:
    texts = reviews(Path(os.environ["FASTFORMER_DATA"]) / data, arguments.reviews, arguments.max_length)
    rows = examples(family, texts)
    tokens = sum(map(tokens_of, rows))
    first = 1 + PAD if family == "roberta" else 0
    error = check(family, size, rows, arguments.max_length, first)
    print(f"\n{family} {size}, {data}, max_length {arguments.max_length}, batch {arguments.batch}, {len(rows)} texts "
          f"of {tokens / len(rows):.1f} tokens; largest error before timing {error:.1e}")  # fmt: skip
    models: dict[str, Any] = {}
    route = arguments.max_length, first, arguments.compile, arguments.repeats + 1
    choices = variants(family, rows, arguments.batch, *route)
    if arguments.rows:
        kept = ("stock sdpa, max_length", *arguments.rows)
        choices = {name: choice for name, choice in choices.items() if any(part in name for part in kept)}
    if device.type != "cuda":
        for name in [name for name, choice in choices.items() if choice.graphed]:
            print(f"  {name:32} needs a GPU")
            del choices[name]
    seconds: dict[str, list[float]] = {name: [] for name in choices}
    hosts: dict[str, float] = {}
    peaks: dict[str, float] = dict.fromkeys(choices, 0.0)
    for name, choice in choices.items():
        model = build(family, size, choice.attention, arguments.max_length).to(device)
        if choice.patched:
            patch(family, model)
        if choice.graphed:
            ff.graphed(model, max_seqlen=arguments.max_length, progress=None)
        if choice.compiled:
            model.compile(dynamic=None if name.endswith("max_length") else True)
        models[name] = model, torch.optim.AdamW(model.parameters(), lr=1e-5)
    # Rows take turns, so that whatever else the machine does meets all of them.
    for epoch in range(arguments.repeats + 1):
        for name, choice in choices.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            taken, hosts[name] = epoch_seconds(*models[name], choice.batches(epoch))
            if epoch or not arguments.repeats:
                seconds[name].append(taken)
            if device.type == "cuda":
                peaks[name] = torch.cuda.max_memory_allocated() / 2**20
    base = statistics.median(next(taken for name, taken in seconds.items() if name.startswith("stock sdpa")))
    for name, taken in seconds.items():
        middle = statistics.median(taken)
        memory = f"{peaks[name]:8.0f} MiB peak, {hosts[name] * 1e3:.1f} ms of the host a step" if peaks[name] else ""
        print(f"  {name:32} {tokens / middle:9.0f} real tokens/s  {base / middle:5.2f}x  "
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
    parser.add_argument("--compile", action="store_true", help="also the rows through torch.compile")
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
