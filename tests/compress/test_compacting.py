"""Taking units out: the same numbers as with zeros in their place, in fewer of them, saved and loaded again."""

import copy

import pytest
import torch

import fastformer as ff
import fastformer.nn as fnn
from fastformer.compress import (
    Pruner,
    compact,
    find_sites,
    flops,
    latency,
    load,
    low_rank,
    prune,
    quantize_int8,
    save,
    share_layers,
    shrink,
    speedup,
)

transformers = pytest.importorskip("transformers", minversion="5")
import zoo  # noqa: E402

from fastformer.integrations.transformers import PackedCollator  # noqa: E402

HEAD = "ForSequenceClassification"
SMALL = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 48, "intermediate_size": 80}


def vit():
    torch.manual_seed(0)
    config = transformers.ViTConfig(**SMALL, image_size=8, patch_size=4, num_labels=3)
    return transformers.ViTForImageClassification(config), {"pixel_values": torch.randn(3, 3, 8, 8)}


def seq2seq(name):
    torch.manual_seed(0)
    if name == "t5":
        config = transformers.T5Config(
            vocab_size=zoo.VOCAB,
            d_model=48,
            d_kv=12,
            d_ff=80,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            decoder_start_token_id=0,
        )
        model = transformers.T5ForConditionalGeneration(config)
    else:
        sides = {f"{side}_{what}": n for side in ("encoder", "decoder")
                 for what, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 80))}  # fmt: skip
        prefix = {"bart": "Bart", "mbart": "MBart"}[name]
        config = getattr(transformers, f"{prefix}Config")(vocab_size=zoo.VOCAB, d_model=48, dropout=0.0, **sides)
        model = getattr(transformers, f"{prefix}ForConditionalGeneration")(config)
    batch = zoo.batch([zoo.WIDTH, 5, 9])
    return model, {**batch, "labels": batch["input_ids"]}


def build(family):
    """A random model in evaluation and the arguments of one call."""
    if family == "vit":
        model, batch = vit()
    elif family in ("t5", "bart", "mbart"):
        model, batch = seq2seq(family)
    else:
        model, batch = zoo.build(family, HEAD), zoo.batch([zoo.WIDTH, 5, 9])
    batch.setdefault("labels", torch.tensor([0, 1, 2]))
    return model.eval(), batch


def masked(family, rate=0.5, **options):
    """A pruned model with its zeros still in place."""
    model, batch = build(family)
    pruner = Pruner(model, find_sites(model), multiple_of=4, **options)
    model(**batch).loss.backward()
    pruner.observe()
    pruner.apply(pruner.choose(rate, pruner.importance()))
    model.zero_grad()
    return model, batch, pruner


def kept_places(model, pruner):
    """For every parameter that shrinks, by name: its axes and the places that stay."""
    places = {}
    for site, mask in zip(pruner.sites, pruner.kept, strict=True):
        for slot in site.slots:
            length = model.get_submodule(slot.module).get_parameter(slot.parameter).shape[slot.axis]
            rows = length // slot.blocks // site.units
            stays = mask.repeat_interleave(rows).repeat(slot.blocks)
            places.setdefault(slot.name, []).append((slot.axis, stays))
    return places


def same(a, b, batch):
    return (a(**batch).logits - b(**batch).logits).abs().max() < 1e-6


FAMILIES = [*(f for f in zoo.FAMILIES if f != "gpt_oss"), "vit", "t5", "bart", "mbart"]


@pytest.mark.parametrize("patched", [False, True], ids=["stock", "patched"])
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients_stay(family, patched):
    model, batch, pruner = masked(family)
    small = copy.deepcopy(model.train())  # nothing is dropped; only in training decoders go without a cache
    if patched:
        for m in (model, small):
            assert ff.patch(m)
    compact(small)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())
    fnn.reset_count()
    out, want = small(**batch), model(**batch)
    assert not patched or not fnn.count().fallback
    assert (out.logits - want.logits).abs().max() < 1e-6
    out.loss.backward()
    want.loss.backward()
    assert list(small.state_dict()) == list(model.state_dict())
    places = kept_places(model, pruner)
    dense = dict(model.named_parameters())
    for name, p in small.named_parameters():
        grad = dense[name].grad
        for axis, stays in places.get(name, ()):
            grad = grad.index_select(axis, stays.nonzero().flatten())
        assert (p.grad - grad).abs().max() < 1e-6 * max(1.0, grad.abs().max().item()), name
    if patched:
        ff.unpatch(small)
        assert (small(**batch).logits - out.logits).abs().max() < 2e-6
        ff.patch(small)
        assert (small(**batch).logits - out.logits).abs().max() < 2e-6


@pytest.mark.parametrize("family", ["bert", "albert", "modernbert", "gpt2", "llama", "t5"])
def test_heads_and_channels_are_those_of_the_table(family):
    model, _ = build(family)
    kinds = [(site.kind, site.units) for site in find_sites(model)]
    heads = {"llama": 2}.get(family, 4)  # Llama's are groups of two queries that share a key
    channels = {"gpt2": 192}.get(family, 80)
    assert set(kinds) == ({("channels", 80)} if family == "t5" else {("channels", channels), ("heads", heads)})


def test_t5_heads_are_reported_as_left_alone():
    assert any("position bias" in reason for _, reason in find_sites(build("t5")[0]).skipped)


def test_packed_batches_still_run():
    model, batch, _ = masked("bert")
    ff.patch(model)
    compact(model)
    want = model(**batch).logits
    rows = [row[keep == 1] for row, keep in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    out = model(**PackedCollator.for_model(model)([{"input_ids": row} for row in rows])).logits
    assert (out - want).abs().max() < 1e-6


@pytest.mark.parametrize("family", ["bert", "distilbert", "gpt2", "llama"])
def test_saved_by_itself_and_loaded_without_the_object(family, tmp_path):
    model, batch, _ = masked(family)
    compact(model)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert type(loaded) is type(model)
    assert same(loaded, model, batch)
    # And once more, from what was loaded.
    save(loaded, tmp_path / "again")
    assert same(load(tmp_path / "again"), model, batch)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_even_sizes_load_with_stock_transformers(family, tmp_path):
    model, batch, _ = masked(family, uniform=True)
    assert compact(model)["sites"] == {}
    assert "fastformer_compression" not in model.config.to_dict()
    save(model, tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert loaded.config.intermediate_size == 40
    assert same(loaded, model, batch)


def test_generation_with_a_cache():
    model = zoo.build("llama", "ForCausalLM").eval()
    pruner = Pruner(model, find_sites(model), multiple_of=4)
    pruner.apply(pruner.choose(0.5, [torch.rand(site.units) for site in pruner.sites]))
    small = copy.deepcopy(model)
    compact(small)
    ids = torch.tensor([[5, 9, 33]])
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options), small.generate(ids, **options))


def torch_stack(norm_first=False):
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(48, 4, 80, dropout=0.0, batch_first=True, norm_first=norm_first)
    return torch.nn.TransformerEncoder(layer, 2).eval()


@pytest.mark.parametrize("patched", [False, True], ids=["stock", "patched"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_torch_nn(norm_first, patched, tmp_path):
    model = torch_stack(norm_first)
    pruner = Pruner(model, find_sites(model), multiple_of=4)
    pruner.apply(pruner.choose(0.5, [torch.rand(site.units) for site in pruner.sites]))
    assert any(
        not bool(mask.all()) for mask, site in zip(pruner.kept, pruner.sites, strict=True) if site.kind == "heads"
    )
    small = copy.deepcopy(model)
    if patched:
        ff.patch(small)
    compact(small)
    x, padding = torch.randn(3, 7, 48), torch.arange(7) >= torch.tensor([[7], [3], [5]])
    for grad in (True, False):  # torch.nn has another path for inference
        with torch.set_grad_enabled(grad):
            want, out = model(x, src_key_padding_mask=padding), small(x, src_key_padding_mask=padding)
        assert (want - out)[~padding].abs().max() < 1e-6
    assert list(small.state_dict()) == list(model.state_dict())
    save(small, tmp_path)
    again = load(tmp_path, torch_stack(norm_first))
    assert (again(x, src_key_padding_mask=padding) - out)[~padding].abs().max() < 1e-6
    with pytest.raises(ValueError, match="model must be given"):
        load(tmp_path)
    with pytest.raises(ValueError, match="pruned heads"):
        small.layers[0].self_attn(x, x, x)  # weights with a gradient are stock's to compute


def test_compacted_twice(tmp_path):
    model, batch, _ = masked("bert", rate=0.3)
    compact(model)
    pruner = Pruner(model, find_sites(model), multiple_of=4)
    # Now evenly, which the configuration can tell of channels but not of heads.
    pruner.apply([torch.arange(site.units) < {"heads": 1, "channels": 12}[site.kind] for site in pruner.sites])
    spec = compact(model)
    assert model.config.intermediate_size == 12
    assert {sizes["of"] for sizes in spec["sites"].values()} == {4}
    assert {sizes["kept"] for sizes in spec["sites"].values()} == {1}
    save(model, tmp_path)
    assert same(load(tmp_path), model, batch)


def test_pruned_at_once_and_measured():
    model, batch = build("bert")
    dense = copy.deepcopy(model)
    with pytest.raises(ValueError, match="rate must lie between 0 and 1, got 2"):
        prune(model, 2, [])
    with pytest.raises(ValueError, match="needs gradients"):
        prune(model, 0.5, [])
    pruner = prune(model, 0.5, (model(**batch).loss for _ in range(2)), multiple_of=4)
    assert 0.4 < pruner.rate <= 0.51
    compact(model)
    assert flops(model, batch) < 0.7 * flops(dense, batch)
    assert latency(model, batch, repeats=2) > 0
    assert speedup(dense, model, [batch], backward=True) > 0
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(ValueError, match="at least one batch"):
        speedup(dense, model, [])


def test_importance_is_the_derivative_by_a_factor_on_the_unit():
    model, batch = build("bert")
    site = find_sites(model).sites[0]
    model(**batch).loss.backward()
    scores = site.gate_scores(model)
    output = model.bert.encoder.layer[0].attention.output.dense
    factors = torch.ones(4, requires_grad=True)
    output.register_forward_pre_hook(lambda module, args: (args[0] * factors.repeat_interleave(12),))
    model(**batch).loss.backward()
    assert (scores - factors.grad).abs().max() < 1e-6


def test_scores_do_not_depend_on_the_scale_of_the_loss():
    rankings = []
    for scale in (1.0, 1024.0):
        model, batch = build("bert")
        pruner = Pruner(model, find_sites(model))
        for _ in range(2):
            (model(**batch).loss * scale).backward()
            pruner.observe()
            model.zero_grad()
        rankings.append(torch.cat(pruner.importance()))
    assert torch.allclose(*rankings, rtol=1e-4)


def test_optimizer_goes_on_with_a_compact_model():
    model, batch, _ = masked("bert")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    small = copy.deepcopy(model)
    other = torch.optim.AdamW(small.parameters(), 1e-3)
    for m, o in ((model, optimizer), (small, other)):
        m(**batch).loss.backward()
        o.step()
        o.zero_grad()
    pruner = Pruner(model, find_sites(model))
    pruner.apply([torch.arange(site.units) % 2 == 0 for site in pruner.sites], optimizer)
    twin = Pruner(small, find_sites(small))
    twin.apply([torch.arange(site.units) % 2 == 0 for site in twin.sites], other)
    compact(small, other)
    for m, o in ((model, optimizer), (small, other)):
        m(**batch).loss.backward()
        o.step()
    assert (model(**batch).logits - small(**batch).logits).abs().max() < 1e-5
    assert all(v.shape == p.shape for p in small.parameters() for k, v in other.state[p].items() if k != "step")


def test_shared_layers(tmp_path):
    model, batch = build("roberta")
    report = share_layers(model)
    layers = model.roberta.encoder.layer
    assert layers[0].output.dense.weight is layers[1].output.dense.weight
    per_layer = sum(p.numel() for p in layers[0].parameters())
    assert report.parameters_before - report.parameters_after == per_layer
    assert "Speed: unchanged" in str(report)
    want = model(**batch).logits
    save(model, tmp_path)
    loaded = load(tmp_path)
    assert same(loaded, model, batch)
    assert sum(p.numel() for p in loaded.parameters()) == report.parameters_after
    assert same(type(model).from_pretrained(tmp_path).eval(), model, batch)  # stock, untied
    ff.patch(model)
    assert zoo.relative(model(**batch).logits, want) < 1e-5
    assert all("tied" in reason for _, reason in find_sites(model).skipped)
    assert len(find_sites(model)) == 0
    with pytest.raises(ValueError, match="groups must be between 1 and the 2"):
        share_layers(build("bert")[0], 3)


def test_uneven_layers_cannot_be_shared():
    model, _ = build("bert")
    site = find_sites(model).sites[1]
    shrink(model, {site.name: torch.arange(site.units) < 8})
    with pytest.raises(ValueError, match="same shapes"):
        share_layers(model)


def test_low_rank(tmp_path):
    model, batch = build("bert")
    with torch.no_grad():  # a matrix whose rank is three is found to be so, and nothing is lost
        weight = model.bert.encoder.layer[0].intermediate.dense.weight
        weight.copy_(torch.randn(80, 3) @ torch.randn(3, 48))
    want = model(**batch).logits
    ranks = low_rank(model, 0.9999)
    assert ranks == {"bert.encoder.layer.0.intermediate.dense": 3}
    assert zoo.relative(model(**batch).logits, want) < 1e-2
    ff.patch(model)
    save(model, tmp_path)
    loaded = load(tmp_path)
    assert zoo.relative(loaded(**batch).logits, model(**batch).logits) < 1e-5
    with pytest.raises(ValueError, match="energy must lie between 0 and 1, got 1"):
        low_rank(model, 1)


def test_int8(tmp_path):
    pytest.importorskip("torchao")
    model, batch, _ = masked("bert")
    compact(model)
    ff.patch(model)
    want = model(**batch).logits
    assert quantize_int8(model) == 12
    out = model(**batch).logits
    assert 0 < zoo.relative(out, want) < 0.05
    save(model, tmp_path)
    loaded = load(tmp_path)
    ff.patch(loaded)
    assert torch.equal(loaded(**batch).logits, out)


def test_what_is_left_alone():
    model, _ = build("bert")
    model.bert.encoder.layer[0].requires_grad_(False)
    tied = model.bert.encoder.layer[1]
    tied.intermediate.extra = torch.nn.Linear(48, 80)
    tied.intermediate.extra.weight = tied.intermediate.dense.weight
    found = find_sites(model)
    assert {reason for _, reason in found.skipped} == {"its weights are frozen", "its weights are tied to others"}
    assert [site.name for site in found] == ["bert.encoder.layer.1.attention.self"]


def test_lora_bases_are_left_alone():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build("bert")[0], peft.LoraConfig(target_modules=["query"], r=2))
    found = find_sites(model)
    assert len(found) == 0
    assert {reason.split(" ")[-1] for _, reason in found.skipped} == {"layer", "frozen"}


def test_bad_input(tmp_path):
    with pytest.raises(TypeError, match="model must be a"):
        find_sites("bert")
    model, _ = build("bert")
    with pytest.raises(ValueError, match="kept must name"):
        shrink(model, {"nowhere": torch.ones(4, dtype=torch.bool)})
    with pytest.raises(ValueError, match="keep at least one of 4 units"):
        shrink(model, {"bert.encoder.layer.0.attention.self": torch.zeros(4, dtype=torch.bool)})
    with pytest.raises(FileNotFoundError, match="must hold a saved model"):
        load(tmp_path)
    site = find_sites(model).sites[0]
    shrink(model, {site.name: torch.arange(4) < 3})
    compact(model)
    save(torch_stack(), tmp_path)
    with pytest.raises(RuntimeError, match="size"):
        load(tmp_path, torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(24, 4, 80), 2))
