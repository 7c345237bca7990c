"""Attention forward and backward against PyTorch's own: SDPA's backends, FlexAttention, flash-attn where importable.

Runs with `pytest --benchmark bench/bench_attention.py`; on a CPU with tiny shapes, so that the file itself is checked.
Every result is checked before it is timed. A case's extra_info holds TFLOP/s: forward 4·B·H·S²·D (half if causal),
backward 2.5 times that.
"""

import importlib.util
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastformer.ops.attention import attention_varlen, scaled_dot_product_attention

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32
TOKENS = 16384 if CUDA else 256
LENGTHS = (128, 512, 1024, 4096, 16384) if CUDA else (32,)
WIDTHS = (64, 128, 256) if CUDA else (16,)


def sdpa(backend):
    def call(query, key, value, is_causal):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal)

    return call


def flash_attn(query, key, value, is_causal):
    from flash_attn import flash_attn_func

    return flash_attn_func(*(x.transpose(1, 2) for x in (query, key, value)), causal=is_causal).transpose(1, 2)


def ours(query, key, value, is_causal):
    return scaled_dot_product_attention(query, key, value, is_causal=is_causal)


PEERS = {"fastformer": ours, "sdpa-math": sdpa(SDPBackend.MATH)}
if CUDA:
    PEERS |= {
        "sdpa-flash": sdpa(SDPBackend.FLASH_ATTENTION),
        "sdpa-efficient": sdpa(SDPBackend.EFFICIENT_ATTENTION),
        "sdpa-cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
    }
else:
    PEERS["sdpa-flash"] = sdpa(SDPBackend.FLASH_ATTENTION)
if importlib.util.find_spec("flash_attn"):
    PEERS["flash-attn"] = flash_attn


def wait():
    if CUDA:
        torch.cuda.synchronize()


def timed(benchmark, function, flops):
    def once():
        function()
        wait()

    benchmark(once)
    if benchmark.stats:
        benchmark.extra_info["TFLOP/s"] = flops / benchmark.stats.stats.median / 1e12


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
    if direction == "forward":
        with torch.no_grad():
            timed(benchmark, lambda: call(query, key, value, is_causal), flops)
    elif direction == "backward":
        step = lambda: torch.autograd.grad(out, (query, key, value), grad, retain_graph=True)  # noqa: E731
        timed(benchmark, step, 2.5 * flops)
    else:
        step = lambda: torch.autograd.grad(call(query, key, value, is_causal), (query, key, value), grad)  # noqa: E731
        timed(benchmark, step, 3.5 * flops)


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


@pytest.mark.parametrize("peer", ["fastformer", "padded sdpa"])
@pytest.mark.parametrize("longest", (128, 512) if CUDA else (48,))
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
        return padded_sdpa(*packed.unbind(1), bounds, longest)

    out = call(peer)
    tolerance = 8 * torch.finfo(DTYPE).eps
    torch.testing.assert_close(out, call("padded sdpa"), rtol=tolerance, atol=tolerance)
    grad = torch.randn_like(out)
    flops = 3.5 * 4 * 12 * 64 * sum(n * n for n in sizes)
    timed(benchmark, lambda: torch.autograd.grad(call(peer), packed, grad), flops)
