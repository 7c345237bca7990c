"""Attention over a cache on a GPU: one graph for every length, no host reads, and launches that skip Triton's own."""

import pytest
import torch
import torch.nn.functional as F

import fastformer as ff
from tests.gpu.subjects import assert_no_worse


def setting(device, dtype, tiny, paged):
    generator = torch.Generator().manual_seed(0)
    batch, kv_heads, groups, width, slots, page = (2, 1, 2, 16, 64, 16) if tiny else (4, 2, 4, 128, 4096, 64)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    query, new = draw(batch, 1, kv_heads * groups, width), [draw(batch, 1, kv_heads, width) for _ in range(2)]
    caches, table = [draw(batch, slots, kv_heads, width) for _ in range(2)], None
    if paged:
        caches = [x.view(batch * slots // page, page, kv_heads, width) for x in caches]
        table = torch.arange(batch * slots // page, dtype=torch.int32, device=device).view(batch, -1)
    return query, new, caches, table, slots


def stock(query, caches, lengths, slots):
    keys, values = (x.reshape(query.shape[0], slots, *x.shape[-2:]).transpose(1, 2) for x in caches)
    seen = torch.arange(slots, device=query.device) < lengths.view(-1, 1, 1, 1)
    return F.scaled_dot_product_attention(query.transpose(1, 2), keys, values, attn_mask=seen, enable_gqa=True)


@pytest.mark.parametrize("paged", [False, True])
def test_numbers(paged, device, working_dtype, tiny):
    query, new, caches, table, slots = setting(device, working_dtype, tiny, paged)
    for length in (0, 1, slots // 2 + 1, slots - 1):
        lengths = torch.full((query.shape[0],), length, dtype=torch.int32, device=device)
        ours = ff.ops.attention_kv_cache(query, *caches, lengths, table, *new).transpose(1, 2)
        theirs = stock(query, caches, lengths + 1, slots)
        exact = stock(query.double(), [x.double() for x in caches], lengths + 1, slots)
        assert_no_worse([ours], [theirs], [exact])


@pytest.mark.gpu
@pytest.mark.parametrize("paged", [False, True])
def test_one_graph_serves_every_length(paged, device, working_dtype, tiny):
    query, new, caches, table, slots = setting(device, working_dtype, tiny, paged)
    lengths = torch.full((query.shape[0],), 3, dtype=torch.int32, device=device)

    def step():
        return ff.ops.attention_kv_cache(query, *caches, lengths, table, *new)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for length in (0, 17, slots - 1):
        lengths.fill_(length)
        graph.replay()
        torch.testing.assert_close(out, step(), rtol=0, atol=0)


@pytest.mark.gpu
def test_nothing_waits_for_the_device(device, working_dtype, tiny):
    query, new, caches, table, _ = setting(device, working_dtype, tiny, True)
    lengths = torch.zeros(query.shape[0], dtype=torch.int32, device=device)
    ff.ops.attention_kv_cache(query, *caches, lengths, table, *new)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ff.ops.attention_kv_cache(query, *caches, lengths, table, *new)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_repeats_skip_tritons_launch(device, working_dtype, tiny, monkeypatch):
    from triton.runtime.jit import JITFunction

    query, new, caches, table, _ = setting(device, working_dtype, tiny, False)
    lengths = torch.zeros(query.shape[0], dtype=torch.int32, device=device)
    expected = ff.ops.attention_kv_cache(query, *caches, lengths, table, *new)
    monkeypatch.setattr(JITFunction, "run", lambda *a, **k: pytest.fail("went through Triton's launch"))
    out = ff.ops.attention_kv_cache(query, *caches, lengths, table, *new)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
