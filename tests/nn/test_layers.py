"""Layers and norms of fastformer.nn: what fuses, what falls back, what it says about it."""

import pytest
import torch
import torch.nn.functional as F
from nn_pairs import assert_same, pair

import fastformer.nn as fnn
from fastformer.nn import layers

B, S, T, E, H = 3, 7, 5, 24, 4
CAUSAL = torch.ones(S, S, dtype=torch.bool).triu(1)
PADDED = torch.tensor([[False] * S, [False] * 4 + [True] * 3, [False] + [True] * 6])
OPTIONS = {"dim_feedforward": 40, "dropout": 0.0, "batch_first": True}


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu", torch.tanh])
@pytest.mark.parametrize("masks", [{}, {"src_key_padding_mask": PADDED}, {"src_mask": CAUSAL, "is_causal": True}])
def test_encoder_layer_equals_stock(norm_first, activation, masks):
    options = {**OPTIONS, "activation": activation, "norm_first": norm_first}
    stock, ours = pair(torch.nn.TransformerEncoderLayer, fnn.TransformerEncoderLayer, E, H, **options)
    fnn.reset_count()
    assert_same(stock, ours, [torch.randn(B, S, E)], lambda m, x: m(x, **masks))
    want = {"TransformerEncoderLayer": 1, "MultiheadAttention": 1}
    assert fnn.count().fused == (want | {"LayerNorm": 1} if norm_first else want)
    assert not fnn.count().fallback


@pytest.mark.parametrize("norm_first", [True, False])
def test_decoder_layer_equals_stock(norm_first):
    options = {**OPTIONS, "norm_first": norm_first}
    stock, ours = pair(torch.nn.TransformerDecoderLayer, fnn.TransformerDecoderLayer, E, H, **options)
    fnn.reset_count()
    inputs = [torch.randn(B, T, E), torch.randn(B, S, E)]
    assert_same(stock, ours, inputs, lambda m, t, s: m(t, s, memory_key_padding_mask=PADDED))
    assert fnn.count().fused["MultiheadAttention"] == 2
    assert not fnn.count().fallback


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["gelu", torch.nn.GELU("tanh"), "relu"])
def test_bias_and_gelu_in_one_pass_equal_stock(monkeypatch, norm_first, bias, activation):
    """The operators of the GPU path, which on the CPU compute the same with PyTorch."""
    calls = []
    for name in ("bias_gelu", "bias_dropout_add"):
        function = getattr(layers, name)
        monkeypatch.setattr(layers, name, lambda *a, f=function, n=name: (calls.append(n), f(*a))[1])
    monkeypatch.setattr(layers, "backend_for", lambda device: "triton")
    options = {**OPTIONS, "norm_first": norm_first, "bias": bias, "activation": activation}
    stock, ours = pair(torch.nn.TransformerEncoderLayer, fnn.TransformerEncoderLayer, E, H, **options)
    assert_same(stock, ours, [torch.randn(B, S, E)], lambda m, x: m(x))
    want = (["bias_gelu"] if activation != "relu" else []) + (["bias_dropout_add"] if norm_first else [])
    assert calls == want


def test_encoder_layer_drops_and_hooks_run():
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
    assert fnn.count().fallback["TransformerEncoderLayer", "norm1 is hooked or replaced"] == 1


@pytest.mark.parametrize("part", ["linear1", "linear2", "dropout", "dropout2", "self_attn", "norm2"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_a_hook_on_any_part_runs_once(part, norm_first, monkeypatch):
    monkeypatch.setattr(layers, "backend_for", lambda device: "triton")
    ours = fnn.TransformerEncoderLayer(E, H, **{**OPTIONS, "activation": "gelu"}, norm_first=norm_first)
    seen = []
    getattr(ours, part).register_forward_hook(lambda *a: seen.append(1))
    ours(torch.randn(B, S, E))
    assert seen == [1]


def test_nested_tensors_through_a_layer_in_training():
    stock, ours = pair(torch.nn.TransformerEncoderLayer, fnn.TransformerEncoderLayer, E, H, **OPTIONS)
    parts = [torch.randn(n, E) for n in (3, 7, 1)]
    fnn.reset_count()
    out = ours(torch.nested.nested_tensor(parts, layout=torch.jagged))
    assert not fnn.count().fallback
    for got, part in zip(out.unbind(), parts, strict=True):
        torch.testing.assert_close(got, stock(part[None])[0], rtol=1e-5, atol=2e-6)


def test_a_subclass_with_its_own_block_is_honoured():
    class Gated(fnn.TransformerEncoderLayer):
        def _ff_block(self, x):
            return x * 0

    layer = Gated(E, H, **OPTIONS)
    x = torch.randn(B, S, E)
    fnn.reset_count()
    out = layer(x)
    reason = "a subclass has its own _ff_block"
    assert fnn.count().fallback["TransformerEncoderLayer", reason] == 1
    same = layer.norm2(layer.norm1(x + layer.self_attn(x, x, x)[0]))
    torch.testing.assert_close(out, same, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("name", ["AddLayerNorm", "AddRMSNorm"])
def test_add_norms(name):
    ours = getattr(fnn, name)(E, dropout=0.3)
    plain = getattr(torch.nn, name.removeprefix("Add"))(E)
    ours.load_state_dict(plain.state_dict())
    x, r = torch.randn(B, S, E), torch.randn(B, S, E)
    torch.testing.assert_close(ours.eval()(x, r), plain(x + r))
    torch.manual_seed(3)
    dropped = ours.train()(x, r)
    torch.manual_seed(3)
    torch.testing.assert_close(dropped, plain(r + F.dropout(x, 0.3)))
    assert not torch.allclose(dropped, plain(x + r))
    assert "dropout=0.3" in repr(ours)
    with pytest.raises(ValueError, match="normalized_shape"):
        getattr(fnn, name)((2, 3))
    with pytest.raises(ValueError, match="dropout"):
        getattr(fnn, name)(3, dropout=1.5)


def test_norms_over_several_dimensions_are_fused():
    x = torch.randn(B, S, E)
    for name in ("LayerNorm", "RMSNorm"):
        stock, ours = pair(getattr(torch.nn, name), getattr(fnn, name), (S, E))
        fnn.reset_count()
        assert_same(stock, ours, [x], lambda m, x: m(x))
        assert fnn.count().fused == {name: 1}
        with pytest.raises(RuntimeError, match="normalized_shape"):
            ours(x[:, 1:])
