"""A whole encoder layer as one operation, against a layer written out in PyTorch and against its own separate parts."""

import contextlib
import dataclasses
import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F

from fastformer.ops.encoder_layer import encoder_layer, separate, why_not
from fastformer.ops.encoder_passes import LayerCall, LayerParameters, LayerSettings, LayerTokens
from fastformer.ops.random import draw_seed

D, WIDE, HEADS = 32, 48, 2
LENGTHS = (7, 1, 4)
PLAIN = LayerSettings(HEADS, 0.0, 0.0, 0.0, 1e-12, 1e-5)


@pytest.fixture(autouse=True)
def _needs_kernels(device, interpreting):
    if device.type != "cuda" and not interpreting:
        pytest.skip("one operation only where kernels run")


def _parameters(dtype, device, norm_bias=True):
    torch.manual_seed(0)
    joined, joined_bias = torch.randn(3 * D, D) * 0.2, torch.randn(3 * D) * 0.3
    made = {
        name: torch.randn(*shape) * scale + shift
        for name, shape, scale, shift in (
            ("out", (D, D), 0.2, 0), ("out_bias", (D,), 0.3, 0), ("norm", (D,), 0.1, 1), ("norm_bias", (D,), 0.1, 0),
            ("up", (WIDE, D), 0.2, 0), ("up_bias", (WIDE,), 0.3, 0), ("down", (D, WIDE), 0.2, 0),
            ("down_bias", (D,), 0.3, 0), ("last_norm", (D,), 0.1, 1), ("last_norm_bias", (D,), 0.1, 0),
        )
    }  # fmt: skip
    joined, joined_bias = joined.to(device, dtype), joined_bias.to(device, dtype)
    parts = dict(zip(("query", "key", "value"), joined.chunk(3), strict=True))
    parts |= dict(zip(("query_bias", "key_bias", "value_bias"), joined_bias.chunk(3), strict=True))
    parts |= {name: value.to(device, dtype) for name, value in made.items()}
    if not norm_bias:
        parts["last_norm_bias"] = None
    return LayerParameters(**{n: None if t is None else t.detach().requires_grad_() for n, t in parts.items()})


def _batch(packed, dtype, device):
    """Hidden states and tokens; a packed row has one surplus row."""
    torch.manual_seed(1)
    if packed:
        bounds = torch.tensor([0, *LENGTHS]).cumsum(0).to(device, torch.int32)
        hidden, tokens = torch.randn(1, sum(LENGTHS) + 1, D), LayerTokens(bounds, max(LENGTHS))
    else:
        mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
        hidden, tokens = torch.randn(*mask.shape, D), LayerTokens(mask=mask.to(device))
    return hidden.to(device, dtype).requires_grad_(), tokens


def _written_out(hidden, parameters, tokens):
    """The layer without dropout by PyTorch, sequence by sequence; surplus rows attend to nothing."""
    p = parameters
    if tokens.cu_seqlens is None:
        spans = [(i, 0, n) for i, n in enumerate(tokens.mask.sum(1).tolist())]
    else:
        bounds = tokens.cu_seqlens.tolist()
        spans = [(0, a, b) for a, b in itertools.pairwise(bounds)]
    q, k, v = (
        F.linear(hidden, w, b).unflatten(-1, (HEADS, -1))
        for w, b in ((p.query, p.query_bias), (p.key, p.key_bias), (p.value, p.value_bias))
    )
    mixed = torch.zeros_like(q)
    for row, a, b in spans:
        end = b if tokens.mask is None else hidden.shape[1]  # padded queries attend to the sequence's real keys too
        scores = torch.einsum("qhd,khd->hqk", q[row, a:end], k[row, a:b]) * q.shape[-1] ** -0.5
        mixed[row, a:end] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[row, a:b])
    y = F.layer_norm(hidden + F.linear(mixed.flatten(2), p.out, p.out_bias), (D,), p.norm, p.norm_bias, PLAIN.eps)
    branch = F.linear(F.gelu(F.linear(y, p.up, p.up_bias)), p.down, p.down_bias)
    return F.layer_norm(y + branch, (D,), p.last_norm, p.last_norm_bias, PLAIN.last_eps)


def _products_in(dtype, device):
    """Autocast to a dtype, or nothing."""
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def _gradients(out, leaves, weight):
    return torch.autograd.grad((out * weight).sum(), [x for x in leaves if x is not None], retain_graph=True)


@pytest.mark.parametrize(
    ("packed", "dtype", "norm_bias", "lower"),
    [
        (True, torch.float16, True, None),
        (False, torch.float16, False, None),
        (True, torch.float32, False, None),
        (True, torch.float32, True, torch.float16),
        (False, torch.float32, False, torch.float16),
    ],
)
def test_equals_the_layer_written_out(device, packed, dtype, norm_bias, lower):
    hidden, tokens = _batch(packed, dtype, device)
    parameters = _parameters(dtype, device, norm_bias)
    with _products_in(lower, device):
        assert why_not(hidden, parameters) == ""
    # What no sequence holds takes no gradient; it must not disturb either.
    seen = torch.ones(hidden.shape[:2], device=device) if tokens.mask is None else tokens.mask.to(hidden.dtype)
    if packed:
        seen[0, -1] = 0
    seen = seen.to(dtype)[..., None]
    weight = torch.randn(hidden.shape, device=device) * seen
    results = []
    for kind in (torch.float64, dtype):
        twin = [None if t is None else t.detach().to(kind).requires_grad_() for t in (hidden, *parameters)]
        with _products_in(lower if kind == dtype else None, device):
            out = _written_out(twin[0], LayerParameters(*twin[1:]), tokens)
        results.append([out * seen, *_gradients(out, twin, weight.to(kind))])
    with _products_in(lower, device):
        out = encoder_layer(hidden, parameters, PLAIN, tokens, True)
    ours = [out * seen, *_gradients(out, (hidden, *parameters), weight.to(dtype))]
    gold, stock = results
    eps = torch.finfo(lower or dtype).eps
    for g, s, o in zip(gold, stock, ours, strict=True):
        assert o.dtype == dtype
        allowed = 2 * (s.double() - g).abs().max() + 8 * eps * g.abs().max().clamp(min=1)
        assert (o.double() - g).abs().max() <= allowed


@pytest.mark.parametrize("lower", [None, torch.float16])
def test_large_activations_are_made_again(device, monkeypatch, lower):
    """The same gradients, bit for bit and under dropout, with less kept: no output of GELU, no sum after attention, nor
    its norm and statistics, and, if it was rounded, no input."""
    dtype = torch.float32 if lower else torch.float16
    hidden, tokens = _batch(True, dtype, device)
    parameters = _parameters(dtype, device)
    weight, results, kept = torch.randn_like(hidden), [], []
    for most in (1 << 23, 0):
        monkeypatch.setattr("fastformer.ops.encoder_passes.MOST_KEPT", most)
        count = []
        torch.manual_seed(3)
        with (
            torch.autograd.graph.saved_tensors_hooks(lambda t, into=count: into.append(t.shape) or t, lambda t: t),
            _products_in(lower, device),
        ):
            out = encoder_layer(hidden, parameters, dataclasses.replace(PLAIN, dropout=0.3), tokens, True)
        kept.append(len(count))
        results.append(_gradients(out, (hidden, *parameters), weight))
    assert kept[0] - kept[1] == (4 if lower is None else 5)
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("lower", [None, torch.float16])
def test_products_formed_one_by_one(device, monkeypatch, lower):
    """Wide layers' weight gradients are PyTorch's products, rounded as the others' are."""
    dtype = torch.float32 if lower else torch.float16
    hidden, tokens = _batch(True, dtype, device)
    parameters = _parameters(dtype, device)
    results = []
    for most in (8.0, 0.0):
        monkeypatch.setattr("fastformer.ops.encoder_passes.MOST_WAVES", most)
        with _products_in(lower, device):
            out = encoder_layer(hidden, parameters, PLAIN, tokens, True)
        results.append(_gradients(out, (hidden, *parameters), torch.ones_like(out)))
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype == dtype
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("lower", [None, torch.float16])
def test_backward_does_not_hang_on_autocast_around_it(device, lower):
    hidden, tokens = _batch(True, torch.float32, device)
    parameters = _parameters(torch.float32, device)
    results = []
    for around in (None, torch.float16):
        with _products_in(lower, device):
            out = encoder_layer(hidden, parameters, PLAIN, tokens, True)
        with _products_in(around, device):
            results.append(_gradients(out, (hidden, *parameters), torch.ones_like(out)))
            assert torch.is_autocast_enabled(device.type) == (around is not None)
    assert all(map(torch.equal, *results))


def test_autocast_leaves_the_residual_stream_alone(device):
    """Branches of zeros add nothing: what is left, both norms and their gradients, is as exact as without autocast."""
    hidden, tokens = _batch(False, torch.float32, device)
    parameters = _parameters(torch.float32, device)
    with torch.no_grad():
        for name in ("out", "out_bias", "down", "down_bias"):
            getattr(parameters, name).zero_()
    leaves, results = (hidden, parameters.norm, parameters.last_norm_bias), []
    weight = torch.randn_like(hidden)
    for lower in (None, torch.float16):
        with _products_in(lower, device):
            out = encoder_layer(hidden, parameters, PLAIN, tokens, True)
        results.append([out, *_gradients(out, leaves, weight)])
    for plain, under in zip(*results, strict=True):
        torch.testing.assert_close(under, plain, rtol=1e-6, atol=1e-6)


def test_the_innermost_autocast_counts(device):
    hidden, tokens = _batch(True, torch.float32, device)
    parameters = _parameters(torch.float32, device)
    plain = encoder_layer(hidden, parameters, PLAIN, tokens, True)
    with _products_in(torch.float16, device):
        lower = encoder_layer(hidden, parameters, PLAIN, tokens, True)
        with torch.autocast(device.type, enabled=False), torch.no_grad():
            assert torch.equal(encoder_layer(hidden, parameters, PLAIN, tokens, True), plain)
        with torch.no_grad():
            assert torch.equal(encoder_layer(hidden, parameters, PLAIN, tokens, False), lower)
    with torch.autocast(device.type, enabled=False), _products_in(torch.float16, device):
        assert torch.equal(encoder_layer(hidden, parameters, PLAIN, tokens, True), lower)
    assert not torch.equal(lower, plain)


@pytest.mark.parametrize("lower", [None, torch.float16])
def test_dropout_and_the_second_derivative_are_those_of_the_separate_operators(device, lower):
    settings = LayerSettings(HEADS, 0.2, 0.3, 0.4, 1e-12, 1e-5)
    hidden, tokens = _batch(True, torch.float32, device)
    parameters = _parameters(torch.float32, device)
    leaves, weight = (hidden, *parameters), torch.randn_like(hidden)
    call = LayerCall(settings, tokens, (0.2, 0.3, 0.4), (), lower or torch.float32)
    rough = 1 if lower is None else 2e3  # times rounding
    with _products_in(lower, device):
        torch.manual_seed(3)
        ours = encoder_layer(hidden, parameters, settings, tokens, True)
        torch.manual_seed(3)
        parts = separate(hidden, parameters, call._replace(seeds=[draw_seed(device) for _ in range(3)]))
    torch.testing.assert_close(ours, parts, rtol=1e-5 * rough, atol=1e-5 * rough)
    firsts, seconds = [_gradients(out, leaves, weight) for out in (ours, parts)], []
    for a, b in zip(*firsts, strict=True):
        assert (a - b).norm() <= 1e-5 * rough * b.norm().clamp(min=1)
    for out in (ours, parts):
        # Each operator says once a process that PyTorch computes this.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            (first,) = torch.autograd.grad((out * weight).sum(), hidden, create_graph=True)
        seconds.append(torch.autograd.grad(first.square().sum(), (hidden, parameters.up)))
    for a, b in zip(*seconds, strict=True):
        assert (a - b).norm() <= 1e-4 * rough * b.norm().clamp(min=1)


def test_only_what_needs_a_gradient_gets_one(device):
    hidden, tokens = _batch(True, torch.float16, device)
    whole = _gradients(
        encoder_layer(hidden, _parameters(torch.float16, device), PLAIN, tokens, True),
        [hidden],
        torch.ones_like(hidden),
    )
    for trained in (("key", "value_bias", "norm_bias"), ("last_norm", "down_bias")):
        parameters = _parameters(torch.float16, device)
        for name, parameter in parameters._asdict().items():
            parameter.requires_grad_(name in trained)
        wanted = [getattr(parameters, name) for name in trained]
        out = encoder_layer(hidden, parameters, PLAIN, tokens, True)
        found = _gradients(out, [*wanted, hidden], torch.ones_like(out))
        assert torch.equal(found[-1], whole[0])
        assert all(g.abs().sum() > 0 for g in found)
    # The input takes none, as above a frozen embedding.
    out = encoder_layer(hidden.detach(), parameters, PLAIN, tokens, True)
    for a, b in zip(_gradients(out, wanted, torch.ones_like(out)), found[:-1], strict=True):
        assert torch.equal(a, b)
    with torch.no_grad():
        assert not encoder_layer(hidden, _parameters(torch.float16, device), PLAIN, tokens, False).requires_grad


def test_says_what_it_does_not_take(device):
    hidden, _ = _batch(True, torch.float32, device)
    parameters = _parameters(torch.float32, device)
    assert "another dtype" in why_not(hidden, parameters._replace(up=parameters.up.half()))
    assert "layout" in why_not(hidden, parameters._replace(up=parameters.up.t().contiguous().t()))
    assert "without kernels" in why_not(hidden.double(), parameters)
    assert "no tokens" in why_not(hidden[:, :0], parameters)
    assert "biases" in why_not(hidden, parameters._replace(up_bias=parameters.up_bias.half()))
    with torch.autocast(device.type, torch.bfloat16):
        assert why_not(hidden, parameters) == ""
        halves = [None if t is None else t.bfloat16() for t in (hidden, *parameters)]
        assert "autocast of what is not float32" in why_not(halves[0], LayerParameters(*halves[1:]))
    found = []
    torch.func.vmap(lambda x: (found.append(why_not(x, parameters)), x)[1])(hidden[None])
    assert "torch.func" in found[0]
