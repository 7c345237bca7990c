"""Attention against its peers: SDPA's backends, FlexAttention, torch.nn.attention.varlen, xFormers, flash-attn.

Runs with `pytest --benchmark bench/bench_attention.py`; on a CPU with tiny shapes, so that the file itself is checked.
A peer that is not installed, or refuses a case, is skipped by name. Results are checked before they are timed. A case's
extra_info holds

- TFLOP/s: forward 4·B·H·S²·D (half if causal), backward 2.5 times that; and the fraction of the measured peak, a large
  matrix product in the same dtype;
- GB/s: what must be read and written once; and the fraction of the measured copy bandwidth. For decoding that decides.
"""

import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.operators import DEVICE, DTYPE, ceilings, optional
from bench.operators import ON_GPU as CUDA
from fastformer.ops.attention import attention_kv_cache, attention_varlen, scaled_dot_product_attention

TOKENS = 16384 if CUDA else 256
LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384) if CUDA else (32,)
WIDTHS = (64, 128, 256) if CUDA else (16,)


def sdpa(backend):
    def call(query, key, value, is_causal):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal)

    return call


def flash_attn(query, key, value, is_causal):
    call = optional("flash_attn", "flash_attn_func")
    return call(*(x.transpose(1, 2) for x in (query, key, value)), causal=is_causal).transpose(1, 2)


def xformers(query, key, value, is_causal):
    call = optional("xformers.ops", "memory_efficient_attention")
    bias = optional("xformers.ops", "LowerTriangularMask")() if is_causal else None
    return call(*(x.transpose(1, 2) for x in (query, key, value)), attn_bias=bias).transpose(1, 2)


@functools.cache
def flex_compiled():
    return torch.compile(optional("torch.nn.attention.flex_attention", "flex_attention"))


@functools.cache
def flex_causal(length):
    make = optional("torch.nn.attention.flex_attention", "create_block_mask")
    return make(lambda b, h, i, j: i >= j, None, None, length, length, device=DEVICE)


def flex(query, key, value, is_causal):
    if not CUDA:
        pytest.skip("FlexAttention has no backward on a CPU")
    return flex_compiled()(query, key, value, block_mask=flex_causal(query.shape[2]) if is_causal else None)


def ours(query, key, value, is_causal):
    return scaled_dot_product_attention(query, key, value, is_causal=is_causal)


PEERS = {
    "fastformer": ours,
    "sdpa-math": sdpa(SDPBackend.MATH),
    "sdpa-flash": sdpa(SDPBackend.FLASH_ATTENTION),
    "sdpa-efficient": sdpa(SDPBackend.EFFICIENT_ATTENTION),
    "sdpa-cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
    "flex": flex,
    "xformers": xformers,
    "flash-attn": flash_attn,
}


def wait():
    if CUDA:
        torch.cuda.synchronize()


def timed(benchmark, function, flops, moved):
    """Time a function of so many floating-point operations and bytes that must move."""

    def once():
        function()
        wait()

    benchmark(once)
    if benchmark.stats:
        seconds, limits = benchmark.stats.stats.median, ceilings()
        rates = {"TFLOP/s": flops / seconds / 1e12, "GB/s": moved / seconds / 1e9}
        benchmark.extra_info.update(rates, dtype=str(DTYPE))
        benchmark.extra_info["of_matmul"] = rates["TFLOP/s"] / limits["matmul_tflops"]
        benchmark.extra_info["of_copy"] = rates["GB/s"] / limits["copy_gbs"]


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
@pytest.mark.parametrize("is_causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("width", WIDTHS)
def test_dense(benchmark, width, length, is_causal, direction, peer):
    batch, heads = max(1, TOKENS // length), (2048 if CUDA else 64) // width
    if peer == "sdpa-math" and length > 4096:
        pytest.skip("the scores would not fit")
    query, key, value = (
        torch.randn(batch, heads, length, width, device=DEVICE, dtype=DTYPE).requires_grad_() for _ in range(3)
    )
    call = PEERS[peer]
    try:
        out = call(query, key, value, is_causal)
    except RuntimeError as reason:
        pytest.skip(f"{peer} cannot: {str(reason).splitlines()[0]}")
    few = (query[:1, :1], key[:1, :1], value[:1, :1])
    exact = F.scaled_dot_product_attention(*(x.double() for x in few), is_causal=is_causal) if length <= 4096 else None
    if exact is not None:
        tolerance = 8 * torch.finfo(DTYPE).eps
        torch.testing.assert_close(out[:1, :1].double(), exact, rtol=tolerance, atol=tolerance)
    grad = torch.randn_like(out)
    flops = 4 * batch * heads * length**2 * width / (2 if is_causal else 1)
    one = query.numel() * query.element_size()  # forward reads three of these and writes one; backward five, three
    if direction == "forward":
        with torch.no_grad():
            timed(benchmark, lambda: call(query, key, value, is_causal), flops, 4 * one)
    elif direction == "backward":
        step = lambda: torch.autograd.grad(out, (query, key, value), grad, retain_graph=True)  # noqa: E731
        timed(benchmark, step, 2.5 * flops, 8 * one)
    else:
        step = lambda: torch.autograd.grad(call(query, key, value, is_causal), (query, key, value), grad)  # noqa: E731
        timed(benchmark, step, 3.5 * flops, 12 * one)


def lengths_of_text(count, longest):
    """Sequence lengths as sentences have them: log-normal, most far below the longest."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(count, generator=generator).mul(0.7).add(math.log(longest / 4)).exp()
    return drawn.clamp(1, longest).long().tolist()


def padded_sdpa(query, key, value, bounds, longest):
    sizes = [b - a for a, b in itertools.pairwise(bounds)]
    pad = lambda x: torch.nn.utils.rnn.pad_sequence(x.split(sizes), batch_first=True).transpose(1, 2)  # noqa: E731
    inside = torch.arange(longest, device=query.device) < torch.tensor(sizes, device=query.device)[:, None]
    out = F.scaled_dot_product_attention(pad(query), pad(key), pad(value), attn_mask=inside[:, None, None])
    return out.transpose(1, 2)[inside]


@pytest.mark.parametrize("peer", ["fastformer", "padded sdpa", "torch varlen", "flash-attn"])
@pytest.mark.parametrize("longest", (128, 512, 2048, 8192) if CUDA else (48,))
def test_packed(benchmark, longest, peer):
    """Forward and backward of a packed batch of sentences, 12 heads of 64."""
    sizes = lengths_of_text(64 if CUDA else 4, longest)
    bounds = [0]
    for size in sizes:
        bounds.append(bounds[-1] + size)
    longest = max(sizes)
    cu = torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
    packed = torch.randn(bounds[-1], 3, 12, 64, device=DEVICE, dtype=DTYPE).requires_grad_()

    def call(peer):
        if peer == "fastformer":
            return attention_varlen(*packed.unbind(1), cu, cu, longest, longest)
        if peer == "torch varlen":
            return optional("torch.nn.attention.varlen", "varlen_attn")(*packed.unbind(1), cu, cu, longest, longest)
        if peer == "flash-attn":
            return optional("flash_attn", "flash_attn_varlen_func")(*packed.unbind(1), cu, cu, longest, longest)
        return padded_sdpa(*packed.unbind(1), bounds, longest)

    try:
        out = call(peer)
    except RuntimeError as reason:
        pytest.skip(f"{peer} cannot: {str(reason).splitlines()[0]}")
    tolerance = 8 * torch.finfo(DTYPE).eps
    torch.testing.assert_close(out, call("padded sdpa"), rtol=tolerance, atol=tolerance)
    grad = torch.randn_like(out)
    flops = 3.5 * 4 * 12 * 64 * sum(n * n for n in sizes)
    moved = 4 * packed.numel() * packed.element_size()  # 12 tensors of a third of it
    timed(benchmark, lambda: torch.autograd.grad(call(peer), packed, grad), flops, moved)


def sdpa_over_cache(query, k_cache, v_cache, lengths):
    seen = torch.arange(k_cache.shape[1], device=query.device) < lengths[:, None]
    tensors = (x.transpose(1, 2) for x in (query, k_cache, v_cache))
    return F.scaled_dot_product_attention(*tensors, attn_mask=seen[:, None, None], enable_gqa=True).transpose(1, 2)


def flash_attn_over_cache(query, k_cache, v_cache, lengths):
    return optional("flash_attn", "flash_attn_with_kvcache")(query, k_cache, v_cache, cache_seqlens=lengths)


DECODERS = {
    "fastformer": attention_kv_cache,
    "sdpa with a mask": sdpa_over_cache,
    "flash-attn": flash_attn_over_cache,
}


@pytest.mark.parametrize("peer", DECODERS)
@pytest.mark.parametrize("groups", [1, 8])
@pytest.mark.parametrize("width", [64, 128] if CUDA else [16])
@pytest.mark.parametrize("longest", [1024, 4096, 16384] if CUDA else [48])
@pytest.mark.parametrize("batch", [1, 8, 64] if CUDA else [2])
def test_decode(benchmark, batch, longest, width, groups, peer):
    """One new token a sequence over caches filled as text is long; the bytes are those of the keys and values held."""
    heads = 32 if CUDA else 8
    kv_heads = heads // groups
    lengths = torch.tensor(lengths_of_text(batch, longest), dtype=torch.int32, device=DEVICE)
    query = torch.randn(batch, 1, heads, width, device=DEVICE, dtype=DTYPE)
    caches = [torch.randn(batch, longest, kv_heads, width, device=DEVICE, dtype=DTYPE) for _ in range(2)]
    with torch.no_grad():
        try:
            out = DECODERS[peer](query, *caches, lengths)
        except RuntimeError as reason:
            pytest.skip(f"{peer} cannot: {str(reason).splitlines()[0]}")
        exact = sdpa_over_cache(query.double(), *(x.double() for x in caches), lengths)
        tolerance = 8 * torch.finfo(DTYPE).eps
        torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=tolerance)
        held = int(lengths.sum())
        moved = 2 * held * kv_heads * width * query.element_size()
        timed(benchmark, lambda: DECODERS[peer](query, *caches, lengths), 4 * held * heads * width, moved)
