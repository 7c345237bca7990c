"""fastformer.nn against torch.nn: results, gradients, state_dict, errors, and that the fused path really ran."""

import copy
import pickle

import pytest
import torch

import fastformer as ff
import fastformer.nn as fnn

B, S, E, H = 3, 7, 24, 4


def pair(stock_class, ours_class, *args, **kwargs):
    torch.manual_seed(0)
    stock = stock_class(*args, **kwargs)
    torch.manual_seed(0)
    ours = ours_class(*args, **kwargs)
    for (name, p), (other, q) in zip(stock.state_dict().items(), ours.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(p, q), f"{name} is initialised differently"
    with torch.no_grad():
        for p, q in zip(stock.parameters(), ours.parameters(), strict=True):
            q.copy_(p.add_(torch.randn_like(p) * 0.05))
    return stock, ours


def assert_same(stock, ours, inputs, call):
    leaves = [[t.clone().requires_grad_() for t in inputs] for _ in range(2)]
    a, b = call(stock, *leaves[0]), call(ours, *leaves[1])
    torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)
    grad = torch.randn_like(a)
    a.backward(grad)
    b.backward(grad)
    pairs = [(x.grad, y.grad) for x, y in zip(*leaves, strict=True)]
    pairs += [(p.grad, q.grad) for p, q in zip(stock.parameters(), ours.parameters(), strict=True)]
    for x, y in pairs:
        torch.testing.assert_close(y, x, rtol=1e-4, atol=2e-6)


CAUSAL = torch.ones(S, S, dtype=torch.bool).triu(1)
PADDED = torch.tensor([[False] * S, [False] * 4 + [True] * 3, [False] + [True] * 6])
MASKS = {
    "none": {},
    "padding": {"key_padding_mask": PADDED},
    "causal": {"attn_mask": CAUSAL},
    "causal hint": {"attn_mask": CAUSAL, "is_causal": True},
    "causal and padding": {"attn_mask": CAUSAL, "key_padding_mask": PADDED, "is_causal": True},
    "float": {"attn_mask": torch.linspace(-1, 1, S * S).view(S, S)},
    "per head": {"attn_mask": torch.linspace(-1, 1, B * H * S * S).view(B * H, S, S)},
    "float padding": {"key_padding_mask": torch.linspace(-2, 0, B * S).view(B, S)},
    "float both": {
        "attn_mask": torch.linspace(-1, 1, S * S).view(S, S),
        "key_padding_mask": torch.zeros(B, S).masked_fill(PADDED, float("-inf")),
    },
}


@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_attention_equals_stock(masks, batch_first, training):
    stock, ours = pair(torch.nn.MultiheadAttention, fnn.MultiheadAttention, E, H, batch_first=batch_first)
    stock.train(training)
    ours.train(training)
    x = torch.randn(B, S, E) if batch_first else torch.randn(S, B, E)
    fnn.reset_count()
    assert_same(stock, ours, [x], lambda m, x: m(x, x, x, need_weights=False, **masks)[0])
    assert fnn.count().fused["MultiheadAttention"] == 1


def test_cross_attention_and_unbatched():
    stock, ours = pair(torch.nn.MultiheadAttention, fnn.MultiheadAttention, E, H, bias=False)
    q, kv = torch.randn(5, B, E), torch.randn(S, B, E)
    assert_same(stock, ours, [q, kv], lambda m, q, kv: m(q, kv, kv, need_weights=False, key_padding_mask=PADDED)[0])
    assert_same(stock, ours, [q, kv, kv * 2], lambda m, q, k, v: m(q, k, v, need_weights=False)[0])
    q, kv = torch.randn(5, E), torch.randn(S, E)
    fnn.reset_count()
    mask = PADDED[1]
    assert_same(stock, ours, [q, kv], lambda m, q, kv: m(q, kv, kv, need_weights=False, key_padding_mask=mask)[0])
    assert fnn.count().fused["MultiheadAttention"] == 1


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"kdim": 10, "vdim": 12}, "kdim or vdim differ from embed_dim"),
        ({"add_bias_kv": True}, "add_bias_kv"),
        ({"add_zero_attn": True}, "add_zero_attn"),
    ],
)
def test_what_is_not_fused_is_stock_and_counted(options, reason):
    stock, ours = pair(torch.nn.MultiheadAttention, fnn.MultiheadAttention, E, H, **options)
    q, k, v = torch.randn(5, B, E), torch.randn(S, B, ours.kdim), torch.randn(S, B, ours.vdim)
    fnn.reset_count()
    assert_same(stock, ours, [q, k, v], lambda m, q, k, v: m(q, k, v, need_weights=False)[0])
    assert fnn.count().fallback["MultiheadAttention", reason] == 1
    assert not fnn.count().fused


def test_weights_equal_stock():
    stock, ours = pair(torch.nn.MultiheadAttention, fnn.MultiheadAttention, E, H)
    x = torch.randn(S, B, E)
    for average in (True, False):
        a, b = (m(x, x, x, average_attn_weights=average) for m in (stock, ours))
        torch.testing.assert_close(a, b)


def test_a_fully_padded_sequence_gives_the_bias_and_finite_gradients():
    _, ours = pair(torch.nn.MultiheadAttention, fnn.MultiheadAttention, E, H, batch_first=True)
    x = torch.randn(B, S, E, requires_grad=True)
    padding = PADDED.clone()
    padding[2] = True
    out = ours(x, x, x, key_padding_mask=padding, need_weights=False)[0]
    torch.testing.assert_close(out[2], ours.out_proj.bias.expand(S, E))
    out.sum().backward()
    assert torch.isfinite(x.grad).all()
    assert torch.all(x.grad[2] == 0)


def test_attention_errors_are_stocks():
    _, ours = pair(torch.nn.MultiheadAttention, fnn.MultiheadAttention, E, H)
    x = torch.randn(S, B, E)
    with pytest.raises(RuntimeError, match="is_causal hint"):
        ours(x, x, x, need_weights=False, is_causal=True)
    with pytest.raises(AssertionError):
        ours(x, x[0], x, need_weights=False)
    with pytest.raises(TypeError, match="masks must be bool or floating point"):
        ours(x, x, x, need_weights=False, attn_mask=torch.ones(S, S, dtype=torch.int64))


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu", torch.tanh])
@pytest.mark.parametrize("masks", [{}, {"src_key_padding_mask": PADDED}, {"src_mask": CAUSAL, "is_causal": True}])
def test_encoder_layer_equals_stock(norm_first, activation, masks):
    stock, ours = pair(
        torch.nn.TransformerEncoderLayer,
        fnn.TransformerEncoderLayer,
        E,
        H,
        dim_feedforward=40,
        dropout=0.0,
        activation=activation,
        batch_first=True,
        norm_first=norm_first,
    )
    fnn.reset_count()
    assert_same(stock.train(), ours.train(), [torch.randn(B, S, E)], lambda m, x: m(x, **masks))
    assert fnn.count().fused == {"TransformerEncoderLayer": 1, "MultiheadAttention": 1}
    assert not fnn.count().fallback


def test_encoder_layer_drops_like_stock_and_hooks_run():
    ours = fnn.TransformerEncoderLayer(E, H, dim_feedforward=40, dropout=0.5, batch_first=True)
    x = torch.randn(B, S, E)
    assert not torch.equal(ours(x), ours(x))
    ours.eval()
    assert torch.equal(ours(x), ours(x))
    seen = []
    ours.norm1.register_forward_hook(lambda *a: seen.append(1))
    fnn.reset_count()
    ours(x)
    assert seen == [1]
    assert sum(fnn.count().fallback.values()) == 1


def test_add_layer_norm_and_layer_norm():
    norm, ours = torch.nn.LayerNorm(E), fnn.AddLayerNorm(E, dropout=0.3)
    ours.load_state_dict(norm.state_dict())
    x, r = torch.randn(B, S, E), torch.randn(B, S, E)
    torch.testing.assert_close(ours.eval()(x, r), norm(x + r))
    torch.manual_seed(3)
    dropped = ours.train()(x, r)
    assert not torch.allclose(dropped, norm(x + r))
    assert "dropout=0.3" in repr(ours)
    with pytest.raises(ValueError, match="normalized_shape"):
        fnn.AddLayerNorm((2, 3))
    with pytest.raises(ValueError, match="dropout"):
        fnn.AddLayerNorm(3, dropout=1.5)
    plain = fnn.LayerNorm(E, bias=False)
    assert torch.equal(plain(x), torch.nn.LayerNorm(E, bias=False)(x))
    wide = fnn.LayerNorm((S, E))
    fnn.reset_count()
    assert torch.equal(wide(x), torch.nn.LayerNorm((S, E))(x))
    assert fnn.count().fallback["LayerNorm", "normalises over several dimensions"] == 1


def test_patch_of_torch_nn_and_back():
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(E, H, dim_feedforward=40, dropout=0.0, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train()
    stock = copy.deepcopy(model)
    report = ff.patch(model)
    assert len(report.replaced) == 4
    fnn.reset_count()
    assert_same(stock, model, [torch.randn(B, S, E)], lambda m, x: m(x, src_key_padding_mask=PADDED))
    assert fnn.count().fused["MultiheadAttention"] == 2
    twin = pickle.loads(pickle.dumps(model))
    x = torch.randn(B, S, E)
    assert torch.equal(twin(x), model(x))
    assert ff.unpatch(model) == 4
    assert all(type(a) is type(b) for a, b in zip(model.modules(), stock.modules(), strict=True))
    model.zero_grad()
    assert torch.equal(model(x), stock(x))
