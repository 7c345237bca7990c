"""Decoding through a cache of keys and values."""

import pytest
import torch
from nn_pairs import shake

import fastformer.nn as fnn

B, S, T, E, H = 3, 7, 6, 16, 2
PADDED = torch.arange(S) >= torch.tensor([7, 3, 5])[:, None]


def decoder(batch_first=True, norm_first=False):
    torch.manual_seed(0)
    layer = fnn.TransformerDecoderLayer(
        E, H, dim_feedforward=24, dropout=0.0, batch_first=batch_first, norm_first=norm_first
    )
    model = fnn.TransformerDecoder(layer, 2, fnn.LayerNorm(E)).eval()
    shake(model)
    return model


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("pieces", [[1] * T, [3, 1, 2], [T]])
@pytest.mark.parametrize("grad", [True, False])
def test_steps_through_a_cache_equal_the_whole(batch_first, norm_first, pieces, grad):
    model = decoder(batch_first, norm_first)
    tgt, memory = torch.randn(B, T, E), torch.randn(B, S, E)
    if not batch_first:
        tgt, memory = tgt.transpose(0, 1), memory.transpose(0, 1)
    mask = fnn.generate_square_subsequent_mask(T)
    axis = 1 if batch_first else 0
    whole = model(tgt, memory, mask, memory_key_padding_mask=PADDED)
    cache = fnn.KVCache()
    fnn.reset_count()
    with torch.set_grad_enabled(grad):
        steps = [model(t, memory, memory_key_padding_mask=PADDED, cache=cache) for t in tgt.split(pieces, axis)]
    assert not fnn.count().fallback
    assert len(cache) == T
    torch.testing.assert_close(torch.cat(steps, axis), whole, rtol=1e-5, atol=1e-5)
    if grad:
        parameters = list(model.parameters())
        for a, b in zip(
            torch.autograd.grad(torch.cat(steps, axis).square().sum(), parameters),
            torch.autograd.grad(whole.square().sum(), parameters),
            strict=True,
        ):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_reordered_caches_follow_their_rows():
    model = decoder()
    tgt, memory = torch.randn(B, T, E), torch.randn(B, S, E)
    rows = torch.tensor([2, 0, 2, 1])
    cache = fnn.KVCache()
    model(tgt[:, :3], memory, memory_key_padding_mask=PADDED, cache=cache)
    cache.reorder(rows)
    got = model(tgt[rows, 3:], memory[rows], memory_key_padding_mask=PADDED[rows], cache=cache)
    want = model(tgt, memory, fnn.generate_square_subsequent_mask(T), memory_key_padding_mask=PADDED)[rows, 3:]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_left_padded_prompts_and_inference_mode():
    model = decoder()
    tgt, memory = torch.randn(B, T, E), torch.randn(B, S, E)
    padding = torch.arange(T) < torch.tensor([0, 2, 1])[:, None]
    mask = fnn.generate_square_subsequent_mask(T)
    want = model(tgt, memory, mask, tgt_key_padding_mask=padding, unpad=False)
    cache = fnn.KVCache()
    parts = []
    for first, last in ((0, 3), (3, 4), (4, 6)):
        with torch.inference_mode(first == 3):
            parts.append(model(tgt[:, first:last], memory, tgt_key_padding_mask=padding[:, :last], cache=cache))
    torch.testing.assert_close(torch.cat(parts, 1)[~padding], want[~padding], rtol=1e-5, atol=1e-5)


def test_what_a_cache_cannot_do_is_refused():
    model, memory = decoder(), torch.randn(B, S, E)
    tgt = torch.randn(B, 2, E)
    with pytest.raises(ValueError, match="tgt_mask"):
        model(tgt, memory, fnn.generate_square_subsequent_mask(2), cache=fnn.KVCache())
    cache = fnn.KVCache()
    model(tgt, memory, cache=cache)
    with pytest.raises(ValueError, match="batch of 3, got one of 2"):
        model(tgt[:2], memory[:2], cache=cache)
    with pytest.raises(ValueError, match="all keys so far"):
        model(tgt, memory, tgt_key_padding_mask=torch.zeros(B, 2, dtype=torch.bool), cache=cache)
    model.layers[0].norm1.register_forward_hook(lambda *a: None)
    with pytest.raises(ValueError, match="norm1 is hooked"):
        model(tgt, memory, cache=fnn.KVCache())
