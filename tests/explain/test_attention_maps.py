"""Maps of fused attention against eager's, for every way a batch can come; rollout, gradients and heads by hand."""

import copy

import pytest
import torch

import fastformer as ff
import fastformer.nn as fnn

transformers = pytest.importorskip("transformers", minversion="5")
import zoo  # noqa: E402

from fastformer.integrations.transformers import PackedCollator  # noqa: E402

LENGTHS = [zoo.WIDTH, 3, 11]
HEAD = "ForSequenceClassification"


def pair(family, **changes):
    """The same model stock (eager) and patched, in evaluation mode."""
    stock = zoo.build(family, HEAD, **changes).eval()
    patched = copy.deepcopy(stock)
    ff.patch(patched)
    return stock, patched


def eager_maps(stock, batch):
    """[layer][sequence] -> [heads, S, S] over real tokens, by output_attentions."""
    with torch.no_grad():
        found = stock(**batch, output_attentions=True).attentions
    places = [row.nonzero().squeeze(1) for row in batch["attention_mask"]]
    return [[layer[i][:, p][:, :, p] for i, p in enumerate(places)] for layer in found]


def packed(model, batch):
    rows = zip(batch["input_ids"], batch["attention_mask"], strict=True)
    return PackedCollator.for_model(model)([{"input_ids": i, "attention_mask": m} for i, m in rows])


@pytest.mark.parametrize("family", sorted(zoo.FAMILIES))
@pytest.mark.parametrize("how", ["padded", "packed", "padding kept"])
def test_maps_equal_eager_ones(family, how):
    stock, patched = pair(family)
    if how == "padding kept":
        ff.patch(patched, unpad=False)
    batch = zoo.batch(LENGTHS, pad=stock.config.pad_token_id or 0)
    given = packed(patched, batch) if how == "packed" else batch
    maps = ff.explain.attention_maps(patched.train(), given)
    assert patched.training
    want = eager_maps(stock, batch)
    assert (len(maps), maps.sequences) == (len(want), len(LENGTHS))
    for layer, sequences in enumerate(want):
        for i, weights in enumerate(sequences):
            assert maps.heads(layer) == len(weights)
            torch.testing.assert_close(maps.weights(layer, i), weights.mean(0), rtol=0, atol=1e-5)
            torch.testing.assert_close(maps.weights(layer, i, head=-1), weights[-1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "holes"])
def test_padding_anywhere(side):
    stock, patched = pair("bert")
    ff.patch(patched, unpad=True)
    batch = zoo.batch(LENGTHS, side)
    maps = ff.explain.attention_maps(patched, batch)
    for i, weights in enumerate(eager_maps(stock, batch)[1]):
        torch.testing.assert_close(maps.weights(1, i), weights.mean(0), rtol=0, atol=1e-5)


def test_vision_transformer():
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=4
    )
    config._attn_implementation = "eager"
    stock = transformers.ViTModel(config).eval()
    patched = copy.deepcopy(stock)
    ff.patch(patched)
    batch = {"pixel_values": torch.randn(2, 3, 16, 16)}
    maps = ff.explain.attention_maps(patched, batch)
    want = stock(**batch, output_attentions=True).attentions
    for layer, weights in enumerate(want):
        torch.testing.assert_close(maps.weights(layer, 1, head=2), weights[1, 2], rtol=0, atol=1e-5)


@pytest.mark.parametrize("unpad", ["auto", False])
@pytest.mark.parametrize("decoder_mask", [True, False])
@pytest.mark.parametrize("family", ["t5", "bart"])
def test_encoder_decoders(family, decoder_mask, unpad):
    from test_seq2seq import build, data

    stock, patched = build(family).eval(), build(family).eval()
    ff.patch(patched, unpad=unpad)
    batch, real_target = data(decoder_mask=decoder_mask)
    batch["use_cache"] = False
    with torch.no_grad():
        out = stock(**batch, output_attentions=True)
    maps = ff.explain.attention_maps(patched, batch)
    crossed = zip(out.decoder_attentions, out.cross_attentions, strict=True)
    want = [*out.encoder_attentions, *(weights for both in crossed for weights in both)]
    source = batch["attention_mask"].bool()
    target = real_target if decoder_mask else torch.ones_like(real_target)
    sides = [(source, source)] * 2 + [(target, target), (target, source)] * 2
    assert len(maps) == len(want)
    for layer, (weights, (rows, columns)) in enumerate(zip(want, sides, strict=True)):
        for i in range(maps.sequences):
            expected = weights[i].mean(0)[rows[i]][:, columns[i]]
            torch.testing.assert_close(maps.weights(layer, i), expected, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="cross-attention"):
        maps.rollout(0)


@pytest.mark.parametrize("unpad", [True, False])
def test_torch_nn(unpad):
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    source, padding = torch.randn(2, 5, 16), torch.arange(5) >= torch.tensor([[5], [3]])
    # The weights of the first layer, whose input is known.
    _, want = model.layers[0].self_attn(source, source, source, key_padding_mask=padding, average_attn_weights=False)
    ff.patch(model, unpad=unpad)
    maps = ff.explain.attention_maps(model, {"src": source, "src_key_padding_mask": padding})
    assert (len(maps), maps.sequences, maps.heads(0)) == (2, 2, 2)
    torch.testing.assert_close(maps.weights(0, 0, head=1), want[0, 1], rtol=0, atol=1e-5)
    short = maps.weights(0, 1)
    torch.testing.assert_close(short[:3, :3], want[1].mean(0)[:3, :3], rtol=0, atol=1e-5)


def test_rollout_is_the_product_of_layers():
    stock, patched = pair("bert", num_hidden_layers=3)
    batch = zoo.batch(LENGTHS)
    maps = ff.explain.attention_maps(patched, packed(patched, batch))
    for i in range(len(LENGTHS)):
        joint = torch.eye(LENGTHS[i])
        for layer in eager_maps(stock, batch):
            joint = (0.5 * layer[i].mean(0) + 0.5 * torch.eye(LENGTHS[i])) @ joint
        torch.testing.assert_close(maps.rollout(i), joint, rtol=0, atol=1e-5)
        torch.testing.assert_close(maps.rollout(i).sum(-1), torch.ones(LENGTHS[i]))
    torch.testing.assert_close(maps.rollout(0, residual=1.0), torch.eye(LENGTHS[0]))
    with pytest.raises(ValueError, match="residual must be"):
        maps.rollout(0, residual=1.5)


def eager_gradients(stock, batch, score):
    """[layer] -> (attention, its gradient) of eager, [batch, heads, S, S]."""
    out = stock(**batch, output_attentions=True)
    grads = torch.autograd.grad(score(out), out.attentions)
    return list(zip((a.detach() for a in out.attentions), grads, strict=True))


@pytest.mark.parametrize("family", ["bert", "distilbert", "albert", "llama", "gemma2"])
@pytest.mark.parametrize("how", ["padded", "packed"])
def test_gradient_times_weights(family, how):
    stock, patched = pair(family)
    batch = zoo.batch(LENGTHS)
    target = [0, 2, 1]
    maps = ff.explain.attention_maps(
        patched, packed(patched, batch) if how == "packed" else batch, gradients=True, target=target
    )
    want = eager_gradients(stock, batch, lambda out: out.logits[range(3), target].sum())
    for layer, (weights, gradient) in enumerate(want):
        for i, n in enumerate(LENGTHS):
            product = (weights * gradient)[i, :, :n, :n]
            scale = product.abs().max()
            got = maps.gradient_times_weights(layer, i)
            torch.testing.assert_close(got / scale, product.mean(0) / scale, rtol=0, atol=1e-4)


def test_gradients_through_frozen_models():
    _, patched = pair("bert")
    batch = zoo.batch(LENGTHS)
    free = ff.explain.attention_maps(patched, batch, gradients=True).gradient_times_weights(0, 1)
    patched.requires_grad_(False)
    frozen = ff.explain.attention_maps(patched, batch, gradients=True).gradient_times_weights(0, 1)
    assert frozen.abs().max() > 0
    torch.testing.assert_close(frozen, free)
    assert not patched.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize("how", ["padded", "packed"])
def test_head_importance_is_the_derivative_by_a_factor_on_the_head(how):
    stock, patched = pair("bert")
    batch, labels = zoo.batch(LENGTHS), torch.tensor([1, 0, 2])
    given = packed(patched, batch) if how == "packed" else batch
    got = ff.explain.head_importance(patched, [{**given, "labels": labels}])
    # By hand: a factor on each head's output, sequence by sequence.
    layers, heads, size = 2, 4, 12
    factors = torch.ones(layers, heads, requires_grad=True)

    def scaled(layer):
        return lambda module, args, out: (
            (out[0].unflatten(-1, (heads, size)) * factors[layer, :, None]).flatten(2),
            *out[1:],
        )

    for k in range(layers):
        stock.bert.encoder.layer[k].attention.self.register_forward_hook(scaled(k))
    want = torch.zeros(layers, heads)
    for i in range(3):
        loss = stock(**{k: v[i : i + 1] for k, v in batch.items()}, labels=labels[i : i + 1]).loss
        want += torch.autograd.grad(loss, factors)[0].abs()
    torch.testing.assert_close(got, want / 3, rtol=1e-3, atol=1e-6)
    normal = ff.explain.head_importance(patched, [{**given, "labels": labels}] * 2, normalize=True)
    torch.testing.assert_close(normal, got / got.norm(dim=1, keepdim=True))


def test_what_cannot_be_looked_at_is_refused():
    stock, patched = pair("bert")
    batch = zoo.batch(LENGTHS)
    with pytest.raises(ValueError, match="model must be patched"):
        ff.explain.attention_maps(stock, batch)
    with pytest.raises(ValueError, match="output_attentions"):
        ff.explain.attention_maps(patched, {**batch, "output_attentions": True})
    with pytest.raises(TypeError, match="model must be"):
        ff.explain.attention_maps("bert", batch)
    with pytest.raises(TypeError, match="batch must be a mapping"):
        ff.explain.attention_maps(patched, batch["input_ids"])
    with pytest.raises(ValueError, match="need gradients=True"):
        ff.explain.attention_maps(patched, batch, target=1)
    with pytest.raises(ValueError, match="target must be from 0 to 2"):
        ff.explain.attention_maps(patched, batch, gradients=True, target=3)
    maps = ff.explain.attention_maps(patched, batch)
    for arguments in ((2,), (0, 3), (0, 0, 4)):
        with pytest.raises(IndexError, match="must be from"):
            maps.weights(*arguments)
    with pytest.raises(ValueError, match="gradients=True"):
        maps.gradient_times_weights(0)
    with pytest.raises(ValueError, match="at least one batch"):
        ff.explain.head_importance(patched, [])
    with pytest.raises(ValueError, match="scalar loss"):
        ff.explain.head_importance(patched, [batch])


def test_nothing_is_recorded_outside_and_nothing_changes():
    _, patched = pair("bert")
    batch = zoo.batch(LENGTHS)
    before = patched(**batch).logits
    fnn.reset_count()
    ff.explain.attention_maps(patched, batch)
    assert not fnn.count().fallback
    assert torch.equal(patched(**batch).logits, before)


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """The number of elements of the largest tensor that any operator returns as its own, views left out."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given, made = (
            [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
            for tree in ((args, kwargs), out)
        )
        for tensor in made:
            if all(tensor.untyped_storage().data_ptr() != other.untyped_storage().data_ptr() for other in given):
                self.size = max(self.size, tensor.numel())
        return out


@pytest.mark.parametrize("how", ["padded", "packed"])
def test_a_map_takes_the_memory_of_one_head(how):
    """Four sequences and four heads: nothing larger than one square comes up, whatever is asked for."""
    _, patched = pair("bert")
    width = 60
    batch = zoo.batch([width] * 3 + [30], width=width)
    maps = ff.explain.attention_maps(patched, packed(patched, batch) if how == "packed" else batch, gradients=True)
    with Largest() as seen:
        maps.weights(0, 1)
        maps.rollout(2)
        maps.gradient_times_weights(1, 0)
    assert width * width <= seen.size < 1.5 * width * width
