"""scaled_dot_product_attention: every option against the definition, and what must never happen."""

import math

import pytest
import torch
import torch.nn.functional as F
from attention_oracle import check, oracle, random_case

from fastformer.ops.attention import scaled_dot_product_attention
from fastformer.ops.random import philox_keep


def keep_mask(seed, batch, heads, q_len, k_len, p, device):
    plane = torch.arange(batch * heads).view(batch, heads, 1, 1)
    row, column = torch.arange(q_len).view(-1, 1), torch.arange(k_len)
    return philox_keep(int(seed), column, row, plane, p, draws=4).to(device)


def check_dense(case):
    keep = None
    if "dropout_seed" in case.extras:
        query, key = case.tensors["query"], case.tensors["key"]
        keep = keep_mask(
            case.extras["dropout_seed"], *query.shape[:3], key.shape[2], case.options["dropout_p"], query.device
        )

    def ours(attn_mask=case.extras.get("attn_mask"), **tensors):
        extras = {k: v for k, v in case.extras.items() if k != "attn_mask"}
        return scaled_dot_product_attention(**tensors, attn_mask=attn_mask, **extras, **case.options, return_lse=True)

    def theirs(attn_mask=case.extras.get("attn_mask"), **tensors):
        return oracle(
            **tensors,
            attn_mask=attn_mask,
            options=case.options,
            keep=keep,
        )

    check(case, ours, theirs)


def dtypes_here(interpreting):
    # The interpreter computes bf16 wrongly.
    return [torch.float32, torch.float16] + ([] if interpreting else [torch.bfloat16])


@pytest.mark.parametrize("number", range(48))
def test_fuzz(number, device, interpreting, poisoned):
    check_dense(random_case(number, device, dtypes_here(interpreting)))


@pytest.mark.slow
@pytest.mark.parametrize("block", range(20))
def test_fuzz_at_length(block, device, interpreting):
    """2,000 more; the interpreter takes 15 of every 100."""
    numbers = range(1000 + 100 * block, 1000 + 100 * block + (15 if interpreting else 100))
    failures = []
    for number in numbers:
        try:
            check_dense(random_case(number, device, dtypes_here(interpreting)))
        except AssertionError as error:
            failures.append(str(error))
    assert not failures, "\n".join(failures)


def qkv(device, *shape, kv_len=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    batch, heads, length, dim = shape
    return [
        torch.randn(batch, heads, n, dim, generator=generator).to(device).requires_grad_()
        for n in (length, kv_len or length, kv_len or length)
    ]


@pytest.mark.parametrize(
    ("mask", "options"),
    [
        (None, {}),
        (None, {"is_causal": True}),
        ("key", {}),
        ("bool", {}),
        ("float", {}),
    ],
)
def test_is_stock_for_stock_calls(mask, options, device):
    query, key, value = qkv(device, 2, 3, 19, 16)
    attn_mask = {
        "key": torch.arange(19).expand(2, 19)[:, None, None] < torch.tensor([7, 19])[:, None, None, None],
        "bool": torch.rand(2, 1, 19, 19) < 0.7,
        "float": torch.randn(19, 19),
    }.get(mask)
    attn_mask = None if attn_mask is None else attn_mask.to(device)
    ours = scaled_dot_product_attention(query, key, value, attn_mask, **options)
    stock = F.scaled_dot_product_attention(query, key, value, attn_mask, **options)
    torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-6)
    grad = torch.randn_like(stock)
    for a, b in zip(
        torch.autograd.grad(ours, (query, key, value), grad),
        torch.autograd.grad(stock, (query, key, value), grad),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("kind", ["key", "bool", "causal", "window"])
def test_hidden_values_never_leak(kind, poison, device):
    length = 37
    query, key, value = (t.detach() for t in qkv(device, 1, 2, length, 16))
    options, mask = {}, None
    hidden_from = 21
    rows = slice(None)
    if kind == "key":
        mask = (torch.arange(length, device=device) < hidden_from).view(1, 1, 1, -1)
    elif kind == "bool":
        mask = (torch.arange(length, device=device) < hidden_from).expand(length, length)
    else:
        options = {"is_causal": True} if kind == "causal" else {"window": (None, 0)}
        rows = slice(hidden_from)  # only these rows see none of the poisoned keys
    results = []
    for bad in (0.0, poison):
        leaves = [t.clone() for t in (query, key, value)]
        for t in leaves[1:]:
            t[:, :, hidden_from:] = bad
        for t in leaves:
            t.requires_grad_()
        out = scaled_dot_product_attention(*leaves, mask, **options)
        (dq,) = torch.autograd.grad(out[:, :, rows].sum(), leaves[0], retain_graph=True)
        results.append((out[:, :, rows], dq[:, :, rows]))
        if kind in ("key", "bool"):
            results[-1] += torch.autograd.grad(out.sum(), leaves[1:])
    for clean, dirty in zip(*results, strict=True):
        assert dirty.isfinite().all()
        torch.testing.assert_close(dirty, clean, rtol=1e-5, atol=1e-6)


def test_visible_nan_is_not_hidden(device):
    query, key, value = qkv(device, 1, 1, 20, 16)
    with torch.no_grad():
        value[0, 0, 5, 3] = math.nan
    out = scaled_dot_product_attention(query, key, value, is_causal=True)
    assert out[0, 0, 5:].isnan().any(-1).all()
    assert out[0, 0, :5].isfinite().all()


def test_rows_with_nothing_to_attend_to(device):
    query, key, value = qkv(device, 2, 2, 18, 16)
    mask = torch.rand(2, 1, 18, 18) < 0.5
    mask[:, :, 4] = False
    mask[1] = False
    out, lse = scaled_dot_product_attention(query, key, value, mask.to(device), return_lse=True)
    assert (out[1] == 0).all()
    assert (out[:, :, 4] == 0).all()
    assert (lse[1] == -math.inf).all()
    grads = torch.autograd.grad(out.square().sum(), (query, key, value))
    assert all(g.isfinite().all() and (g[1] == 0).all() for g in grads)
    assert (grads[0][:, :, 4] == 0).all()


def test_dropout_repeats_from_its_seed(device):
    query, key, value = qkv(device, 1, 2, 33, 16)
    seed = torch.tensor([7], device=device)
    call = lambda s: scaled_dot_product_attention(query, key, value, dropout_p=0.5, dropout_seed=s)  # noqa: E731
    assert torch.equal(call(seed), call(seed))
    assert not torch.equal(call(seed), call(seed + 1))
    torch.manual_seed(3)
    first = scaled_dot_product_attention(query, key, value, dropout_p=0.5)
    assert not torch.equal(first, scaled_dot_product_attention(query, key, value, dropout_p=0.5))
    torch.manual_seed(3)
    assert torch.equal(first, scaled_dot_product_attention(query, key, value, dropout_p=0.5))


def test_same_bits_every_time(device):
    query, key, value = qkv(device, 2, 2, 50, 16)

    def once():
        out = scaled_dot_product_attention(query, key, value, is_causal=True)
        return [out, *torch.autograd.grad(out.sum(), (query, key, value))]

    first = once()
    for _ in range(250 if device.type == "cuda" else 3):
        assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))


def test_rank_three_is_one_batch(device):
    query, key, value = (t[0] for t in qkv(device, 1, 2, 9, 16))
    out, lse = scaled_dot_product_attention(query, key, value, return_lse=True)
    batched = scaled_dot_product_attention(query[None], key[None], value[None])
    torch.testing.assert_close(out, batched[0])
    assert lse.shape == (2, 9)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"query": "text"}, TypeError, "query must be a tensor"),
        ({"key": torch.zeros(2, 4, 6, 9)}, ValueError, "key must have query's head dimension 8"),
        ({"value": torch.zeros(2, 4, 5, 8)}, ValueError, "value must have key's shape"),
        ({"key": torch.zeros(2, 2, 6, 8), "value": torch.zeros(2, 2, 6, 8)}, ValueError, "enable_gqa"),
        ({"key": torch.zeros(2, 4, 6, 8).half()}, TypeError, "key must have query's dtype"),
        ({"query": torch.zeros(2, 4, 6, 8).long()}, TypeError, "query must be one of"),
        ({"attn_mask": torch.zeros(5, 6)}, ValueError, "attn_mask must be 2-D to 4-D and broadcast"),
        ({"attn_mask": torch.zeros(6, 6).long()}, TypeError, "attn_mask must be one of"),
        ({"dropout_p": 1.5}, ValueError, "dropout_p must be between 0 and 1"),
        ({"causal_alignment": "left"}, ValueError, "causal_alignment must be"),
        ({"window": 3}, TypeError, "window must be a pair"),
        ({"window": (1, -3)}, ValueError, "window's right side"),
        ({"softcap": 0.0}, ValueError, "softcap must be a positive number"),
        ({"scale": math.inf}, ValueError, "scale must be finite"),
        ({"alibi_slopes": torch.zeros(3)}, ValueError, "alibi_slopes must have shape"),
        ({"sinks": torch.zeros(3)}, ValueError, "sinks must have shape"),
        ({"dropout_seed": torch.zeros(1)}, TypeError, "dropout_seed must be one of int64"),
    ],
)
def test_bad_input_is_named(change, error, words):
    call = {"query": torch.zeros(2, 4, 6, 8), "key": torch.zeros(2, 4, 6, 8), "value": torch.zeros(2, 4, 6, 8)} | change
    with pytest.raises(error, match=words):
        scaled_dot_product_attention(**call)
