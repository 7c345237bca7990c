"""Encoder, decoder and encoder-decoder: padding goes, numbers stay, and what keeps the padding is counted."""

import copy

import pytest
import torch
from nn_pairs import assert_same, pair, shake

import fastformer as ff
import fastformer.nn as fnn

B, S, T, E, H = 4, 9, 6, 24, 4
OPTIONS = {"dim_feedforward": 40, "dropout": 0.0}


def lengths(seqlen, *counts):
    return torch.arange(seqlen) >= torch.tensor(counts)[:, None]


SRC, TGT = lengths(S, 9, 2, 5, 7), lengths(T, 1, 6, 3, 2)
HOLES = torch.tensor([[True, False, True, False, False, True, False, False, True]] * B)


def rows_seen(monkeypatch):
    """How many rows each linear1 of a layer gets: the proof that padding was not computed on."""
    seen = []
    from fastformer.nn import layers

    inner = layers._inner
    monkeypatch.setattr(layers, "_inner", lambda layer, x: (seen.append(x.shape[:-1].numel()), inner(layer, x))[1])
    return seen


def encoders(batch_first=True, norm=True, **options):
    layer = torch.nn.TransformerEncoderLayer(E, H, **OPTIONS, batch_first=batch_first, **options)
    stock = torch.nn.TransformerEncoder(layer, 2, torch.nn.LayerNorm(E) if norm else None, enable_nested_tensor=False)
    shake(stock)
    ours = copy.deepcopy(stock)
    ff.patch(ours)
    return stock, ours


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("padding", [SRC, HOLES, SRC.flip(1)], ids=["right", "holes", "left"])
@pytest.mark.parametrize("causal", [True, False])
def test_encoder_without_padding(monkeypatch, batch_first, norm_first, padding, causal):
    stock, ours = encoders(batch_first, norm_first=norm_first)
    seen = rows_seen(monkeypatch)
    real = ~padding if batch_first else ~padding.T
    mask = torch.nn.Transformer.generate_square_subsequent_mask(S) if causal else None
    if causal:
        # A real token always sees itself; padding in front of it must not matter.
        assert padding.shape == (B, S)
    x = torch.randn(B, S, E) if batch_first else torch.randn(S, B, E)
    fnn.reset_count()
    assert_same(stock, ours, [x], lambda m, x: m(x, mask, src_key_padding_mask=padding), real)
    assert fnn.count().fused["TransformerEncoder"] == 1
    assert fnn.count().fused["MultiheadAttention"] == 2
    assert not fnn.count().fallback
    assert seen == [int(real.sum())] * 2
    out = ours(x, mask, src_key_padding_mask=padding)
    assert torch.all(out[~real] == 0)


def test_a_batch_without_padding_runs_dense(monkeypatch):
    stock, ours = encoders()
    seen = rows_seen(monkeypatch)
    none = torch.zeros(B, S, dtype=torch.bool)
    assert_same(stock, ours, [torch.randn(B, S, E)], lambda m, x: m(x, src_key_padding_mask=none))
    assert seen == [B * S] * 2


@pytest.mark.parametrize(
    ("change", "arguments", "reason"),
    [
        (
            "",
            {"src_key_padding_mask": torch.zeros(B, S).masked_fill(SRC, -torch.inf)},
            "a key padding mask is not bool",
        ),
        (
            "",
            {"src_key_padding_mask": SRC, "mask": torch.zeros(S, S)},
            "the mask is not known to be causal (pass is_causal=True)",
        ),
        ("hook", {"src_key_padding_mask": SRC}, "a hook would see packed tensors"),
        ("forward", {"src_key_padding_mask": SRC}, "a hook would see packed tensors"),
        ("norm", {"src_key_padding_mask": SRC}, "norm does not work token by token"),
        ("bias_kv", {"src_key_padding_mask": SRC}, "self_attn has add_bias_kv or add_zero_attn"),
    ],
)
def test_what_keeps_the_padding_is_counted(change, arguments, reason):
    stock, ours = encoders()
    for m in (stock, ours):
        if change == "hook":
            m.layers[1].linear2.register_forward_hook(lambda module, args, out: out * 2)
        if change == "forward":
            part = m.layers[0].linear1
            part.forward = lambda x, part=part: torch.nn.functional.linear(x, part.weight) * 3
        if change == "norm":
            m.norm = torch.nn.Softmax(dim=1)
        if change == "bias_kv":
            torch.manual_seed(0)
            m.layers[0].self_attn.bias_k = torch.nn.Parameter(torch.randn(1, 1, E))
            m.layers[0].self_attn.bias_v = torch.nn.Parameter(torch.randn(1, 1, E))
    fnn.reset_count()
    assert_same(stock, ours, [torch.randn(B, S, E)], lambda m, x: m(x, **arguments))
    assert fnn.count().fallback["TransformerEncoder", f"padding stays: {reason}"] == 1
    assert fnn.count().fused["TransformerEncoderLayer"] == 2


def test_unpad_false_keeps_stocks_numbers_everywhere():
    stock, ours = encoders()
    ff.patch(ours, unpad=False)
    assert_same(stock, ours, [torch.randn(B, S, E)], lambda m, x: m(x, src_key_padding_mask=SRC))
    assert torch.any(ours(torch.randn(B, S, E), src_key_padding_mask=SRC)[SRC] != 0)


def test_a_layer_of_another_class_gets_what_stock_gives_it():
    class Noted(torch.nn.TransformerEncoderLayer):
        def forward(self, src, src_mask=None, src_key_padding_mask=None, is_causal=False):
            self.note = src_key_padding_mask
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)

    encoder = fnn.TransformerEncoder(Noted(E, H, **OPTIONS, batch_first=True), 2, enable_nested_tensor=False)
    fnn.reset_count()
    encoder(torch.randn(B, S, E), src_key_padding_mask=SRC)
    assert encoder.layers[0].note.dtype == torch.float32
    assert fnn.count().fallback["TransformerEncoder", "a layer of another class"] == 1


def decoders(batch_first=True, norm_first=False):
    layer = torch.nn.TransformerDecoderLayer(E, H, **OPTIONS, batch_first=batch_first, norm_first=norm_first)
    stock = torch.nn.TransformerDecoder(layer, 2, torch.nn.LayerNorm(E))
    shake(stock)
    ours = copy.deepcopy(stock)
    ff.patch(ours)
    return stock, ours


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("masks", ["both", "target", "memory"])
@pytest.mark.parametrize("causal", ["hint", "detected", "made", "none"])
def test_decoder_without_padding(monkeypatch, batch_first, norm_first, masks, causal):
    stock, ours = decoders(batch_first, norm_first)
    seen = rows_seen(monkeypatch)
    tgt, memory = torch.randn(B, T, E), torch.randn(B, S, E)
    if not batch_first:
        tgt, memory = tgt.transpose(0, 1), memory.transpose(0, 1)
    options = {}
    if causal != "none":
        make = fnn.generate_square_subsequent_mask if causal == "made" else torch.ones(T, T, dtype=torch.bool).triu
        options["tgt_mask"] = make(T) if causal == "made" else make(1)
        options["tgt_is_causal"] = True if causal == "hint" else None
    if masks != "memory":
        options["tgt_key_padding_mask"] = TGT
    if masks != "target":
        options["memory_key_padding_mask"] = SRC
    real = ~TGT if masks != "memory" else torch.ones(B, T, dtype=torch.bool)
    fnn.reset_count()
    assert_same(stock, ours, [tgt, memory], lambda m, t, s: m(t, s, **options), real if batch_first else real.T)
    assert not fnn.count().fallback
    assert seen == [int(real.sum())] * 2


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("patched", [True, False])
@pytest.mark.parametrize("same_mask", [True, False, None], ids=["same", "equal", "none"])
def test_transformer_hands_memory_on_packed(monkeypatch, batch_first, patched, same_mask):
    stock, ours = pair(torch.nn.Transformer, fnn.Transformer, E, H, 2, 1, **OPTIONS, batch_first=batch_first)
    if patched:
        ours = copy.deepcopy(stock)
        ff.patch(ours)
    packings = []
    from fastformer.ops.packing import Packing

    make = Packing.from_masks
    monkeypatch.setattr(Packing, "from_masks", staticmethod(lambda *m: (packings.append(len(m)), make(*m))[1]))
    seen = rows_seen(monkeypatch)
    src, tgt = torch.randn(B, S, E), torch.randn(B, T, E)
    if not batch_first:
        src, tgt = src.transpose(0, 1), tgt.transpose(0, 1)
    memory_mask = {True: SRC, False: SRC.clone(), None: None}[same_mask]
    masks = {"src_key_padding_mask": SRC, "tgt_key_padding_mask": TGT, "memory_key_padding_mask": memory_mask}
    causal = ours.generate_square_subsequent_mask(T)
    fnn.reset_count()
    real = ~TGT if batch_first else ~TGT.T
    assert_same(stock, ours, [src, tgt], lambda m, s, t: m(s, t, tgt_mask=causal, **masks), real)
    assert not fnn.count().fallback
    encoded = int((~SRC).sum()) if same_mask else B * S
    assert seen == [encoded] * 2 + [int((~TGT).sum())]
    assert packings == [1 if same_mask is None else 2]


def test_transformer_with_custom_parts():
    class Twice(torch.nn.Module):
        def forward(self, src, mask=None, src_key_padding_mask=None, is_causal=None):
            return src * 2

    stock, ours = pair(torch.nn.Transformer, fnn.Transformer, E, H, 1, 1, **OPTIONS, custom_encoder=Twice())
    fnn.reset_count()
    assert_same(stock, ours, [torch.randn(S, B, E), torch.randn(T, B, E)], lambda m, s, t: m(s, t))
    assert fnn.count().fallback["Transformer", "a custom encoder or decoder"] == 1
    theirs = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(E, H), 1, enable_nested_tensor=False)
    fnn.Transformer(E, H, 1, 1, custom_encoder=theirs)
    assert type(theirs) is torch.nn.TransformerEncoder


def test_a_whole_sequence_of_padding():
    _, ours = encoders()
    padding = SRC.clone()
    padding[1] = True
    x = torch.randn(B, S, E, requires_grad=True)
    out = ours(x, src_key_padding_mask=padding)
    assert torch.isfinite(out).all()
    assert torch.all(out[1] == 0)
    out.sum().backward()
    assert torch.isfinite(x.grad).all()
    everything = torch.ones(B, S, dtype=torch.bool)
    assert torch.all(ours(x, src_key_padding_mask=everything) == 0)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_through_an_encoder_in_training(layout):
    stock, ours = encoders()
    parts = [torch.randn(n, E) for n in (3, 7, 1)]
    fnn.reset_count()
    out = ours(torch.nested.nested_tensor(parts, layout=layout))
    assert not fnn.count().fallback
    assert fnn.count().fused["TransformerEncoder"] == 1
    assert out.layout == layout
    for got, part in zip(out.unbind(), parts, strict=True):
        torch.testing.assert_close(got, stock(part[None])[0], rtol=1e-5, atol=2e-5)


def test_a_causal_hint_without_a_mask_is_refused_as_by_stock():
    for model in encoders():
        with pytest.raises(RuntimeError, match="Need attn_mask"):
            model(torch.randn(B, S, E), src_key_padding_mask=SRC, is_causal=True)
    for model in decoders():
        with pytest.raises(RuntimeError, match="Need attn_mask"):
            model(torch.randn(B, T, E), torch.randn(B, S, E), memory_key_padding_mask=SRC, tgt_is_causal=True)
    for model in pair(torch.nn.Transformer, fnn.Transformer, E, H, 1, 1, **OPTIONS, batch_first=True):
        masks = {"src_key_padding_mask": SRC, "memory_key_padding_mask": SRC}
        for hint in ("src_is_causal", "tgt_is_causal"):
            with pytest.raises(RuntimeError, match="Need attn_mask"):
                model(torch.randn(B, S, E), torch.randn(B, T, E), **masks, **{hint: True})
