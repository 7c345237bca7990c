"""`fastformer tune`: times the tiles of the attention kernels on the GPU at hand and writes the fastest to a table.

- A case is a pass, a class of rules, a head dimension and a class of lengths, in bfloat16 (float32 where rehearsed):
  16,384 tokens and 2,048 features, as published attention tables have them; plain is timed full and causal together,
  masked with a padding mask and dropout, as fine-tuning has them, rich with a window and ALiBi. Decoding is timed over
  caches of 65,536 tokens in all, eight query heads to a key head.
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

from fastformer.kernels.attention import backward, call, config, decode, forward, short, tiles
from fastformer.kernels.attention.call import Call
from fastformer.kernels.targets import Target, interpreting, target_of
from fastformer.ops.random import dropout_threshold

TOKENS, FEATURES = 16384, 2048
_GROUP = 8
# Queries, keys, warps, stages.
CANDIDATES = {
    "forward": ((64, 128), (32, 64, 128), (4, 8), (2, 3)),
    "dQ": ((32, 64, 128), (32, 64, 128), (4, 8), (1, 2)),
    "dK and dV": ((32, 64), (32, 64, 128), (4, 8), (1, 2)),
    # The tile of keys holds all of them, whatever stands here.
    "short forward": ((32, 64, 128), (128,), (2, 4, 8), (1,)),
    "short backward": ((16, 32, 64, 128), (128,), (2, 4, 8), (1,)),
    "decode": ((16,), (16, 32, 64, 128), (2, 4, 8), (1, 2, 3, 4)),
    "rich": ((32, 64), (32, 64), (4, 8), (1, 2)),
}
_KERNELS: dict[str, Any] = {
    "forward": forward._forward,
    "dQ": backward.backward_query,
    "dK and dV": backward.backward_key,
    "short forward": short.short_forward,
    "short backward": short.short_backward,
    "decode": decode._attend,
}


class Case:
    """Calls of one head dimension, class of lengths and kind of rules, and how to run their three passes."""

    def __init__(self, device: torch.device, head_dim: int, length: int, rules: str, tiny: bool) -> None:
        self.target: Target = target_of(device)
        self.rules, self.head_dim, self.length = rules, head_dim, length
        dtype = torch.float32 if tiny else torch.bfloat16
        self.dtype = "single" if tiny else "half"
        batch, heads = (1, 1) if tiny else (max(1, TOKENS // length), max(1, FEATURES // head_dim))
        generator = torch.Generator().manual_seed(0)

        def draw() -> Tensor:
            return torch.randn(batch, length, heads, head_dim, generator=generator).to(device, dtype).transpose(1, 2)

        self.tensors, self.gradient = [draw() for _ in range(3)], draw()
        self.mask, self.seed, self.dropout, self.slopes = None, None, 0.0, None
        if rules == "rich":
            self.slopes = torch.linspace(0.5, 0.01, heads).to(device)
        if rules == "masked":
            kept = torch.arange(length) < torch.linspace(length / 2, length, batch)[:, None]
            self.mask = kept.to(device)[:, None, None].expand(batch, heads, length, length)
            self.seed, self.dropout = torch.tensor([1], device=device), 0.1
        self.causal = (False,) if rules == "masked" else (True,) if rules == "rich" else (False, True)

    def key(self, name: str) -> tiles.Key:
        rules = config.rules_of(self.calls()[0])
        return self.target.name, name, rules, self.dtype, _width(self.head_dim), tiles.length_class(name, self.length)

    def candidates(self, name: str) -> str:
        """Which of `CANDIDATES` a pass has."""
        return "rich" if self.key(name)[2] == "rich" and not name.startswith("short") else name

    def default(self, name: str) -> config.Config:
        first = self.calls()[0]
        if name.startswith("short"):
            return config.short_config(self.target, first, name)
        if name == "forward":
            return config.forward_config(self.target, first)
        return config.backward_config(self.target, first)[name == "dK and dV"]

    def passes(self) -> tuple[str, ...]:
        """Those that these calls consist of."""
        first = self.calls()[0]
        behind = ("short backward",) if config.takes_short_backward(self.target, first) else ("dQ", "dK and dV")
        return ("short forward" if first.short else "forward", *behind)

    def calls(self) -> list[Call]:
        rules: dict[str, Any] = dict.fromkeys(("cu_q", "cu_k", "sinks"))
        rules |= {"max_q": 0, "max_k": 0, "mask": self.mask, "seed": self.seed, "dropout_p": self.dropout}
        rules |= {"threshold": dropout_threshold(self.dropout), "scale": self.head_dim**-0.5, "bottom_right": False}
        left = self.length // 2 if self.slopes is not None else -1
        rules |= {"slopes": self.slopes, "left": left, "right": -1, "softcap": 0.0}
        query, key, value = self.tensors
        return [Call(query, key, value, causal=causal, **rules) for causal in self.causal]

    def runner(self, name: str) -> Callable[[], list[Tensor]]:
        """A function that runs the pass (dQ and dK/dV together) and returns its results."""
        calls = self.calls()
        if name.endswith("forward"):
            return lambda: [x for c in calls for x in forward.attention_forward(c)]
        saved = [(c, *forward.attention_forward(c)) for c in calls]
        return lambda: [x for c, o, n in saved for x in backward.attention_backward(c, o, n, self.gradient, None)]


class Decoding:
    """One new token a sequence over full caches of one head dimension and length; like `Case`."""

    def __init__(self, device: torch.device, head_dim: int, length: int, tiny: bool) -> None:
        self.target = target_of(device)
        self.head_dim, self.length = head_dim, length
        dtype = torch.float32 if tiny else torch.bfloat16
        self.dtype = "single" if tiny else "half"
        batch, heads = (1, 1) if tiny else (max(1, 4 * TOKENS // length), max(1, FEATURES // head_dim // _GROUP))
        generator = torch.Generator().manual_seed(0)
        shapes = ((batch, 1, heads * _GROUP, head_dim), *((batch, length, heads, head_dim),) * 2)
        self.tensors = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
        self.lengths = torch.full((batch,), length, dtype=torch.int32, device=device)

    def passes(self) -> tuple[str, ...]:
        return ("decode",)

    def key(self, name: str) -> tiles.Key:
        width, length = _width(self.head_dim), tiles.length_class(name, self.length)
        return self.target.name, name, "plain", self.dtype, width, length

    def candidates(self, name: str) -> str:
        return name

    def default(self, name: str) -> config.Config:
        dtype = self.tensors[0].dtype
        return config.decode_config(self.target, _width(self.head_dim), dtype, True, _GROUP, self.length)

    def runner(self, name: str) -> Callable[[], list[Tensor]]:
        rules = decode.Rules(True, self.head_dim**-0.5, -1, -1, 0.0, False)
        query, keys, values = self.tensors
        none = (None, None, None, None, None, None, None)
        return lambda: list(decode.attention_decode(query, keys, values, self.lengths, *none, rules))


def _width(head_dim: int) -> int:
    return max(64, 1 << (head_dim - 1).bit_length())


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
    for head_dim, length, rules in itertools.product(head_dims, lengths, (*tiles.RULES, "decode")):
        case: Case | Decoding
        if rules == "decode":
            case = Decoding(device, head_dim, length, tiny)
        elif rules == "masked" and _width(head_dim) > 128:
            continue  # rich, by these heads' tables
        else:
            case = Case(device, head_dim, length, rules, tiny)
        for name in case.passes():
            tile, seconds, tried = best(case, name, tiny)
            rows[case.key(name)] = tile, seconds * 1e6
            tiles.write(output, rows, triton.__version__)
            count += 1
            kind = f"{case.key(name)[2]} {name}"
            print(f"{kind:16s} D={head_dim} S={length}: {tile}, {seconds * 1e6:.1f} us, best of {tried}", flush=True)
    return count


def best(case: Case | Decoding, name: str, tiny: bool) -> tuple[tiles.Tile, float, int]:
    """(fastest tile of a pass, seconds, number of sound candidates); the default tile is one of them."""
    with tiles.forced({}):
        expected = _fresh(case, name)()
        chosen = case.default(name)
    default = chosen.block_m, chosen.block_n, chosen.warps, chosen.stages
    found: list[tuple[float, tiles.Tile]] = []
    candidates = {default: None, **dict.fromkeys(_candidates(case.candidates(name), tiny))}
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
    _forget()
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


def _fresh(case: Case | Decoding, name: str) -> Callable[[], list[Tensor]]:
    """The pass with no launch prepared and no kernel compiled before."""
    _forget()
    kernel = _KERNELS[name]
    if not interpreting():
        kernel.kernel.device_caches.clear()
        kernel.found.clear()
    return case.runner(name)


def _forget() -> None:
    call.forget()
    decode.forget()


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
