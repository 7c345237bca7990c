"""Fine-tune a classifier, then shrink it as far as its validation accuracy allows.

    python examples/compress.py --data FOLDER               # train.csv and validation.csv (or .csv.gz): text, label
    python examples/compress.py --data FOLDER --model NAME  # a Hugging Face checkpoint instead of a small new BERT

Trains the dense model until it has converged, then prunes attention heads and feed-forward channels while training goes
on: the rate rises while validation accuracy holds, and falls back when it does not. The test rows are split from the
training file and decide nothing. For comparison, the dense model is also pruned to the same rate at once, without the
gate, and trained for as many steps. Writes the compact model, its tokenizer, report.md and a figure to --output.
"""

import argparse
import copy
import csv
import gzip
import random
from pathlib import Path

import torch
import transformers
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import fastformer as ff

SPECIAL = ["[PAD]", "[CLS]", "[SEP]"]


def read(folder: Path, name: str) -> list[tuple[str, str]]:
    path = next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)
    if path is None:
        raise SystemExit(f"--data {folder} holds neither {name} nor {name}.gz")
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    rows = list(csv.DictReader(data.decode("utf-8-sig").splitlines(keepends=True)))
    if not rows or not {"text", "label"} <= rows[0].keys():
        raise SystemExit(
            f"{path} must have rows, and columns text and label, got {list(rows[0]) if rows else 'no row'}"
        )
    return [(row["text"], row["label"]) for row in rows if row["text"].strip()]


def load(args, texts, classes):  # type: ignore[no-untyped-def]
    """A model, its tokenizer, and how that one encodes texts."""
    if args.model:
        tok = transformers.AutoTokenizer.from_pretrained(args.model)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=classes)
        return model, tok, lambda rows: tok(rows, truncation=True, max_length=args.max_length)["input_ids"]
    tok = ff.BPETokenizer.train(iter(texts), args.vocab, special_tokens=SPECIAL)
    pad, start, end = (tok.token_to_id(token) for token in SPECIAL)
    sizes = {"hidden_size": args.width, "num_hidden_layers": args.layers, "num_attention_heads": args.width // 32}
    sizes |= {"intermediate_size": 4 * args.width, "max_position_embeddings": args.max_length, "vocab_size": len(tok)}
    config = transformers.BertConfig(**sizes, pad_token_id=pad, num_labels=classes)
    model = transformers.BertForSequenceClassification(config)
    return model, tok, lambda rows: [[start, *ids[: args.max_length - 2], end] for ids in tok.encode_batch(rows)]


def collate(rows, pad):  # type: ignore[no-untyped-def]
    ids = pad_sequence([torch.tensor(row) for row, _ in rows], True, pad)
    real = pad_sequence([torch.ones(len(row), dtype=torch.long) for row, _ in rows], True)
    return {"input_ids": ids, "attention_mask": real, "labels": torch.tensor([label for _, label in rows])}


def endless(rows, batch, pad):  # type: ignore[no-untyped-def]
    while True:
        order = torch.randperm(len(rows)).tolist()
        for i in range(0, len(order), batch):
            yield collate([rows[k] for k in order[i : i + batch]], pad)


@torch.no_grad()
def accuracy(model, rows, pad):  # type: ignore[no-untyped-def]
    model.eval()
    batches = (collate(rows[i : i + 256], pad) for i in range(0, len(rows), 256))
    return sum(int((model(**b).logits.argmax(-1) == b["labels"]).sum()) for b in batches) / len(rows)


def train(model, optimizer, schedule, batches, steps, title):  # type: ignore[no-untyped-def]
    model.train()
    for _ in tqdm(range(steps), title, leave=False, mininterval=5):
        model(**next(batches)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def main(arguments: list[str] | None = None) -> ff.compress.CompressionReport:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the two files")
    parser.add_argument("--model", help="name or path of a checkpoint (default: a small new BERT)")
    parser.add_argument("--output", type=Path, default=Path("compress-output"))
    parser.add_argument("--patch", action=argparse.BooleanOptionalAction, default=True)
    numbers = {"rows": 6000, "test_rows": 5000, "batch": 32, "interval": 60, "evaluations": 40, "seed": 0}
    shape = {"max_length": 48, "vocab": 8000, "width": 128, "layers": 4, "patience": 3}
    for name, default in {**numbers, **shape, "lr": 1e-3, "tolerance": 0.0075, "rise": 0.2}.items():
        kind, text = type(default), f"default {default}"
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default, help=text)
    args = parser.parse_args(arguments)

    parts = [read(args.data, "train.csv"), read(args.data, "validation.csv")]
    random.Random(args.seed).shuffle(parts[0])
    parts = [parts[0][args.test_rows :][: args.rows], parts[1], parts[0][: args.test_rows]]
    classes = sorted({label for _, label in parts[0]})
    if unknown := {label for part in parts for _, label in part} - set(classes):
        raise SystemExit(f"no training row has the labels {sorted(unknown)}")
    torch.manual_seed(args.seed)
    model, tok, encode = load(args, [text for text, _ in parts[0]], len(classes))
    rows, validation, test = (
        list(zip(encode([t for t, _ in part]), [classes.index(c) for _, c in part], strict=True)) for part in parts
    )
    pad, dense = model.config.pad_token_id or 0, []
    if args.patch:
        print(ff.patch(model))

    def on_test(model):  # type: ignore[no-untyped-def]
        dense.append(copy.deepcopy(model))  # the first call is on the converged dense model
        return accuracy(model, test, pad)

    # Warm-up, then down to a fifth within six evaluations, and so it stays.
    optimizer = torch.optim.AdamW(model.parameters(), args.lr)
    falling = lambda n: min((n + 1) / 50, max(0.2, 1 - 0.8 * n / (6 * args.interval)))  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, falling)
    gate = {"eval_size": len(validation), "tolerance": args.tolerance, "patience": args.patience, "rise": args.rise}
    compressor = ff.compress.AdaptiveCompressor(model, optimizer, test=on_test, **gate)
    batches = endless(rows, args.batch, pad)
    for _ in range(args.evaluations):
        train(model, optimizer, schedule, batches, args.interval, compressor.phase)
        print(compressor.update(accuracy(model, validation, pad)), flush=True)
        if compressor.done:
            break
    report = compressor.finish()
    args.output.mkdir(parents=True, exist_ok=True)
    ff.compress.save(model, args.output)
    (tok.save if isinstance(tok, ff.BPETokenizer) else tok.save_pretrained)(args.output)
    report.plot(args.output / "compression.png")
    print(report, flush=True)
    if not report.converged:
        return report

    timed = [collate(test[i : i + 64], pad) for i in range(0, min(960, len(test)), 64)]
    forward, both = (ff.compress.speedup(dense[0], model, timed, backward) for backward in (False, True))
    steps = sum(e.phase == "search" for e in report.history) * args.interval
    ff.compress.prune(dense[0].train(), report.rate, (dense[0](**next(batches)).loss for _ in range(50)))
    ff.compress.compact(dense[0])
    at_once = [accuracy(dense[0], test, pad)]
    optimizer = torch.optim.AdamW(dense[0].parameters(), 0.2 * args.lr)
    train(dense[0], optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0), batches, steps, "one shot")
    at_once.append(accuracy(dense[0], test, pad))
    cells = [*report.test, *at_once]
    table = f"""| | dense | adaptive | one shot | one shot, {steps} steps later |
|---|---|---|---|---|
| accuracy on {len(test)} test rows | {" | ".join(f"{value:.4f}" for value in cells)} |
| encoder parameters | {" | ".join(f"{count:,}" for count in report.encoder_parameters)} | as adaptive | as adaptive |
| forward, CPU time | 1× | {forward:.2f}× faster | | |
| forward and backward | 1× | {both:.2f}× faster | | |
"""
    figure = "![metric and rate over the steps](compression.png)"
    text = f"{table}\n{figure}\n\n{report.table()}\n\n```\n{report}\n```\n"
    (args.output / "report.md").write_text(text, encoding="utf-8")
    print(table)
    return report


if __name__ == "__main__":
    main()
