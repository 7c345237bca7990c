"""Rotary embedding of queries and keys against its peers."""

import pytest
import torch

from bench.operators import DEVICE, DTYPE, ON_GPU, check, compiled, optional, run
from fastformer.ops.rotary import rotary_embedding

# (batch, tokens, heads of queries, heads of keys, head dimension)
SHAPES_ON_GPU = [(8, 512, 12, 12, 64), (4, 4096, 32, 8, 128), (1, 16384, 32, 8, 128)]
SHAPES = SHAPES_ON_GPU if ON_GPU else [(8, 64, 12, 12, 64), (1, 512, 32, 8, 128)]


@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize("peer", ["fastformer", "eager", "compile", "liger"])
@pytest.mark.parametrize(("batch", "tokens", "heads", "heads_k", "width"), SHAPES)
def test_rotary(benchmark, batch, tokens, heads, heads_k, width, peer, direction):
    torch.manual_seed(0)
    angle = torch.arange(tokens)[:, None] * 10000.0 ** -(torch.arange(width // 2) / (width // 2))
    cos, sin = (torch.cat((t, t), -1).to(DEVICE, DTYPE) for t in (angle.cos(), angle.sin()))

    def half(x):
        return torch.cat((-x[..., width // 2 :], x[..., : width // 2]), -1)

    def joined(query, key):
        return torch.cat((query, key), 2)

    def stock(query, key):
        c, s = cos[None, :, None], sin[None, :, None]
        return joined(query * c + half(query) * s, key * c + half(key) * s)

    if peer == "fastformer":

        def call(query, key):
            return joined(*rotary_embedding(query, key, cos[:, : width // 2], sin[:, : width // 2]))
    elif peer == "liger":
        function = optional("liger_kernel.transformers.rope", "liger_rotary_pos_emb")

        def call(query, key):
            # It turns in place: copies keep the benchmark's.
            q, k = (x.transpose(1, 2).clone() for x in (query, key))
            turned = function(q, k, cos[None], sin[None])
            return joined(*(x.transpose(1, 2) for x in turned))
    else:
        call = stock if peer == "eager" else compiled(stock)
    leaves = {
        name: torch.randn(batch, tokens, count, width, device=DEVICE, dtype=DTYPE)
        for name, count in (("query", heads), ("key", heads_k))
    }
    check(call, stock, leaves, direction == "both", peer)
    benchmark.group = f"rotary {batch}x{tokens}x{heads}+{heads_k}x{width} {direction}"
    moved = (4 if direction == "both" else 2) * sum(t.numel() for t in leaves.values()) * DTYPE.itemsize
    run(benchmark, call, leaves, moved, direction == "both")
