"""Stock and patched Hugging Face BERT: same numbers, and no trace after unpatch."""

import copy
import io
import pickle

import pytest
import torch

import fastformer as ff
import fastformer.nn as fnn

transformers = pytest.importorskip("transformers")
from transformers import BertConfig, BertForSequenceClassification, BertForTokenClassification, BertModel  # noqa: E402


def config(**changes):
    settings = {
        "vocab_size": 97,
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 80,
        "max_position_embeddings": 64,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "num_labels": 3,
    }
    return BertConfig(**{**settings, **changes})


def build(cls=BertForSequenceClassification, seed=0, **changes):
    torch.manual_seed(seed)
    model = cls(config(**changes))
    # Freshly initialised LayerNorms and biases are ones and zeros, under which many mistakes cancel.
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return model


def batch(lengths, width, side="right", seed=1, vocab=97):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, vocab, (len(lengths), width), generator=generator)
    mask = torch.zeros(len(lengths), width, dtype=torch.long)
    for row, n in enumerate(lengths):
        if side == "right":
            mask[row, :n] = 1
        elif side == "left":
            mask[row, width - n :] = 1
        else:
            mask[row, torch.randperm(width, generator=generator)[:n]] = 1
            mask[row, 0] = 1
    return {
        "input_ids": ids * mask,
        "attention_mask": mask,
        "token_type_ids": torch.randint(0, 2, ids.shape, generator=generator),
        "labels": torch.randint(0, 3, (len(lengths),), generator=generator),
    }


def relative(a, b):
    return ((a - b).norm() / b.norm().clamp_min(1e-12)).item()


@pytest.mark.parametrize("side", ["right", "holes"])
@pytest.mark.parametrize("unpad", ["auto", False])
@pytest.mark.parametrize("lengths", [[1, 7, 20, 13], [20, 20], [5]])
def test_loss_logits_and_gradients_equal_stock(lengths, unpad, side):
    stock, patched = build().train(), build().train()
    report = ff.patch(patched, unpad=unpad)
    assert len(report.replaced) == 2 + 4 * 3
    data = batch(lengths, 20, side)
    fnn.reset_count()
    a, b = stock(**data), patched(**data)
    count = fnn.count()
    assert not count.fallback
    assert count.fused["BertSelfAttention"] == 3
    assert count.fused["BertOutput"] == 6
    a.loss.backward()
    b.loss.backward()
    assert abs(a.loss.item() - b.loss.item()) < 1e-6
    assert relative(b.logits, a.logits) < 1e-5
    for (name, p), q in zip(stock.named_parameters(), patched.parameters(), strict=True):
        # A key's bias shifts every score of a row alike, so its gradient is zero up to rounding.
        if not name.endswith("key.bias"):
            assert relative(q.grad, p.grad) < 1e-5, name
        else:
            assert q.grad.abs().max() < 1e-5


def test_left_padding_equals_stock_on_real_tokens():
    stock, patched = build(BertModel).eval(), build(BertModel).eval()
    ff.patch(patched, unpad=True)
    data = batch([1, 7, 20, 13], 20, "left")
    del data["labels"]
    a, b = stock(**data).last_hidden_state, patched(**data).last_hidden_state
    real = data["attention_mask"].bool()
    assert a.shape == b.shape
    assert relative(b[real], a[real]) < 1e-5
    assert torch.all(b[~real] == 0)


def test_no_mask_explicit_positions_embeddings_and_tuples():
    stock, patched = build(BertModel).eval(), build(BertModel).eval()
    ff.patch(patched)
    ids = torch.randint(1, 97, (2, 9))
    mask = torch.tensor([[1] * 9, [1] * 4 + [0] * 5])
    places = torch.arange(9).flip(0)[None]
    embeds = stock.embeddings.word_embeddings(ids).detach()
    calls = [
        {"input_ids": ids},
        {"input_ids": ids, "attention_mask": mask, "position_ids": places},
        {"inputs_embeds": embeds, "attention_mask": mask},
        {"input_ids": ids, "attention_mask": mask.bool(), "return_dict": False},
    ]
    for call in calls:
        a, b = stock(**call), patched(**call)
        assert type(a) is type(b)
        real = call.get("attention_mask", torch.ones_like(ids)).bool()
        assert relative(b[0][real], a[0][real]) < 1e-5
        assert relative(b[1], a[1]) < 1e-5
    assert relative(patched(ids, mask)[1], stock(ids, mask)[1]) < 1e-5


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_attention_weights_with_and_without_gradients(implementation, dropout):
    """Weights come whatever implementation stock would use, and gradients through them are stock's."""
    stock = build(BertModel, attn_implementation="eager", attention_probs_dropout_prob=dropout)
    patched = build(BertModel, attn_implementation=implementation, attention_probs_dropout_prob=dropout)
    ff.patch(patched)
    data = {k: v for k, v in batch([3, 9], 9).items() if k != "labels"}
    fnn.reset_count()
    with torch.no_grad():
        a, b = (m.eval()(**data, output_attentions=True) for m in (stock, patched))
    assert not fnn.count().fallback
    assert fnn.count().fused["BertModel"] == 1
    for x, y in zip(a.attentions, b.attentions, strict=True):
        torch.testing.assert_close(y, x, rtol=1e-5, atol=1e-6)
    outs = []
    for model in (stock, patched):
        torch.manual_seed(5)
        out = model.train()(**data, output_attentions=True)
        sum((w * torch.arange(9)).square().sum() for w in out.attentions).backward()
        outs.append(out)
    for x, y in zip(outs[0].attentions, outs[1].attentions, strict=True):
        assert y.shape == x.shape
        # Under dropout both draw from PyTorch's generator, in the same order.
        assert relative(y, x) < 1e-5
    for (name, p), q in zip(stock.named_parameters(), patched.parameters(), strict=True):
        if p.grad is not None and "key.bias" not in name:
            assert relative(q.grad, p.grad) < 1e-4, name
    assert fnn.count().fallback["attention", "weights with a gradient or dropout"] == 3


def test_attention_weights_of_a_packed_row_are_refused():
    patched = build(BertModel).eval()
    ff.patch(patched)
    ids, places = torch.randint(1, 97, (1, 7)), torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    with pytest.raises(ValueError, match="one sequence a row"):
        patched(ids, position_ids=places, output_attentions=True)


def test_unpatch_leaves_no_trace():
    never, model, bystander = build().eval(), build().eval(), build()
    classes = [type(m) for m in model.modules()]
    attributes = [set(m.__dict__) for m in model.modules()]
    ff.patch(model)
    assert all(type(a) is type(b) for a, b in zip(bystander.modules(), never.modules(), strict=True))
    assert str(type(model.bert)) == str(type(bystander.bert))
    assert ff.unpatch(model) == 14
    assert ff.unpatch(model) == 0
    assert [type(m) for m in model.modules()] == classes
    assert [set(m.__dict__) for m in model.modules()] == attributes
    data = batch([3, 9], 9)
    assert torch.equal(model(**data).logits, never(**data).logits)


def test_state_dict_deepcopy_pickle_and_save(tmp_path):
    model = build().eval()
    keys = list(model.state_dict())
    data = batch([3, 9, 2], 9)
    ff.patch(model)
    want = model(**data).logits
    assert list(model.state_dict()) == keys
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        fnn.reset_count()
        assert torch.equal(twin(**data).logits, want)
        assert fnn.count().fused["BertModel"] == 1
        assert ff.unpatch(twin) == 14
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(**data).logits, want)
    model.save_pretrained(tmp_path)
    loaded = BertForSequenceClassification.from_pretrained(tmp_path).eval()
    assert type(loaded.bert) is BertModel
    torch.testing.assert_close(loaded(**data).logits, want, rtol=1e-5, atol=1e-6)
    assert loaded.config.architectures == ["BertForSequenceClassification"]


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    stock, patched = build().train(), build().train()
    ff.patch(patched)
    patched.gradient_checkpointing_enable({"use_reentrant": reentrant})
    data = batch([3, 9, 2], 9)
    stock(**data).loss.backward()
    patched(**data).loss.backward()
    for (name, p), q in zip(stock.named_parameters(), patched.named_parameters(), strict=True):
        if not name.endswith("key.bias"):
            assert relative(q[1].grad, p.grad) < 1e-5, name


def test_a_hooked_norm_is_called_and_counted():
    patched = build().eval()
    ff.patch(patched)
    seen = []
    norm = patched.bert.encoder.layer[1].output.LayerNorm
    handle = norm.register_forward_hook(lambda *a: seen.append(1))
    fnn.reset_count()
    patched(**batch([3, 9], 9))
    assert len(seen) == 1
    assert sum(fnn.count().fallback.values()) == 1
    handle.remove()


def test_fifty_steps_track_stock():
    losses = []
    for patched in (False, True):
        model = build(num_hidden_layers=2).train()
        if patched:
            ff.patch(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        run = []
        for step in range(50):
            loss = model(**batch([1 + (5 * step + 3 * i) % 20 for i in range(4)], 20, seed=step)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.append(loss.item())
        losses.append(run)
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 1e-5
    assert losses[0][0] != losses[0][-1]


def test_dropout_has_stocks_distribution():
    """Mean and spread of a dropped-out output over many draws, stock against patched, by a two-sample z-test."""
    rates = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.3}
    data = batch([3, 9, 5], 9)
    samples = []
    for patched in (False, True):
        model = build(num_hidden_layers=1, **rates).train()
        if patched:
            ff.patch(model)
        torch.manual_seed(5 + patched)
        with torch.no_grad():
            samples.append(torch.stack([model(**data).logits.flatten() for _ in range(600)]).double())
    a, b = samples
    error = ((a.var(0) + b.var(0)) / len(a)).sqrt()
    assert ((a.mean(0) - b.mean(0)).abs() / error).max() < 4.5
    # Spread, by the same test on squared deviations.
    da, db = (a - a.mean(0)) ** 2, (b - b.mean(0)) ** 2
    error = ((da.var(0) + db.var(0)) / len(a)).sqrt()
    assert ((da.mean(0) - db.mean(0)).abs() / error).max() < 4.5
    assert a.std(0).min() > 0


def test_dropout_repeats_with_the_seed():
    model = build(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1).train()
    ff.patch(model)
    data = batch([3, 9, 5], 9)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(model(**data).loss.item())
    assert runs[0] == runs[1] != runs[2]


def test_token_classification_and_decoder_and_unknown_models():
    stock, patched = build(BertForTokenClassification), build(BertForTokenClassification)
    ff.patch(patched)
    data = batch([3, 9], 9)
    data["labels"] = torch.where(data["attention_mask"].bool(), torch.randint(0, 3, (2, 9)), -100)
    assert abs(stock(**data).loss.item() - patched(**data).loss.item()) < 1e-6
    report = ff.patch(build(BertModel, is_decoder=True))
    assert any("is_decoder" in why for _, why in report.skipped)
    assert "is_decoder" in str(report)
    report = ff.patch(torch.nn.Linear(2, 2))
    assert not report
    assert "no part of it is known" in str(report)


def test_bad_arguments():
    with pytest.raises(TypeError, match="model must be"):
        ff.patch("bert-base-uncased")
    with pytest.raises(ValueError, match="unpad must be"):
        ff.patch(build(), unpad="yes")


def test_an_empty_sequence_in_the_batch():
    patched = build(BertModel).eval()
    ff.patch(patched)
    data = batch([4, 9], 9)
    data["attention_mask"][0] = 0
    out = patched(input_ids=data["input_ids"], attention_mask=data["attention_mask"]).last_hidden_state
    assert torch.all(out[0] == 0)
    assert torch.isfinite(out).all()
