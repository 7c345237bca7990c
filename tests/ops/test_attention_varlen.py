"""attention_varlen: each packed sequence against the definition, tokens outside, bad boundaries."""

import math
import random

import pytest
import torch
from attention_oracle import Case, check, oracle

from fastformer.ops.attention import attention_varlen, scaled_dot_product_attention
from fastformer.ops.random import philox_keep


def boundaries(lengths, device):
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)


def packed_case(number, device, dtypes):
    """Random packed call, the function and its oracle."""
    pick = random.Random(number)
    generator = torch.Generator().manual_seed(number)
    dtype = pick.choice(dtypes)
    kv_heads, groups = pick.choice([1, 2]), pick.choice([1, 1, 2])
    heads, dim = kv_heads * groups, pick.choice([4, 16, 24])
    count = pick.choice([0, 1, 3, 4])
    lengths_q = [pick.choice([0, 1, 15, 17, pick.randint(1, 50)]) for _ in range(count)]
    own = pick.random() < 0.6
    lengths_k = lengths_q if own else [pick.choice([0, 1, 16, pick.randint(1, 50)]) for _ in range(count)]
    slack = pick.choice([0, 0, 3, 40])  # tokens after the last boundary
    tokens_q, tokens_k = sum(lengths_q) + slack, sum(lengths_k) + slack

    def place(tokens, n):
        buffer = torch.full((tokens, 3, n, dim), math.nan, dtype=dtype, device=device)
        view = buffer[:, 1]
        return view.copy_(torch.randn(tokens, n, dim, generator=generator).to(device, dtype))

    tensors = {"query": place(tokens_q, heads), "key": place(tokens_k, kv_heads), "value": place(tokens_k, kv_heads)}
    options = {"enable_gqa": groups > 1, "causal_alignment": pick.choice(["top-left", "bottom-right"])}
    extras = {}
    if pick.random() < 0.5:
        options["is_causal"] = True
    if pick.random() < 0.2:
        options["window"] = (pick.choice([None, 0, 9]), pick.choice([None, 4]))
    if pick.random() < 0.2:
        options["softcap"] = 5.0
    if pick.random() < 0.2:
        slopes = torch.rand(pick.choice([(heads,), (count, heads)]), generator=generator)
        tensors["alibi_slopes"] = slopes.to(device)
    if pick.random() < 0.2:
        tensors["sinks"] = torch.randn(heads, generator=generator).to(device)
    if pick.random() < 0.3:
        options["dropout_p"] = pick.choice([0.2, 1.0])
        extras["dropout_seed"] = torch.tensor([number * 31 - 5], device=device)
    bounds_q, bounds_k = boundaries(lengths_q, device), boundaries(lengths_k, device)
    longest = max(lengths_q, default=0) + pick.choice([0, 5]), max(lengths_k, default=0)
    if pick.random() < 0.4:
        shape = [pick.choice([1, size]) for size in (count, heads, *longest)]
        mask = torch.randn(shape, generator=generator).masked_fill(
            torch.rand(shape, generator=generator) < 0.2, -math.inf
        )
        if pick.random() < 0.4:
            extras["attn_mask"] = (mask > 0).to(device)
        else:
            tensors["attn_mask"] = mask.to(device, dtype)

    def ours(**leaves):
        return attention_varlen(
            leaves.pop("query"), leaves.pop("key"), leaves.pop("value"), bounds_q, bounds_k, *longest,
            **extras, **leaves, **options, return_lse=True,
        )  # fmt: skip

    def theirs(query, key, value, sinks=None, alibi_slopes=None, attn_mask=extras.get("attn_mask")):
        outs, lses = [], []
        wide_mask = None if attn_mask is None else attn_mask.expand(count, heads, *longest)
        for i in range(count):
            a, b = sum(lengths_q[:i]), sum(lengths_q[: i + 1])
            c, d = sum(lengths_k[:i]), sum(lengths_k[: i + 1])
            keep = None
            if "dropout_p" in options:
                plane = (torch.arange(heads) + i * heads).view(1, heads, 1, 1)
                row, column = torch.arange(b - a).view(-1, 1), torch.arange(d - c)
                keep = philox_keep(number * 31 - 5, column, row, plane, options["dropout_p"], draws=4).to(device)
            slopes = alibi_slopes
            if slopes is not None and slopes.ndim == 2:
                slopes = slopes[i]
            mask = None if wide_mask is None else wide_mask[i : i + 1, :, : b - a, : d - c]
            one = [x.transpose(0, 1)[None] for x in (query[a:b], key[c:d], value[c:d])]
            out, lse = oracle(*one, mask, options=options, sinks=sinks, alibi_slopes=slopes, keep=keep)
            outs.append(out[0].transpose(0, 1))
            lses.append(lse[0].transpose(0, 1))
        outs.append(query[tokens_q - slack :] * 0)
        lses.append(query.new_full((slack, heads), -math.inf))
        return torch.cat(outs), torch.cat(lses)

    return Case(number, tensors, {**options, "lengths": (lengths_q, lengths_k)}, extras), ours, theirs


@pytest.mark.parametrize("number", range(24))
def test_fuzz(number, device, interpreting, poisoned):
    dtypes = [torch.float32, torch.float16] + ([] if interpreting else [torch.bfloat16])
    check(*packed_case(number, device, dtypes))


@pytest.mark.parametrize("lengths", [[5, 0, 33, 1, 18], [3, 90, 4, 2, 120, 3]])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("biased", [False, True])
def test_short_path_is_the_general_one(lengths, is_causal, groups, biased, device, interpreting, poisoned):
    """Without return_lse the CPU takes its own path: short sequences together, long ones alone."""
    if interpreting:
        pytest.skip("kernels have one path")
    bounds, tokens, longest = boundaries(lengths, device), sum(lengths), max(lengths)
    packed = torch.randn(tokens + 3, 2 * groups + 4, 16, device=device).requires_grad_()
    query, key, value = packed.split([2 * groups, 2, 2], 1)
    bias = torch.randn(2 * groups, longest, longest, device=device).requires_grad_() if biased else None
    call = (query, key, value, bounds, bounds, longest, longest)
    options = {"is_causal": is_causal, "enable_gqa": groups > 1, "attn_mask": bias}
    out = attention_varlen(*call, **options)
    general, _ = attention_varlen(*call, **options, return_lse=True)
    torch.testing.assert_close(out, general, rtol=1e-5, atol=1e-6)
    assert (out[tokens:] == 0).all()
    grad = torch.randn_like(out)
    leaves = (packed, bias) if biased else (packed,)
    ours, theirs = (torch.autograd.grad(result, leaves, grad) for result in (out, general))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert (ours[0][tokens:] == 0).all()


@pytest.mark.parametrize("is_causal", [False, True])
def test_dropout_gradient_is_that_of_its_forward(is_causal, device):
    """The masks of forward and backward are the same: the derivative along a direction matches a difference."""
    bounds = boundaries([9, 14], device)
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(3, 23, 2, 8, generator=generator).to(device, torch.float32).requires_grad_()
    step = torch.randn(packed.shape, generator=generator).to(device)

    def loss(x):
        torch.manual_seed(5)
        return attention_varlen(*x, bounds, bounds, 14, 14, dropout_p=0.4, is_causal=is_causal).square().sum()

    (grad,) = torch.autograd.grad(loss(packed), packed)
    with torch.no_grad():
        difference = (loss(packed + 1e-2 * step) - loss(packed - 1e-2 * step)) / 2e-2
    torch.testing.assert_close((grad * step).sum(), difference, rtol=2e-3, atol=2e-3)


def test_dropout_drops_its_share(device):
    value = torch.eye(64, device=device).view(64, 1, 64)
    query = torch.zeros(64, 1, 64, device=device)
    bounds = boundaries([64], device)
    total = sum(attention_varlen(query, query, value, bounds, bounds, 64, 64, dropout_p=0.25) for _ in range(20)) / 20
    dropped = attention_varlen(query, query, value, bounds, bounds, 64, 64, dropout_p=0.25) == 0
    assert 0.2 < dropped.float().mean() < 0.3
    assert abs(total.mean().item() - 1 / 64) < 1e-3
    assert (attention_varlen(query, query, value, bounds, bounds, 64, 64, dropout_p=1.0) == 0).all()


def test_is_dense_attention_of_each_sequence(device):
    lengths = [7, 21]
    bounds = boundaries(lengths, device)
    query, key, value = torch.randn(3, 28, 2, 16, device=device)
    out = attention_varlen(query, key, value, bounds, bounds, 21, 21)
    for a, b in ((0, 7), (7, 28)):
        dense = scaled_dot_product_attention(*(x[a:b].transpose(0, 1)[None] for x in (query, key, value)))
        torch.testing.assert_close(out[a:b], dense[0].transpose(0, 1), rtol=1e-5, atol=1e-6)


def test_nan_of_other_sequences_stays_there(device):
    bounds = boundaries([10, 12], device)
    query, key, value = torch.randn(3, 30, 2, 16, device=device)
    for x in (query, key, value):
        x[10:] = math.nan
    out = attention_varlen(query, key, value, bounds, bounds, 12, 12)
    assert out[:10].isfinite().all()
    assert out[10:22].isnan().all()
    assert (out[22:] == 0).all()


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("return_lse", [False, True])
def test_registered_operators(dropout_p, return_lse, device):
    """One graph under torch.compile, with the same numbers."""
    bounds = boundaries([9, 14], device)
    packed = torch.randn(23, 3, 2, 16, device=device).requires_grad_()
    seed = torch.tensor([3], device=device) if dropout_p else None

    def call(x):
        result = attention_varlen(
            *x.unbind(1), bounds, bounds, 14, 14, dropout_p, return_lse=return_lse, dropout_seed=seed
        )
        return result[0] if return_lse else result

    eager = call(packed)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(packed)
    torch.testing.assert_close(compiled, eager)
    grad = torch.randn_like(eager)
    for a, b in zip(*(torch.autograd.grad(out, packed, grad) for out in (compiled, eager)), strict=True):
        torch.testing.assert_close(a, b)


def test_opcheck(device, interpreting):
    bounds = boundaries([9, 0, 14], device)
    query, key, value = (torch.randn(25, 2, 16, device=device).requires_grad_() for _ in range(3))
    if device.type == "cpu" and not interpreting:
        from fastformer.ops.attention.packed_cpu import packed_cpu

        for p in (0.0, 0.3):
            seed = torch.tensor([4]) if p else None
            torch.library.opcheck(packed_cpu.op, (query, key, value, bounds, bounds, None, p, True, False, 0.25, seed))
        return
    from fastformer.ops.attention.kernel import attention

    rules = (0.0, True, 0.25, True, 5, -1, 0.0)
    torch.library.opcheck(attention.op, (query, key, value, bounds, bounds, None, None, None, None, 14, 14, *rules))
    dense = [torch.randn(2, 2, 18, 16, device=device).requires_grad_() for _ in range(3)]
    torch.library.opcheck(attention.op, (*dense, None, None, None, None, None, None, 0, 0, *rules))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"query": torch.zeros(1, 10, 2, 8)}, ValueError, "query must have 3 dimensions"),
        ({"cu_seqlens_q": torch.tensor([0, 10])}, TypeError, "cu_seqlens_q must be one of int32"),
        ({"cu_seqlens_k": torch.tensor([0, 4, 10]).int()}, ValueError, "cu_seqlens_k must bound as many sequences"),
        ({"max_seqlen_q": torch.tensor(10)}, ValueError, "max_seqlen_q must be an int"),
    ],
)
def test_bad_input_is_named(change, error, words):
    call = {name: torch.zeros(10, 2, 8) for name in ("query", "key", "value")}
    call |= {name: torch.tensor([0, 10], dtype=torch.int32) for name in ("cu_seqlens_q", "cu_seqlens_k")}
    call |= {"max_seqlen_q": 10, "max_seqlen_k": 10}
    with pytest.raises(error, match=words):
        attention_varlen(**(call | change))


@pytest.mark.parametrize("bounds", [[1, 10], [0, 11], [0, 6, 4]])
def test_bad_boundaries_are_named(bounds):
    """On the CPU, where looking costs nothing."""
    query = torch.zeros(10, 2, 8)
    cu = torch.tensor(bounds, dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seqlens_q must start at 0, never fall"):
        attention_varlen(query, query, query, cu, cu, 10, 10)
    good = torch.tensor([0, 10], dtype=torch.int32)
    with pytest.raises(ValueError, match="max_seqlen_q must be at least the longest sequence, 10"):
        attention_varlen(query, query, query, good, good, 4, 10)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("lengths_q", "lengths_k", "surplus"),
    [([5, 9, 1], None, 0), ([5, 0, 9], None, 3), ([6, 6, 6], None, 0), ([6, 6], None, 4), ([3, 4], [7, 0], 2)],
)
def test_flash_on_the_cpu_equals_products(lengths_q, lengths_k, surplus, causal, monkeypatch):
    """The same call by PyTorch's flash attention and by products and softmax; rows of no sequence get nothing."""
    from fastformer.ops.attention import packed_cpu, packed_flash

    if causal and lengths_k is not None:
        pytest.skip("only self-attention")
    lengths_k = lengths_k or lengths_q
    generator = torch.Generator().manual_seed(0)

    def rows(count):
        return torch.randn(count, 3, 8, generator=generator, dtype=torch.float64)

    query = rows(sum(lengths_q) + surplus)
    key, value = (rows(sum(lengths_k) + surplus) for _ in range(2))
    bounds = [torch.tensor([0, *n]).cumsum(0).int() for n in (lengths_q, lengths_k)]
    flash, calls = packed_flash.forward, []

    def counted(*given):
        calls.append(given)
        return flash(*given)

    monkeypatch.setattr(packed_flash, "forward", counted)
    # Of a sum, whose gradient is one number for every place, and of weights.
    for weight in (torch.ones(()).double(), rows(len(query))):
        found = []
        for takes in (packed_flash.takes, lambda *_: False):
            leaves = [x.clone().requires_grad_() for x in (query, key, value)]
            with monkeypatch.context() as patched:
                patched.setattr(packed_flash, "takes", takes)
                out = packed_cpu.packed_cpu(*leaves, *bounds, None, 0.0, causal, False, 0.3, None)
                found.append((out, *torch.autograd.grad((out * weight).sum(), leaves)))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    assert len(calls) == 2
