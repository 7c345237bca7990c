"""Modules of fastformer.nn over the kernels in Triton's interpreter, against torch.nn.

TRITON_INTERPRET=1 FASTFORMER_BACKEND=triton python -m pytest tests/interpreter
"""

import copy

import pytest
import torch

import fastformer as ff
import fastformer.nn as fnn

B, S, T, E, H = 2, 6, 4, 32, 2
SRC = torch.arange(S) >= torch.tensor([6, 3])[:, None]
TGT = torch.arange(T) >= torch.tensor([2, 4])[:, None]


@pytest.fixture(autouse=True)
def _needs_interpreter(interpreting):
    if not interpreting:
        pytest.skip("runs in Triton's interpreter only")


@pytest.mark.parametrize("norm_first", [True, False])
def test_encoder_decoder(norm_first):
    torch.manual_seed(0)
    stock = torch.nn.Transformer(E, H, 1, 1, 24, 0.0, "gelu", batch_first=True, norm_first=norm_first)
    ours = copy.deepcopy(stock)
    ff.patch(ours)
    inputs = [torch.randn(B, S, E), torch.randn(B, T, E)]
    masks = {"src_key_padding_mask": SRC, "tgt_key_padding_mask": TGT, "memory_key_padding_mask": SRC}
    causal = fnn.generate_square_subsequent_mask(T)
    results = []
    fnn.reset_count()
    for model in (stock, ours):
        leaves = [t.clone().requires_grad_() for t in inputs]
        out = model(*leaves, tgt_mask=causal, **masks)[~TGT]
        out.square().sum().backward()
        results.append([out, *(t.grad for t in leaves), *(p.grad for p in model.parameters())])
    assert fnn.count().fused["MultiheadAttention"] == 3
    assert not fnn.count().fallback
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-4)


def test_dropout_is_drawn_once_for_both_ways():
    """With the seed kept, the same elements drop in forward and backward: the derivative is the function's."""
    torch.manual_seed(0)
    layer = fnn.TransformerEncoderLayer(E, H, 24, 0.3, batch_first=True)
    x = torch.randn(B, S, E, requires_grad=True)
    # A norm's sum of squares hardly moves; a fixed mixture of its outputs does.
    direction, mixture = torch.randn_like(x), torch.randn_like(x)
    values = []
    for shift in (-1e-3, 1e-3):
        torch.manual_seed(1)
        values.append((layer(x.detach() + shift * direction) * mixture).sum().item())
    torch.manual_seed(1)
    (grad,) = torch.autograd.grad((layer(x) * mixture).sum(), x)
    slope = (values[1] - values[0]) / 2e-3
    assert abs(slope - (grad * direction).sum().item()) < 0.02 * max(1.0, abs(slope))


@pytest.mark.parametrize("pieces", [[1] * 5, [3, 1, 1]])
def test_decoding_appends_and_attends_in_one_call(pieces, monkeypatch):
    torch.manual_seed(0)
    layer = torch.nn.TransformerDecoderLayer(E, H, 24, 0.1, batch_first=True)
    model = fnn.TransformerDecoder(fnn.TransformerDecoderLayer(E, H, 24, 0.1, batch_first=True), 2).eval()
    stock = torch.nn.TransformerDecoder(layer, 2).eval()
    stock.load_state_dict(model.state_dict())
    calls = []
    attend = ff.ops.attention_kv_cache

    def counted(*args, **kwargs):
        calls.append(kwargs["k"].shape[1])
        return attend(*args, **kwargs)

    monkeypatch.setattr(ff.ops, "attention_kv_cache", counted)
    tgt, memory = torch.randn(B, 5, E), torch.randn(B, S, E)
    want = stock(tgt, memory, torch.nn.Transformer.generate_square_subsequent_mask(5))
    for grad in (False, True):  # with a derivative asked for, another path
        cache, calls[:] = fnn.KVCache(), []
        with torch.set_grad_enabled(grad):
            got = torch.cat([model(t, memory, cache=cache) for t in tgt.split(pieces, 1)], 1)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        assert calls == ([] if grad else [n for n in pieces for _ in range(2)])
    # A step with a derivative and one without take turns.
    cache = fnn.KVCache()
    parts = []
    for i, t in enumerate(tgt.split(1, 1)):
        with torch.set_grad_enabled(i % 2 == 0):
            parts.append(model(t, memory, cache=cache))
    torch.testing.assert_close(torch.cat(parts, 1), want, rtol=1e-4, atol=1e-5)
