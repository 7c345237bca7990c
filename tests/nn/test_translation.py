"""Decoding through a cache, and the translation recipe: stock and patched on the same sentences."""

import copy
import importlib.util
import random
from pathlib import Path

import pytest
import torch
from nn_pairs import shake

import fastformer as ff
import fastformer.nn as fnn

RECIPE = Path(__file__).parents[2] / "examples" / "translation.py"
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


@pytest.fixture(scope="module")
def recipe():
    pytest.importorskip("sacrebleu")
    spec = importlib.util.spec_from_file_location("translation", RECIPE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_toy(folder):
    """Sentences of a language whose translation is word by word, in the other order."""
    words = {"red": "rot", "green": "gruen", "dog": "hund", "cat": "katze", "runs": "rennt", "sleeps": "schlaeft"}
    rng = random.Random(0)
    for name, count in (("train", 200), ("val", 6)):
        lines = [[rng.choice(list(words)) for _ in range(rng.randint(1, 6))] for _ in range(count)]
        folder.joinpath(f"{name}.en").write_text("\n".join(map(" ".join, lines)))
        folder.joinpath(f"{name}.de").write_text("\n".join(" ".join(words[w] for w in line[::-1]) for line in lines))


SMALL = ["--size", "64", "--layers", "1", "--vocab", "300", "--batch", "16", "--dropout", "0", "--steps", "25"]


def test_recipe_stock_and_patched(recipe, tmp_path, capsys):
    write_toy(tmp_path)
    runs = []
    for patch in ("--patch", "--no-patch"):
        fnn.reset_count()
        runs.append(recipe.main(["--data", str(tmp_path), *SMALL, patch, "--beams", "1", "3"]))
        assert bool(fnn.count().fused["TransformerDecoder"]) == (patch == "--patch")
        assert not fnn.count().fallback
    (losses, translations), (stock_losses, stock_translations) = runs
    assert max(abs(a - b) for a, b in zip(losses, stock_losses, strict=True)) < 1e-4
    assert losses[-1] < losses[0] - 1
    assert [len(found) for found in translations] == [6, 6]
    assert translations == stock_translations
    assert capsys.readouterr().out.count("beams: BLEU = ") == 4


@pytest.mark.parametrize("beams", [1, 3])
def test_beams_through_the_cache_are_beams_without(recipe, beams):
    tok = ff.BPETokenizer.train(["a b c d e f g h"] * 3, 270, special_tokens=["<pad>", "<s>", "</s>"])
    torch.manual_seed(0)
    model = recipe.Translator(len(tok), 64, 2, 0.0).eval()
    patched = copy.deepcopy(model)
    ff.patch(patched)
    source = torch.nn.utils.rnn.pad_sequence(
        recipe.encode(tok, ["a b c", "d", "e f g h a b"]), True, tok.token_to_id("<pad>")
    )
    assert patched.translate(source, tok, beams, 12) == model.translate(source, tok, beams, 12)


def test_losses_on_real_sentences(recipe, data_dir):
    """Sentence pairs of Multi30K: the same losses, stock and patched, for a fixed number of steps."""
    folder = data_dir / "multi30k"
    if not folder.is_dir():
        pytest.skip(f"no multi30k in {data_dir}")
    arguments = ["--data", str(folder), *SMALL, "--vocab", "2000", "--beams", "--steps", "20"]
    runs = [recipe.main([*arguments, patch])[0] for patch in ("--patch", "--no-patch")]
    assert max(abs(a - b) for a, b in zip(*runs, strict=True)) < 1e-4
