"""Memory that a training step keeps for backward: stock against patched, counted to the byte.

    python -m bench.finetune_memory --data reviews_zh --max-length 512      # FASTFORMER_DATA names the data

Counts every tensor that autograd saves (`torch.autograd.graph.saved_tensors_hooks`), each storage once, parameters left
out, for a BERT classifier of base width with its usual dropout. Layers are alike, so two sizes tell all: what one and
two layers keep gives the twelve; and where only the shape of a batch counts, two rows and three give all of them (what
is kept only up to a size is decided as for the whole batch). The whole is that, and 16 bytes a parameter for weight,
gradient and AdamW. With `--as-gpu` the step takes a GPU's way: Triton's launches are stood in for, which leaves what is
kept as it is, and PyTorch's dropout keeps one byte an element; stock is its eager attention then, since PyTorch's fused
one is stood in for as a whole. On a GPU itself, `bench_finetune` shows the peak that PyTorch's allocator saw.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import random
from pathlib import Path
from unittest import mock

import torch
import transformers

import fastformer as ff
from bench.bench_finetune import SIZES, VOCAB, pad, reviews
from fastformer.launches.tracing import tracing
from fastformer.ops import encoder_passes

LAYERS = 12
STATE_BYTES = 16


def saved_bytes(
    implementation: str,
    patched: bool,
    layers: int,
    attention_dropout: float,
    as_gpu: bool,
    rows: int,
    batch: dict[str, torch.Tensor],
) -> tuple[int, int]:
    """Bytes that one step keeps for backward, and the number of parameters; `batch` stands for one of `rows` rows."""
    torch.manual_seed(0)
    settings = {**SIZES["base"], "num_hidden_layers": layers, "vocab_size": VOCAB}
    settings["attention_probs_dropout_prob"] = attention_dropout
    config = transformers.BertConfig(**settings, attn_implementation=implementation)
    model = transformers.BertForSequenceClassification(config).train()
    if patched:
        ff.patch(model)
    kept: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    # The graph lives until the count is read, so no storage is counted twice or reused.
    route = tracing(model) if as_gpu else contextlib.nullcontext()
    most = encoder_passes.MOST_KEPT * len(batch["labels"]) // rows
    with (
        route,
        mock.patch.object(encoder_passes, "MOST_KEPT", most),
        torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor),
    ):
        loss = model(**batch).loss
    # Forward moves parameters side by side; where they were, something else may lie now.
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
    total = sum(size for pointer, size in kept.items() if pointer not in owned)
    del loss
    return total, sum(p.numel() for p in model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["reviews_zh"], help="folders below FASTFORMER_DATA")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--full", action="store_true", help="every row as long as max-length: no padding to remove")
    parser.add_argument("--attention-dropout", type=float, default=0.1, help="at 0, SDPA keeps no weights on a CPU")
    parser.add_argument("--as-gpu", action="store_true", help="count what is kept where the Triton kernels run")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, fastformer {ff.__version__}, fp32")
    for data in arguments.data:
        rows = reviews(Path(os.environ["FASTFORMER_DATA"]) / data, 20 * arguments.batch, arguments.max_length)
        rows = random.Random(1).sample(rows, arguments.batch)
        if arguments.full:
            rows = [
                {**row, "input_ids": (row["input_ids"] * arguments.max_length)[: arguments.max_length]} for row in rows
            ]
        batch = pad(rows, arguments.max_length)
        share = batch["attention_mask"].float().mean().item()
        shape = f"batch {arguments.batch} x {arguments.max_length}, {share:.0%} real"
        where = ", as on a GPU" if arguments.as_gpu else ""
        print(f"\nBERT-base, {data}, {shape}, dropout 0.1, in attention {arguments.attention_dropout}{where}")
        rows_of_table = [("stock eager", "eager", False), ("ours", "sdpa", True)]
        if not arguments.as_gpu:
            rows_of_table.insert(1, ("stock sdpa", "sdpa", False))
        peaks: dict[str, int] = {}
        for name, implementation, patched in rows_of_table:
            by_shape = arguments.full or not patched
            sizes = []
            for layers in (1, 2):
                dropout = arguments.attention_dropout
                route = arguments.as_gpu, arguments.batch
                take = functools.partial(saved_bytes, implementation, patched, layers, dropout, *route)
                if by_shape:
                    (two, parameters), (three, _) = (take({k: v[:n] for k, v in batch.items()}) for n in (2, 3))
                    sizes.append((two + (arguments.batch - 2) * (three - two), parameters))
                else:
                    sizes.append(take(batch))
            (one, small), (two, large) = sizes
            kept, parameters = one + (LAYERS - 1) * (two - one), small + (LAYERS - 1) * (large - small)
            peaks[name] = kept + STATE_BYTES * parameters
            shares = ", ".join(f"{peaks[name] / peak:.0%} of {stock}" for stock, peak in peaks.items() if stock != name)
            print(f"  {name:12} {kept / 2**30:6.2f} GiB for backward, {peaks[name] / 2**30:6.2f} GiB in all  {shares}")


if __name__ == "__main__":
    main()
