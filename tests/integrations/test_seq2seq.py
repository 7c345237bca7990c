"""Stock and patched encoder-decoders, and models that are recognised rather than known."""

import pytest
import torch

import fastformer as ff
import fastformer.nn as fnn

transformers = pytest.importorskip("transformers", minversion="5")
import zoo  # noqa: E402

FAMILIES = list(zoo.SEQ2SEQ)


def build(family, implementation="eager"):
    return zoo.build(family, "ForConditionalGeneration", implementation=implementation).train()


def data(side="right", decoder_mask=True):
    source = zoo.batch([20] * 4) if side == "none" else zoo.batch([1, 7, 20, 13], side)
    target = zoo.batch([9, 3, 1, 12], "right", width=12, seed=3)
    source["labels"] = torch.where(target["attention_mask"].bool(), target["input_ids"], -100)
    if decoder_mask:
        source["decoder_attention_mask"] = target["attention_mask"]
    return source, target["attention_mask"].bool()


@pytest.mark.parametrize("decoder_mask", [False, True])
@pytest.mark.parametrize("side", ["right", "left", "holes", "none"])
@pytest.mark.parametrize("unpad", ["auto", False])
@pytest.mark.parametrize("family", FAMILIES)
def test_both_sides_equal_stock(family, unpad, side, decoder_mask):
    stock, patched = build(family), build(family)
    ff.patch(patched, unpad=unpad)
    batch, real_target = data(side, decoder_mask)
    fnn.reset_count()
    a, b = stock(**batch, output_hidden_states=True), patched(**batch, output_hidden_states=True)
    assert not fnn.count().fallback
    a.loss.backward()
    b.loss.backward()
    assert abs(a.loss.item() - b.loss.item()) < 1e-5 * a.loss.item()
    zoo.assert_same_gradients(stock, patched)
    real_source = batch["attention_mask"].bool()
    assert zoo.relative(b.logits[real_target], a.logits[real_target]) < 1e-5
    for name, real in (("encoder_hidden_states", real_source), ("decoder_hidden_states", real_target)):
        for x, y in zip(a[name], b[name], strict=True):
            assert zoo.relative(y[real], x[real]) < 1e-5, name


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_and_unpatch(family, implementation):
    never, model = build(family, implementation).eval(), build(family, implementation).eval()
    ff.patch(model)
    batch, _ = data("left")
    ask = {"max_new_tokens": 8, "do_sample": False}
    del batch["labels"], batch["decoder_attention_mask"]
    assert torch.equal(model.generate(**batch, **ask), never.generate(**batch, **ask))
    assert ff.unpatch(model)
    batch, _ = data()
    assert torch.equal(model(**batch).logits, never(**batch).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing(family):
    stock, patched = build(family), build(family)
    ff.patch(patched)
    patched.gradient_checkpointing_enable({"use_reentrant": False})
    batch, _ = data()
    stock(**batch).loss.backward()
    patched(**batch).loss.backward()
    zoo.assert_same_gradients(stock, patched)


def test_positions_are_forgotten_after_a_call():
    model, never = build("bart").eval(), build("bart").eval()
    ff.patch(model)
    batch, _ = data()
    model(**batch)
    ids = torch.arange(5)[None]
    assert torch.equal(model.model.encoder.embed_positions(ids), never.model.encoder.embed_positions(ids))


def small(name, **settings):
    torch.manual_seed(0)
    common = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 80}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = getattr(transformers, f"{name}Config")(**{**common, **dropout, **settings})
    model = getattr(transformers, f"{name}Model")(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return model


@pytest.mark.parametrize("weight", [1.0, 60000.0])
def test_bart_clamps_half_precision_as_stock(weight):
    """Below fp16's largest number nothing changes; past it, all is clamped as stock does after reading it."""
    stock, patched = (zoo.build("bart", "Model", encoder_layers=1).half().eval() for _ in range(2))
    for model in (stock, patched):
        model.encoder.layers[0].final_layer_norm.weight.data.fill_(weight)
    ff.patch(patched)
    data = zoo.batch([5, 9], width=9)
    a, b = (model.encoder(**data).last_hidden_state for model in (stock, patched))
    real = data["attention_mask"].bool()
    assert a[real].isfinite().all()
    assert (a[real].abs() == 64512).any() == (weight > 1)
    assert zoo.relative(b[real].float(), a[real].float()) < 2e-3


def test_vit_attention_and_norms():
    stock, patched = (small("ViT", image_size=16, patch_size=4) for _ in range(2))
    report = ff.patch(patched)
    kinds = {what for _, what in report.replaced}
    assert kinds == {"fused attention", "fused LayerNorm"}
    assert "no family whose padding" in str(report)
    pixels = torch.randn(2, 3, 16, 16)
    fnn.reset_count()
    a, b = stock(pixels).last_hidden_state, patched(pixels).last_hidden_state
    assert fnn.count().fused["ViTAttention"] == 2
    assert zoo.relative(b, a) < 1e-5
    weights = torch.randn_like(a)
    (a * weights).sum().backward()
    (b * weights).sum().backward()
    zoo.assert_same_gradients(stock, patched)


def test_deberta_norms_only():
    settings = {"vocab_size": zoo.VOCAB, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
    stock, patched = (small("DebertaV2", **settings) for _ in range(2))
    report = ff.patch(patched)
    assert {what for _, what in report.replaced} == {"fused LayerNorm"}
    batch = zoo.batch([4, 20, 9])
    a, b = stock(**batch).last_hidden_state, patched(**batch).last_hidden_state
    assert zoo.relative(b, a) < 1e-5


def test_an_unknown_decoder_is_recognised_by_what_it_computes():
    settings = {"vocab_size": zoo.VOCAB, "num_key_value_heads": 2, "pad_token_id": 0}
    stock, patched = (small("Cohere", **settings) for _ in range(2))
    assert {what for _, what in ff.patch(patched).replaced} == {"fused attention"}
    stock2, patched2 = (small("Olmo2", **settings) for _ in range(2))
    assert {what for _, what in ff.patch(patched2).replaced} == {"fused attention", "fused RMSNorm"}
    batch = zoo.batch([4, 20, 9])
    real = batch["attention_mask"].bool()
    for a, b in ((stock, patched), (stock2, patched2)):
        assert zoo.relative(b(**batch)[0][real], a(**batch)[0][real]) < 1e-5
