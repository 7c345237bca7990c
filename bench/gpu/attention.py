"""Attention against PyTorch's backends: dense forward and backward, sequences of uneven length, decoding.

- Dense: bf16, 16k tokens and 2048 features in every row, as published tables have them (FlashAttention-3, arXiv
  2407.08608): heads = 2048 / head_dim. FLOP: forward 4·B·H·S²·D, half if causal; backward 2.5 times that.
- "fastformer hopper" is ours with the Hopper kernels forced (FASTFORMER_BACKEND=hopper), and no peer.
- Uneven: BERT-base heads, lengths as text has them, against padding with a mask; FLOP of the real tokens only.
- Decoding: one new token over full caches, 32 query heads for 8 key heads; GB/s of the cache, which is read once.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastformer as ff
from bench.gpu.place import device, rehearsing
from bench.gpu.results import Row, check_close
from bench.gpu.timing import Timing, difference, median_time

Attend = Callable[..., Tensor]
HOPPER = "fastformer hopper"

# The sizes that say most come first, should the stage's time run out.
LENGTHS = (512, 4096, 1024, 128, 8192, 2048, 256)
TOKENS, FEATURES = 16384, 2048
# The slice compared with the reference: the score matrix in fp32 must fit.
CHECKED_HEADS = 2
MATH_UP_TO = 1024
# Rotated inputs hold at least this much together, several times any L2.
ROTATED_BYTES = 256 << 20


def cases() -> list[tuple[str, Callable[[], Row]]]:
    if rehearsing():
        shapes = [(2, 2, 64, 16, False), (1, 2, 32, 32, True)]
    else:
        shapes = [
            (TOKENS // length, FEATURES // head_dim, length, head_dim, causal)
            for length in LENGTHS
            for head_dim in (128, 64)
            for causal in (False, True)
        ]
    found: list[tuple[str, Callable[[], Row]]] = [
        (f"dense S={s} D={d} {'causal' if causal else 'full'}", functools.partial(dense, b, h, s, d, causal))
        for b, h, s, d, causal in shapes
    ]
    for limit in (24,) if rehearsing() else (512, 128, 2048):
        found.append((f"uneven up to {limit}", functools.partial(uneven, limit)))
    for batch, length in ((2, 40),) if rehearsing() else ((1, 4096), (16, 4096), (64, 1024), (1, 65536)):
        found.append((f"decode B={batch} S={length}", functools.partial(decoding, batch, length)))
    return found


def _ours(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    out = ff.ops.scaled_dot_product_attention(q, k, v, is_causal=causal)
    assert isinstance(out, Tensor)
    return out


def _stock(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


@contextlib.contextmanager
def _forced(backend: str) -> Iterator[None]:
    """For forward and backward alike: autograd's threads read the same environment."""
    before = os.environ.get("FASTFORMER_BACKEND")
    os.environ["FASTFORMER_BACKEND"] = backend
    try:
        yield
    finally:
        if before is None:
            del os.environ["FASTFORMER_BACKEND"]
        else:
            os.environ["FASTFORMER_BACKEND"] = before


PEERS: dict[str, Attend] = {
    "flash": functools.partial(_stock, SDPBackend.FLASH_ATTENTION),
    "cudnn": functools.partial(_stock, SDPBackend.CUDNN_ATTENTION),
    "efficient": functools.partial(_stock, SDPBackend.EFFICIENT_ATTENTION),
    "math": functools.partial(_stock, SDPBackend.MATH),
}


def dense(batch: int, heads: int, length: int, head_dim: int, causal: bool) -> Row:
    """TFLOP/s of forward and backward, ours and every SDPA backend's."""
    dtype = torch.float32 if rehearsing() else torch.bfloat16
    shape = (batch, heads, length, head_dim)
    sets = _input_sets(shape, dtype)
    errors = _check(_ours, sets[0], causal)
    flop = 4 * batch * heads * length**2 * head_dim / (2 if causal else 1)
    row: Row = {"shape": shape, "causal": causal, "dtype": str(dtype), "errors": errors, "fwd": {}, "bwd": {}}
    for name, attend in {"ours": _ours, HOPPER: _ours, **PEERS}.items():
        if name == "math" and length > MATH_UP_TO:
            continue
        try:
            with _forced("hopper") if name == HOPPER else contextlib.nullcontext():
                if name == HOPPER:
                    row["hopper errors"] = _check(attend, sets[0], causal)
                forward, backward = _time(attend, sets, causal)
        except RuntimeError as error:
            if name == "ours":
                raise
            row["fwd"][name] = row["bwd"][name] = {"unavailable": str(error).splitlines()[0]}
            continue
        row["fwd"][name] = _rate(forward, flop)
        row["bwd"][name] = _rate(backward, 2.5 * flop)
    row["line"] = f"fwd {_line(row['fwd'])} | bwd {_line(row['bwd'])}"
    return row


def uneven(limit: int) -> Row:
    """Sequences packed without padding, against the same batch padded."""
    heads, head_dim, count = (2, 16, 5) if rehearsing() else (12, 64, 128)
    dtype = torch.float32 if rehearsing() else torch.bfloat16
    where = device()
    lengths = _lengths(count, limit)
    total, longest = int(lengths.sum()), int(lengths.max())
    bounds = torch.zeros(count + 1, dtype=torch.int32)
    bounds[1:] = lengths.cumsum(0)
    bounds = bounds.to(where)
    mask = (torch.arange(longest) < lengths[:, None]).to(where)

    def draw() -> list[Tensor]:
        return [torch.randn(total, heads, head_dim, device=where, dtype=dtype, requires_grad=True) for _ in range(3)]

    def packed(q: Tensor, k: Tensor, v: Tensor, *_: bool) -> Tensor:
        out = ff.ops.attention_varlen(q, k, v, bounds, bounds, longest, longest)
        assert isinstance(out, Tensor)
        return out

    def padded(q: Tensor, k: Tensor, v: Tensor, *_: bool) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])

    def peer(q: Tensor, k: Tensor, v: Tensor, *_: bool) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        out = varlen_attn(q, k, v, bounds, bounds, longest, longest)
        assert isinstance(out, Tensor)
        return out

    first = draw()
    errors = _check_uneven(packed, padded, first, mask)
    packed_sets = [[*tensors, torch.randn_like(first[0])] for tensors in (first, draw(), draw(), draw())]
    padded_sets = [[_pad(t, mask) for t in tensors] for tensors in packed_sets]
    flop = 4.0 * heads * head_dim * int((lengths.long() ** 2).sum())
    row: Row = {
        "lengths": lengths.tolist(),
        "heads": heads,
        "head_dim": head_dim,
        "dtype": str(dtype),
        "errors": errors,
        "fwd": {},
        "bwd": {},
    }
    for name, attend, sets in (
        ("ours", packed, packed_sets),
        (HOPPER, packed, packed_sets),
        ("padded", padded, padded_sets),
        ("torch varlen", peer, packed_sets),
    ):
        try:
            with _forced("hopper") if name == HOPPER else contextlib.nullcontext():
                if name == HOPPER:
                    row["hopper errors"] = _check_uneven(attend, padded, first, mask)
                forward, backward = _time(attend, sets, False)
        except (RuntimeError, ImportError, TypeError) as error:
            if name == "ours":
                raise
            row["fwd"][name] = row["bwd"][name] = {"unavailable": str(error).splitlines()[0]}
            continue
        row["fwd"][name] = _rate(forward, flop)
        row["bwd"][name] = _rate(backward, 2.5 * flop)
    row["line"] = f"fwd {_line(row['fwd'])} | bwd {_line(row['bwd'])}"
    return row


def decoding(batch: int, length: int) -> Row:
    """Ours against SDPA's backends with grouped heads, for which the cache is a key as long as it is."""
    heads, kv_heads, head_dim = (4, 2, 16) if rehearsing() else (32, 8, 128)
    dtype = torch.float32 if rehearsing() else torch.bfloat16
    where = device()
    cache_bytes = 2 * batch * length * kv_heads * head_dim * dtype.itemsize
    lengths = torch.full((batch,), length, dtype=torch.int32, device=where)

    def draw() -> list[Tensor]:
        shapes = ((batch, 1, heads, head_dim), *((batch, length, kv_heads, head_dim),) * 2)
        return [torch.randn(shape, device=where, dtype=dtype) for shape in shapes]

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = ff.ops.attention_kv_cache(q, k, v, lengths)
        assert isinstance(out, Tensor)
        return out

    def stock(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), enable_gqa=True)
        return out.transpose(1, 2)

    first = draw()
    exact = stock(SDPBackend.MATH, *(x.double() if rehearsing() else x.float() for x in first))
    row: Row = {
        "heads": (heads, kv_heads),
        "head_dim": head_dim,
        "dtype": str(dtype),
        "errors": {"out": check_close("out", ours(*first), stock(SDPBackend.MATH, *first), exact)},
        "decode": {},
    }
    sets = [first, *(draw() for _ in range(1 if rehearsing() else min(15, ROTATED_BYTES // cache_bytes)))]
    peers = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "math": SDPBackend.MATH,
    }
    for name, attend in {"ours": ours, **{k: functools.partial(stock, b) for k, b in peers.items()}}.items():
        try:
            timing = median_time([functools.partial(attend, *tensors) for tensors in sets])
        except RuntimeError as error:
            if name == "ours":
                raise
            row["decode"][name] = {"unavailable": str(error).splitlines()[0]}
            continue
        row["decode"][name] = {
            "us": timing.seconds * 1e6,
            "gbs": cache_bytes / timing.seconds / 1e9,
            "spread": timing.spread,
            "method": timing.method,
        }
    row["line"] = ", ".join(f"{k} {r['us']:.3g} us {r['gbs']:.3g} GB/s" for k, r in row["decode"].items() if "us" in r)
    return row


def _lengths(count: int, limit: int) -> Tensor:
    """Token counts as passages of text have them: log-normal, the median a third of the limit, cut at the limit."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.exp(torch.randn(count, generator=generator) * 0.6 + math.log(limit / 3))
    return drawn.round().clamp(4, limit).to(torch.int32)


def _input_sets(shape: tuple[int, ...], dtype: torch.dtype) -> list[list[Tensor]]:
    """Random query, key, value and gradient, enough sets to outgrow the caches."""
    size = 4 * math.prod(shape) * dtype.itemsize
    count = 2 if rehearsing() else max(2, min(16, math.ceil(ROTATED_BYTES / size)))
    sets = []
    for _ in range(count):
        tensors = [torch.randn(shape, device=device(), dtype=dtype, requires_grad=True) for _ in range(3)]
        sets.append([*tensors, torch.randn(shape, device=device(), dtype=dtype)])
    return sets


def _check(attend: Attend, tensors: list[Tensor], causal: bool) -> dict[str, float]:
    """Errors of output and gradients against fp32, on the first heads of the first sequence, in the timed shape."""
    q, k, v, gradient = tensors
    out = attend(q, k, v, causal)
    gradients = torch.autograd.grad(out, [q, k, v], gradient)
    part = [t[:1, :CHECKED_HEADS].detach() for t in tensors]
    stock = _with_gradients(part, causal, math_only=False)
    reference = _with_gradients([t.double() if rehearsing() else t.float() for t in part], causal, math_only=True)
    return {
        name: check_close(name, mine[:1, :CHECKED_HEADS], theirs, exact)
        for name, mine, theirs, exact in zip(
            ("out", "dq", "dk", "dv"), [out, *gradients], stock, reference, strict=True
        )
    }


def _check_uneven(packed: Attend, padded: Attend, leaves: list[Tensor], mask: Tensor) -> dict[str, float]:
    """Errors of output and gradients of the packed batch against the padded one in higher precision."""
    gradient = torch.randn_like(leaves[0])
    filled = [_pad(t, mask) for t in leaves]

    def unpadded(dtype: torch.dtype) -> list[Tensor]:
        inputs = [t.detach().to(dtype).requires_grad_() for t in filled]
        out = padded(*inputs)
        gradients = torch.autograd.grad(out, inputs, _pad(gradient, mask).to(dtype))
        return [t.detach().transpose(1, 2)[mask] for t in (out, *gradients)]

    out = packed(*leaves)
    ours = [out.detach(), *torch.autograd.grad(out, leaves, gradient)]
    results = ours, unpadded(out.dtype), unpadded(torch.float64 if rehearsing() else torch.float32)
    return {name: check_close(name, *values) for name, *values in zip(("out", "dq", "dk", "dv"), *results, strict=True)}


def _pad(packed: Tensor, mask: Tensor) -> Tensor:
    """(T, H, D) packed to (B, H, S, D) padded with zeros; `mask` (B, S) is True at real tokens."""
    out = torch.zeros(*mask.shape, *packed.shape[1:], device=mask.device, dtype=packed.dtype)
    out[mask] = packed.detach()
    return out.transpose(1, 2).contiguous().requires_grad_()


def _with_gradients(tensors: list[Tensor], causal: bool, math_only: bool) -> list[Tensor]:
    q, k, v = (t.clone().requires_grad_() for t in tensors[:3])
    with sdpa_kernel(SDPBackend.MATH) if math_only else contextlib.nullcontext():
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return [out.detach(), *torch.autograd.grad(out, [q, k, v], tensors[3])]


def _time(attend: Attend, sets: list[list[Tensor]], causal: bool) -> tuple[Timing, Timing | None]:
    def forward(q: Tensor, k: Tensor, v: Tensor, _: Tensor) -> None:
        attend(q, k, v, causal)

    def both(q: Tensor, k: Tensor, v: Tensor, gradient: Tensor) -> None:
        torch.autograd.grad(attend(q, k, v, causal), [q, k, v], gradient)

    alone = median_time([functools.partial(forward, *tensors) for tensors in sets])
    # A backward cannot be captured without its forward; its time is the difference.
    together = median_time([functools.partial(both, *tensors) for tensors in sets])
    return alone, difference(together, alone)


def _rate(timing: Timing | None, flop: float) -> dict[str, Any]:
    if timing is None:
        return {"unavailable": "lost in noise"}
    return {
        "us": timing.seconds * 1e6,
        "tflops": flop / timing.seconds / 1e12,
        "spread": timing.spread,
        "method": timing.method,
    }


def _line(rates: dict[str, dict[str, Any]]) -> str:
    return ", ".join(f"{name} {rate['tflops']:.3g}" for name, rate in rates.items() if "tflops" in rate)
