"""Which encoder layers, and which embeddings, run as one operation."""

import pytest
import torch
from torch.nn.utils.parametrizations import weight_norm

import fastformer as ff
from fastformer.integrations.families.embeddings import embed_at_once
from fastformer.integrations.plan import Plan
from fastformer.nn.recording import recording
from fastformer.ops.backend import standing_in

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def _bert(**changes):
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**{**SIZES, **changes})).train()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


class _Table(torch.nn.Embedding):
    """Somebody's own."""


class _Adapter(torch.nn.Linear):
    """As peft's: a linear layer of another class."""


def _adapt(layer):
    layer.intermediate.dense.__class__ = _Adapter


DISTURBED = {
    "a hook on a linear layer": lambda layer: layer.output.dense.register_forward_hook(lambda *a: None),
    "a backward hook on a part": lambda layer: layer.intermediate.register_full_backward_hook(lambda *a: None),
    "a hook on attention": lambda layer: layer.attention.self.register_forward_pre_hook(lambda *a: None),
    "a hook on a norm": lambda layer: layer.output.LayerNorm.register_forward_hook(lambda *a: None),
    "a hook on the activation": lambda layer: layer.intermediate.intermediate_act_fn.register_forward_hook(print),
    "an adapter": _adapt,
    "a parametrization": lambda layer: weight_norm(layer.attention.output.dense),
    "another activation": lambda layer: setattr(layer.intermediate, "intermediate_act_fn", torch.nn.ReLU()),
    "a feed-forward part in pieces": lambda layer: setattr(layer, "chunk_size_feed_forward", 2),
    "no bias": lambda layer: setattr(layer.output.dense, "bias", None),
    "one dropout off": lambda layer: layer.output.dropout.eval(),
    "another forward": lambda layer: setattr(layer.attention, "forward", layer.attention.forward),
    "half a layer in another dtype": lambda layer: layer.output.half(),
    "one projection trained elsewhere": lambda layer: setattr(
        layer.attention.self.key, "weight", torch.nn.Parameter(torch.zeros(2, 32, 32)[1])
    ),
}


@pytest.mark.parametrize("disturb", DISTURBED.values(), ids=DISTURBED.keys())
def test_a_layer_with_anything_of_its_own_runs_in_parts(disturb):
    model, hidden = _bert(), torch.randn(1, 5, 32)
    ff.patch(model)
    first, second = model.bert.encoder.layer
    with standing_in():
        assert first._parameters_of(hidden, Plan()) is not None
        disturb(first)
        assert first._parameters_of(hidden, Plan()) is None
        assert second._parameters_of(hidden, Plan()) is not None


def test_a_layer_that_is_looked_at_runs_in_parts():
    model, hidden = _bert(), torch.randn(1, 5, 32)
    ff.patch(model)
    layer = model.bert.encoder.layer[0]
    with standing_in():
        assert layer._parameters_of(hidden, Plan(weights=[])) is None
        with recording():
            assert layer._parameters_of(hidden, Plan()) is None
        assert layer._parameters_of(hidden, Plan()) is not None


TABLES = {
    "a hook on a table": lambda e: e.word_embeddings.register_forward_hook(lambda *a: None),
    "a hook on the norm": lambda e: e.LayerNorm.register_forward_hook(lambda *a: None),
    "a hook on the embeddings": lambda e: e.register_forward_hook(lambda *a: None),
    "another class of table": lambda e: setattr(e.word_embeddings, "__class__", _Table),
    "rows renormed": lambda e: setattr(e.word_embeddings, "max_norm", 1.0),
    "a padding type": lambda e: setattr(e.token_type_embeddings, "padding_idx", 0),
    "one part more": lambda e: e.add_module("more", torch.nn.Linear(2, 2)),
}


@pytest.mark.parametrize("disturb", TABLES.values(), ids=TABLES.keys())
def test_embeddings_with_anything_of_their_own_are_called(disturb, monkeypatch):
    monkeypatch.setattr("fastformer.ops.embedding_layer_norm", lambda *a, **k: "in one pass")
    embeddings, inputs = _bert().bert.embeddings, {"input_ids": torch.ones(1, 3, dtype=torch.long)}
    assert embed_at_once(embeddings, inputs) is None  # no kernels on the CPU
    with standing_in():
        assert embed_at_once(embeddings, inputs) == "in one pass"
        assert embed_at_once(embeddings, {"input_ids": None, "inputs_embeds": torch.ones(1, 3, 32)}) is None
        disturb(embeddings)
        assert embed_at_once(embeddings, inputs) is None
