"""Every operator through its compiled kernels: numbers, repeats, streams, graphs, synchronisation, addresses."""

import pytest
import torch
import torch.nn.functional as F

import fastformer as ff
from bench.subjects import NAMES, subjects, with_gradients
from fastformer.ops.backend import backend_for
from tests.gpu.subjects import assert_no_worse


@pytest.fixture(params=NAMES)
def subject(request, tiny, device):
    return subjects(tiny, device)[request.param]


@pytest.fixture
def repeated_subject(request, subject, tiny):
    """Every subject on a GPU; two in a rehearsal, which has been through `test_numbers` with all of them."""
    if tiny and request.node.callspec.params["subject"] not in ("layer_norm", "attention_varlen"):
        pytest.skip("rehearsed with two operators")
    return subject


def test_kernels_are_what_runs(device):
    assert backend_for(device) == "triton"


def test_numbers(subject, device, working_dtype):
    leaves = subject.draw(device, working_dtype)
    exact = [t.detach().double().requires_grad_(subject.differentiable) for t in leaves]
    results = (
        with_gradients(f, x) for f, x in ((subject.ours, leaves), (subject.stock, leaves), (subject.stock, exact))
    )
    assert_no_worse(*results)


def test_numbers_in_fp32(repeated_subject, device):
    subject = repeated_subject
    leaves = subject.draw(device, torch.float32)
    exact = [t.detach().double().requires_grad_(subject.differentiable) for t in leaves]
    results = (
        with_gradients(f, x) for f, x in ((subject.ours, leaves), (subject.stock, leaves), (subject.stock, exact))
    )
    assert_no_worse(*results)


@pytest.mark.parametrize("head_dim", [8, 40, 64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("lengths", [(1, 1), (1, 239), (239, 1), (113, 203), (128, 128), (799, 3)])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_shapes(head_dim, lengths, causal, device, working_dtype, tiny):
    if tiny and (head_dim != 40 or sum(lengths) > 250):
        pytest.skip("too long for a rehearsal")
    torch.manual_seed(0)
    q_len, k_len = lengths
    q, k, v = (
        torch.randn(2, 3, n, head_dim, device=device, dtype=working_dtype, requires_grad=True)
        for n in (q_len, k_len, k_len)
    )
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]

    def ours(*leaves):
        return ff.ops.scaled_dot_product_attention(*leaves, is_causal=causal)

    def stock(*leaves):
        return F.scaled_dot_product_attention(*leaves, is_causal=causal)

    assert_no_worse(with_gradients(ours, [q, k, v]), with_gradients(stock, [q, k, v]), with_gradients(stock, exact))


def test_repeats_are_equal_bit_for_bit(repeated_subject, device, working_dtype, tiny):
    subject = repeated_subject
    leaves = subject.draw(device, working_dtype)
    first = with_gradients(subject.ours, leaves)
    for _ in range(1 if tiny else 50):
        assert all(torch.equal(a, b) for a, b in zip(with_gradients(subject.ours, leaves), first, strict=True))


def test_padding_is_not_read(device, working_dtype, tiny):
    """Keys that a mask hides may hold anything."""
    torch.manual_seed(0)
    length = 37 if tiny else 300
    q, k, v = (torch.randn(2, 2, length, 16 if tiny else 64, device=device, dtype=working_dtype) for _ in range(3))
    seen = (torch.arange(length, device=device) < torch.tensor([length, 5], device=device)[:, None])[:, None, None]
    clean = ff.ops.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    hidden = ~seen.transpose(-1, -2)
    dirty = ff.ops.scaled_dot_product_attention(
        q, k.masked_fill(hidden, torch.nan), v.masked_fill(hidden, torch.inf), attn_mask=seen
    )
    assert torch.equal(clean, dirty)


def test_dropout_repeats_with_the_seed(device, working_dtype, tiny):
    x, residual = (torch.randn(33, 64 if tiny else 768, device=device, dtype=working_dtype) for _ in range(2))
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(ff.ops.add_layer_norm(x, residual, dropout_p=0.3))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])


@pytest.mark.gpu
def test_nothing_waits_for_the_device(subject, device, working_dtype):
    leaves = subject.draw(device, working_dtype)
    gradient = torch.randn_like(subject.ours(*leaves))
    torch.autograd.grad(subject.ours(*leaves), leaves, gradient)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(subject.ours(*leaves), leaves, gradient)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_side_stream(subject, device, working_dtype):
    leaves = subject.draw(device, working_dtype)
    expected = with_gradients(subject.ours, leaves)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results = with_gradients(subject.ours, leaves)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.gpu
def test_cuda_graph(subject, device, working_dtype):
    leaves = subject.draw(device, working_dtype)
    fresh = subject.draw(device, working_dtype, seed=7)
    gradient = torch.randn_like(subject.ours(*leaves))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            torch.autograd.grad(subject.ours(*leaves), leaves, gradient)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = subject.ours(*leaves)
        gradients = torch.autograd.grad(out, leaves, gradient)
    with torch.no_grad():
        for leaf, value in zip(leaves, fresh, strict=True):
            leaf.copy_(value)
    graph.replay()
    torch.cuda.synchronize()
    expected = subject.ours(*fresh)
    assert torch.equal(out, expected)
    for a, b in zip(gradients, torch.autograd.grad(expected, fresh, gradient), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
def test_cuda_graph_draws_fresh_dropout(device):
    x = torch.ones(64, 768, device=device)
    residual = torch.zeros_like(x)
    ff.ops.add_layer_norm(x, residual, dropout_p=0.5)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out = ff.ops.add_layer_norm(x, residual, dropout_p=0.5)
    graph.replay()
    first = out.clone()
    graph.replay()
    assert not torch.equal(first, out)


@pytest.mark.gpu
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(subject, device, working_dtype, dynamic):
    leaves = subject.draw(device, working_dtype)
    compiled = torch.compile(subject.ours, fullgraph=True, dynamic=dynamic)
    for a, b in zip(with_gradients(compiled, leaves), with_gradients(subject.ours, leaves), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.gpu
def test_attention_past_two_to_the_31(device):
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB of free device memory")
    shape = (65, 16, 16384, 128)
    q = torch.randn(shape, device=device, dtype=torch.bfloat16)
    assert q.numel() > 2**31
    out = ff.ops.scaled_dot_product_attention(q, q, q, is_causal=True)
    last = q[-1:, -1:]
    stock = F.scaled_dot_product_attention(last, last, last, is_causal=True)
    exact = F.scaled_dot_product_attention(last.float(), last.float(), last.float(), is_causal=True)
    assert_no_worse([out[-1:, -1:]], [stock], [exact])


@pytest.mark.gpu
def test_norm_past_two_to_the_31(device):
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB of free device memory")
    x = torch.randn(2**21 + 5, 1024, device=device, dtype=torch.bfloat16)
    out = ff.ops.add_layer_norm(x, x)
    last = x[-7:]
    stock = F.layer_norm(last + last, (1024,))
    assert_no_worse([out[-7:]], [stock], [F.layer_norm(last.double() * 2, (1024,))])
