"""`fastformer tune`: times the tiles of the attention kernels on the GPU at hand and writes the fastest to a table.

- A case is a pass, plain or rich rules, a head dimension and a class of lengths, in bfloat16 (float32 where rehearsed):
  16,384 tokens and 2,048 features, as published attention tables have them; plain is timed full and causal together,
  rich with a padding mask and dropout, as fine-tuning has them.
- A candidate counts only if it compiles without spilled registers, fits, and gives what the default tile gives.
- Nothing is tuned at a user's first call: FASTFORMER_TILES=table.json makes the kernels read the table.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from fastformer.kernels.attention import backward, call, config, forward, short, tiles
from fastformer.kernels.attention.call import Call
from fastformer.kernels.targets import Target, interpreting, target_of
from fastformer.ops.random import dropout_threshold

TOKENS, FEATURES = 16384, 2048
# Queries, keys, warps, stages.
CANDIDATES = {
    "forward": ((64, 128), (32, 64, 128), (4, 8), (2, 3)),
    "dQ": ((32, 64, 128), (32, 64, 128), (4, 8), (1, 2)),
    "dK and dV": ((32, 64), (32, 64, 128), (4, 8), (1, 2)),
    # The tile of keys holds all of them, whatever stands here.
    "short forward": ((32, 64, 128), (128,), (2, 4, 8), (1,)),
    "short backward": ((16, 32, 64, 128), (128,), (2, 4, 8), (1,)),
    "rich": ((32, 64), (32, 64), (4, 8), (1, 2)),
}
_KERNELS: dict[str, Any] = {
    "forward": forward._forward,
    "dQ": backward.backward_query,
    "dK and dV": backward.backward_key,
    "short forward": short.short_forward,
    "short backward": short.short_backward,
}


class Case:
    """Calls of one head dimension, class of lengths and kind of rules, and how to run their three passes."""

    def __init__(self, device: torch.device, head_dim: int, length: int, rich: bool, tiny: bool) -> None:
        self.target: Target = target_of(device)
        self.rich, self.head_dim, self.length = rich, head_dim, length
        dtype = torch.float32 if tiny else torch.bfloat16
        self.dtype = "single" if tiny else "half"
        batch, heads = (1, 1) if tiny else (max(1, TOKENS // length), max(1, FEATURES // head_dim))
        generator = torch.Generator().manual_seed(0)

        def draw() -> Tensor:
            return torch.randn(batch, length, heads, head_dim, generator=generator).to(device, dtype).transpose(1, 2)

        self.tensors, self.gradient = [draw() for _ in range(3)], draw()
        self.mask, self.seed, self.dropout = None, None, 0.0
        if rich:
            kept = torch.arange(length) < torch.linspace(length / 2, length, batch)[:, None]
            self.mask = kept.to(device)[:, None, None].expand(batch, heads, length, length)
            self.seed, self.dropout = torch.tensor([1], device=device), 0.1
        self.causal = (False,) if rich else (False, True)

    def key(self, name: str) -> tiles.Key:
        rules, width = "rich" if self.rich else "plain", max(64, 1 << (self.head_dim - 1).bit_length())
        return self.target.name, name, rules, self.dtype, width, tiles.length_class(name, self.length)

    def passes(self) -> tuple[str, ...]:
        """Those that these calls consist of."""
        first = self.calls()[0]
        behind = ("short backward",) if config.takes_short_backward(self.target, first) else ("dQ", "dK and dV")
        return ("short forward" if first.short else "forward", *behind)

    def calls(self) -> list[Call]:
        rules: dict[str, Any] = dict.fromkeys(("cu_q", "cu_k", "slopes", "sinks"))
        rules |= {"max_q": 0, "max_k": 0, "mask": self.mask, "seed": self.seed, "dropout_p": self.dropout}
        rules |= {"threshold": dropout_threshold(self.dropout), "scale": self.head_dim**-0.5, "bottom_right": False}
        rules |= {"left": -1, "right": -1, "softcap": 0.0}
        query, key, value = self.tensors
        return [Call(query, key, value, causal=causal, **rules) for causal in self.causal]

    def runner(self, name: str) -> Callable[[], list[Tensor]]:
        """A function that runs the pass (dQ and dK/dV together) and returns its results."""
        calls = self.calls()
        if name.endswith("forward"):
            return lambda: [x for c in calls for x in forward.attention_forward(c)]
        saved = [(c, *forward.attention_forward(c)) for c in calls]
        return lambda: [x for c, o, n in saved for x in backward.attention_backward(c, o, n, self.gradient, None)]


def tune(output: Path, head_dims: list[int], lengths: list[int], *, tiny: bool = False) -> int:
    """Tune the given head dimensions and lengths into `output`, keeping what it holds of other cases.

    Args:
        lengths: one for each class of lengths wanted, in tokens.
        tiny: a rehearsal on the CPU, in Triton's interpreter: the same path, tiny shapes, few candidates.

    Returns:
        how many rows were written.

    Raises:
        ValueError: `output` holds something that is no table, or a stale one.
    """
    device = torch.device("cpu") if tiny else torch.device("cuda", torch.cuda.current_device())
    rows: dict[tiles.Key, tuple[tiles.Tile, float]] = {}
    if output.exists():
        rows = tiles.read(output)
    count = 0
    for head_dim, length, rich in itertools.product(head_dims, lengths, (False, True)):
        case = Case(device, head_dim, length, rich, tiny)
        for name in case.passes():
            tile, seconds, tried = best(case, name, tiny)
            rows[case.key(name)] = tile, seconds * 1e6
            tiles.write(output, rows, triton.__version__)
            count += 1
            kind = f"{case.key(name)[2]} {name}"
            print(f"{kind:16s} D={head_dim} S={length}: {tile}, {seconds * 1e6:.1f} us, best of {tried}", flush=True)
    return count


def best(case: Case, name: str, tiny: bool) -> tuple[tiles.Tile, float, int]:
    """(fastest tile of a pass, seconds, number of sound candidates); the default tile is one of them."""
    with tiles.forced({}):
        expected = _fresh(case, name)()
        default = _default(case, name)
    found: list[tuple[float, tiles.Tile]] = []
    candidates = {
        default: None,
        **dict.fromkeys(_candidates("rich" if case.rich and not name.startswith("short") else name, tiny)),
    }
    for tile in candidates:
        with tiles.forced({case.key(name): tile}):
            run = _fresh(case, name)
            try:
                sound = _alike(run(), expected) and not _spills(name)
            except triton.runtime.errors.OutOfResources:
                sound = False
            except RuntimeError as error:  # the compiler's own limits, such as a product too small for a unit
                print(f"{name} {tile}: {str(error).splitlines()[0]}", file=sys.stderr)
                sound = False
            if sound:
                found.append((_seconds(run, tiny), tile))
    call.forget()
    if not found:
        raise RuntimeError(f"{name}: not even the default tile {default} is sound on {case.target.name}")
    seconds, tile = min(found)
    return tile, seconds, len(found)


def _candidates(kind: str, tiny: bool) -> Iterator[tiles.Tile]:
    if tiny:
        yield 32, 16, 1, 1
        return
    for tile in itertools.product(*CANDIDATES[kind]):
        yield tile[0], tile[1], tile[2], tile[3]


def _default(case: Case, name: str) -> tiles.Tile:
    first = case.calls()[0]
    if name.startswith("short"):
        chosen = config.short_config(case.target, first, name)
    elif name == "forward":
        chosen = config.forward_config(case.target, first)
    else:
        chosen = config.backward_config(case.target, first)[name == "dK and dV"]
    return chosen.block_m, chosen.block_n, chosen.warps, chosen.stages


def _fresh(case: Case, name: str) -> Callable[[], list[Tensor]]:
    """The pass with no launch prepared and no kernel compiled before."""
    call.forget()
    kernel = _KERNELS[name]
    if not interpreting():
        kernel.kernel.device_caches.clear()
        kernel.found.clear()
    return case.runner(name)


def _spills(name: str) -> bool:
    """Whether any kernel compiled since `_fresh` spills registers."""
    kernel = _KERNELS[name]
    if interpreting():
        return False
    return any(k.n_spills > 0 for cache in kernel.kernel.device_caches.values() for k in cache[0].values())


def _alike(ours: list[Tensor], expected: list[Tensor]) -> bool:
    for a, b in zip(ours, expected, strict=True):
        tolerance = 4 * torch.finfo(a.dtype).eps if a.dtype != torch.float32 else 1e-3
        if not torch.allclose(a, b, rtol=tolerance, atol=tolerance * max(1.0, b.abs().max().item())):
            return False
    return True


def _seconds(run: Callable[[], object], tiny: bool) -> float:
    """Median time of a run."""
    if not tiny:
        return triton.testing.do_bench(run, warmup=20, rep=60, return_mode="median") / 1e3
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
