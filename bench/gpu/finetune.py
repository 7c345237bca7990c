"""Fine-tuning steps of BERT-base, stock and patched: real tokens a second, peak memory, and whether the losses agree.

- Random weights from the stock configuration (nothing to download), passages of natural lengths, the standard loop:
  AdamW, bf16 autocast, gradient clipping. Stock runs twice: padded to max_length, as most tutorials write it, and
  padded to the longest of the batch.
- Steps are timed from one device synchronisation to the next, the batch already on the device.
"""

from __future__ import annotations

import contextlib
import functools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import fastformer as ff
from bench.gpu.place import device, on_gpu, rehearsing, synchronize
from bench.gpu.results import Row, WrongResult

Batch = dict[str, torch.Tensor]
LABELS = 4
# Losses of stock and patched in fp32, the same seed, dropout off, may differ by this after so many steps.
AGREE_STEPS, AGREE_WITHIN = 20, 1e-4


def cases() -> list[tuple[str, Callable[[], Row]]]:
    found: list[tuple[str, Callable[[], Row]]] = [("losses agree, fp32", losses_agree)]
    sizes = ((4, 32),) if rehearsing() else ((32, 512), (32, 128), (8, 512))
    for batch, length in sizes:
        for variant in ("stock max_length", "stock dynamic", "patched max_length", "patched dynamic"):
            found.append((f"BERT {batch}x{length} {variant}", functools.partial(steps, variant, batch, length)))
    return found


def steps(variant: str, batch_size: int, length: int) -> Row:
    """Median step of one variant."""
    model = _model(dropout=0.1)
    if variant.startswith(("patched", "graphed")):
        report = ff.patch(model)
        if not report:
            raise WrongResult(f"nothing was patched: {report}")
    graphs = ff.graphed(model, max_seqlen=max(length, 32), progress=None) if variant.startswith("graphed") else None
    if variant.startswith("compiled"):
        model = torch.compile(model, dynamic=True, backend="aot_eager" if rehearsing() else "inductor")  # type: ignore[assignment]
    batches = [_batch(seed, batch_size, length, dynamic=variant.endswith("dynamic")) for seed in range(4)]
    tokens = [int(batch["attention_mask"].sum()) for batch in batches]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    warm, timed = (1, 4) if rehearsing() else (6, 40)
    for index in range(warm):
        _step(model, optimizer, batches[index % len(batches)])
    if on_gpu():
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for index in range(timed):
        synchronize()
        start = time.perf_counter()
        _step(model, optimizer, batches[index % len(batches)])
        synchronize()
        seconds.append((time.perf_counter() - start, tokens[index % len(batches)]))
    rate = statistics.median(count / elapsed for elapsed, count in seconds)
    peak = torch.cuda.max_memory_allocated() if on_gpu() else 0
    if graphs is not None and on_gpu() and graphs.replays < timed:
        raise WrongResult(f"steps ran without a graph: {graphs}")
    idle = _idle_share(lambda: _step(model, optimizer, batches[0])) if on_gpu() else None
    step = statistics.median(elapsed for elapsed, _ in seconds)
    return {
        "variant": variant,
        "batch": batch_size,
        "max_length": length,
        "real_tokens_per_second": rate,
        "step_ms": step * 1e3,
        "peak_bytes": peak,
        "gpu_idle_share": idle,
        "line": f"{rate:,.0f} tokens/s, {step * 1e3:.1f} ms a step, peak {peak / 2**30:.2f} GiB"
        + ("" if idle is None else f", GPU idle {idle:.0%}"),
    }


def _idle_share(step: Callable[[], Any]) -> float:
    """Share of a step's time in which no kernel runs, from five steps under the profiler."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        synchronize()
        start = time.perf_counter()
        for _ in range(5):
            step()
        synchronize()
        elapsed = time.perf_counter() - start
    busy = sum(event.self_device_time_total for event in profile.key_averages()) * 1e-6
    return max(0.0, 1.0 - busy / elapsed)


def losses_agree() -> Row:
    """Largest difference between the losses of stock and patched over some fp32 steps.

    Raises:
        WrongResult: they differ by more than AGREE_WITHIN.
    """
    curves = []
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        for patched in (False, True):
            model = _model(dropout=0.0)
            if patched:
                ff.patch(model)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
            count = 3 if rehearsing() else AGREE_STEPS
            batches = [_batch(seed, 4, 32 if rehearsing() else 128, dynamic=False) for seed in range(count)]
            curves.append([_step(model, optimizer, batch, autocast=False).item() for batch in batches])
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32
    largest = max(abs(a - b) for a, b in zip(*curves, strict=True))
    if not largest <= AGREE_WITHIN:
        raise WrongResult(f"losses differ by {largest:.2e}, allowed {AGREE_WITHIN:.0e}")
    return {"largest_difference": largest, "steps": len(curves[0]), "line": f"largest difference {largest:.1e}"}


def _model(dropout: float) -> torch.nn.Module:
    import transformers

    sizes: dict[str, Any] = {
        "num_labels": LABELS,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
    }
    if rehearsing():
        sizes |= {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    torch.manual_seed(0)
    model: torch.nn.Module = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes))
    return model.to(device()).train()


def _batch(seed: int, count: int, length: int, dynamic: bool) -> Batch:
    """Passages of log-normal length around a third of `length`, padded to `length` or to the longest."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.exp(torch.randn(count, generator=generator) * 0.6 + math.log(length / 3))
    lengths = drawn.round().clamp(4, length).long()
    width = int(lengths.max()) if dynamic else length
    mask = torch.arange(width) < lengths[:, None]
    ids = torch.randint(1000, 30000, (count, width), generator=generator) * mask
    labels = torch.randint(0, LABELS, (count,), generator=generator)
    batch = {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}
    return {name: tensor.to(device()) for name, tensor in batch.items()}


def _step(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, autocast: bool = True
) -> torch.Tensor:
    mixed = torch.autocast("cuda", torch.bfloat16) if autocast and on_gpu() else contextlib.nullcontext()
    with mixed:
        loss = model(**batch).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()
