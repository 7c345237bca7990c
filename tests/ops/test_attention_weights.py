"""attention_weights: the maps of every kind of call, their derivatives, and what the caller may get wrong."""

import math
import random

import pytest
import torch
from attention_oracle import oracle, place, random_case

from fastformer.ops import attention_varlen, attention_weights, scaled_dot_product_attention


def maps_by_definition(query, key, options, keep, **extras):
    """The oracle with the identity as values."""
    batch, kv_heads, k_len = key.shape[:3]
    eye = torch.eye(k_len, dtype=query.dtype, device=query.device).expand(batch, kv_heads, k_len, k_len)
    return oracle(query, key, eye, options=options, keep=keep, **extras)[0]


def keep_mask(case, device):
    from test_attention import keep_mask as mask

    if "dropout_seed" not in case.extras:
        return None
    query, key = case.tensors["query"], case.tensors["key"]
    return mask(case.extras["dropout_seed"], *query.shape[:3], key.shape[2], case.options["dropout_p"], device)


def assert_near(ours, exact, dtype, name):
    assert ours.shape == exact.shape, name
    assert ours.isfinite().all(), name
    scale = max(1.0, exact.abs().max().item()) if exact.numel() else 1.0
    worst = (ours.double() - exact).abs().max().item() if exact.numel() else 0.0
    assert worst <= 300 * torch.finfo(dtype).eps * scale, f"{name}: {worst:.2e} at a scale of {scale:.2e}"


def check_maps(number, device, dtypes):
    """Maps and gradients of one random call against float64; the LSE is the exact one, and a leaf."""
    case = random_case(number, device, dtypes, longest=40)
    pick = random.Random(number)
    average = pick.random() < 0.5
    length = case.tensors["query"].shape[2]
    rows = None if pick.random() < 0.5 else torch.tensor([pick.randrange(length) for _ in range(5)], device=device)
    keep = keep_mask(case, device)
    leaves = {k: v for k, v in case.tensors.items() if k != "value"}
    sinks = leaves.pop("sinks", None)
    given = {k: v for k, v in case.extras.items() if k == "attn_mask"}
    exact = {k: v.detach().double().requires_grad_() for k, v in leaves.items()}
    wide_sinks = None if sinks is None else sinks.double()
    expected = maps_by_definition(**exact, **given, options=case.options, keep=keep, sinks=wide_sinks)
    value = case.tensors["value"].double()
    with torch.no_grad():
        _, lse = oracle(**exact, **given, value=value, options=case.options, sinks=wide_sinks)
    lse = lse.float().requires_grad_()
    tensors = {k: v.detach().requires_grad_() for k, v in leaves.items()}
    extras = {k: v for k, v in case.extras.items() if k == "dropout_seed"}
    ours = attention_weights(**tensors, **given, **extras, lse=lse, average_heads=average, rows=rows, **case.options)
    expected = expected if rows is None else expected[:, :, rows]
    expected = expected.mean(1) if average else expected
    assert_near(ours.detach(), expected.detach(), torch.float32, f"maps of {case}")
    sent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(number)).to(device)
    found = torch.autograd.grad((ours * sent).sum(), [*tensors.values(), lse])
    # The definition normalises by itself: its derivative is ours with the LSE's derivative sent on.
    _, through = oracle(**exact, **given, value=value, options=case.options, sinks=wide_sinks)
    lse_sent = torch.where(through == -math.inf, 0.0, found[-1].double())
    total = torch.autograd.grad((expected * sent).sum(), list(exact.values()), allow_unused=True)
    chained = torch.autograd.grad(
        torch.where(through == -math.inf, 0.0, through), list(exact.values()), lse_sent, allow_unused=True
    )
    for name, mine, whole, part in zip(tensors, found, total, chained, strict=False):
        zero = torch.zeros_like(mine, dtype=torch.float64)
        want = (zero if whole is None else whole) - (zero if part is None else part)
        scale = case.tensors["query"].double().abs().max().item() * case.tensors["query"].shape[2] ** 0.5
        assert mine.dtype == tensors[name].dtype
        assert_near(mine / max(1.0, scale), want / max(1.0, scale), mine.dtype, f"gradient of {name} of {case}")


def dtypes_here(interpreting):
    return [torch.float32, torch.float16] + ([] if interpreting else [torch.bfloat16])


@pytest.mark.parametrize("number", range(16))
def test_fuzz(number, device, interpreting, poisoned):
    check_maps(number, device, dtypes_here(interpreting))


@pytest.mark.slow
@pytest.mark.parametrize("block", range(10))
def test_fuzz_at_length(block, device, interpreting):
    numbers = range(1000 + 40 * block, 1000 + 40 * block + (6 if interpreting else 40))
    failures = []
    for number in numbers:
        try:
            check_maps(number, device, dtypes_here(interpreting))
        except AssertionError as error:
            failures.append(f"check_maps({number}): {error}")
    assert not failures, "\n".join(failures)


@pytest.mark.parametrize("average_heads", [True, False])
@pytest.mark.parametrize("rows", [None, [3, 0, 12]])
def test_packed_maps_are_those_of_each_sequence(average_heads, rows, device, poisoned):
    lengths = [9, 0, 17]
    bounds = torch.tensor([0, 9, 9, 26], dtype=torch.int32, device=device)
    generator = torch.Generator().manual_seed(3)
    pick = random.Random(3)
    packed = [place((1, n, 29, 16), torch.float32, pick, generator, device)[0].transpose(0, 1) for n in (4, 2, 2)]
    leaves = [x.detach().requires_grad_() for x in packed]
    slopes = torch.rand(4, generator=generator).to(device)
    mask = (torch.rand(1, 4, 17, 17, generator=generator) < 0.8).to(device)
    seed = torch.tensor([5], device=device)
    options = {"is_causal": True, "enable_gqa": True, "alibi_slopes": slopes, "attn_mask": mask}
    _, lse = attention_varlen(*leaves, bounds, bounds, 17, 17, return_lse=True, **options)
    index = None if rows is None else torch.tensor(rows, device=device)
    ours = attention_weights(
        *leaves[:2], lse, average_heads=average_heads, rows=index, cu_seqlens_q=bounds, cu_seqlens_k=bounds,
        max_seqlen_q=17, max_seqlen_k=17, dropout_p=0.3, dropout_seed=seed, **options,
    )  # fmt: skip
    expected = torch.zeros(3, 4, 17, 17, device=device)
    for i, n in enumerate(lengths):
        start = sum(lengths[:i])
        q, k = (x[start : start + n].transpose(0, 1)[None] for x in leaves[:2])
        from test_attention import keep_mask as kept

        # Dropout counts planes over the whole batch: sequence i takes those of its own.
        keep = kept(5, 3, 4, 17, 17, 0.3, device)[i : i + 1, :, :n, :n]
        part = maps_by_definition(
            q, k, {"is_causal": True, "dropout_p": 0.3}, keep, alibi_slopes=slopes, attn_mask=mask[:, :, :n, :n]
        )
        expected[i, :, :n, :n] = part[0]
    if rows is not None:
        expected = expected[:, :, rows]
    expected = expected.mean(1) if average_heads else expected
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    sent = torch.randn(expected.shape, generator=generator).to(device)
    grads = [torch.autograd.grad((x * sent).sum(), leaves[:2], retain_graph=True) for x in (ours, expected)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
        assert (a[26:] == 0).all()


@pytest.mark.filterwarnings("ignore:fastformer attention")
def test_second_derivative(device):
    query, key = (torch.randn(1, 2, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    lse = torch.full((1, 2, 3), 2.0, dtype=torch.float64, requires_grad=True)

    def maps(q, k, n):
        return attention_weights(q, k, n, is_causal=True)

    assert torch.autograd.gradgradcheck(maps, (query, key, lse))
    assert torch.autograd.gradcheck(maps, (query, key, lse), check_forward_ad=True)


def test_compiles_to_one_graph(device):
    query, key, value = (torch.randn(1, 2, 9, 16, device=device, requires_grad=True) for _ in range(3))

    def call(q, k, v):
        out, lse = scaled_dot_product_attention(q, k, v, is_causal=True, softcap=5.0, return_lse=True)
        return out, attention_weights(q, k, lse, is_causal=True, softcap=5.0)

    eager = call(query, key, value)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(query, key, value)
    torch.testing.assert_close(compiled, eager)
    grads = [torch.autograd.grad(o[0].sum() + o[1].square().sum(), (query, key, value)) for o in (eager, compiled)]
    torch.testing.assert_close(*grads)


def test_bad_input_is_named(device):
    query = torch.zeros(2, 4, 6, 8)
    lse = torch.zeros(2, 4, 6)
    bounds = torch.tensor([0, 2, 6], dtype=torch.int32)
    with pytest.raises(ValueError, match="lse must have shape"):
        attention_weights(query, query, lse[..., :5])
    with pytest.raises(ValueError, match="key must have query's batch size 2"):
        attention_weights(query, query[:1], lse)
    with pytest.raises(ValueError, match="dropout_seed must be the one of the call"):
        attention_weights(query, query, lse, dropout_p=0.1)
    with pytest.raises(TypeError, match="rows must be one of int64"):
        attention_weights(query, query, lse, rows=torch.zeros(2))
    with pytest.raises(ValueError, match="must both be given"):
        attention_weights(query[0].transpose(0, 1), query[0].transpose(0, 1), lse[0].t(), cu_seqlens_q=bounds)


def test_multihead_attention_trains_through_its_weights(device, interpreting):
    """The module's own path around these maps; where the kernels run."""
    if device.type == "cpu" and not interpreting:
        pytest.skip("torch.nn's own path runs there")
    from fastformer import nn as fnn

    torch.manual_seed(0)
    stock = torch.nn.MultiheadAttention(16, 2, batch_first=True).to(device)
    ours = fnn.MultiheadAttention(16, 2, batch_first=True).to(device)
    ours.load_state_dict(stock.state_dict())
    x = torch.randn(2, 9, 16, device=device)
    padding = torch.arange(9, device=device) >= torch.tensor([[9], [6]], device=device)
    fnn.reset_count()
    results = []
    for module in (stock, ours):
        out, weights = module(x, x, x, key_padding_mask=padding)
        loss = out.square().sum() + weights.square().sum()
        results.append((out, weights, *torch.autograd.grad(loss, list(module.parameters()))))
    assert fnn.count().fused
    assert not fnn.count().fallback
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    ours.dropout = 0.5
    value = torch.eye(9, device=device).expand(2, 9, 9)
    with torch.no_grad():
        identity = torch.eye(16, device=device)
        ours.in_proj_weight[32:], ours.out_proj.weight[:] = identity, identity
        ours.in_proj_bias[32:], ours.out_proj.bias[:] = 0.0, 0.0
        padded = torch.nn.functional.pad(value, (0, 7))
        out, weights = ours(x, x, padded, average_attn_weights=False)
    # With one-hot values the output of a head is what dropout left of its weights.
    torch.testing.assert_close(out[..., :8], weights[:, 0, :, :8], rtol=1e-5, atol=1e-6)
    assert 0.2 < (weights == 0).float().mean() < 0.8
