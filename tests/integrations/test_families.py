"""Stock and patched models of every family: same numbers in and out of training, and no trace after unpatch."""

import copy
import io
import pickle

import pytest
import torch

import fastformer as ff
import fastformer.nn as fnn

transformers = pytest.importorskip("transformers", minversion="4.57")
import zoo  # noqa: E402

HEAD = "ForSequenceClassification"
LENGTHS = [1, 7, 20, 13]


def pair(family, head=HEAD, **changes):
    return zoo.build(family, head, **changes).train(), zoo.build(family, head, **changes).train()


def data_for(family, lengths, side="right", **changes):
    return zoo.batch(lengths, side, pad=zoo.ALL[family][1].get("pad_token_id", 0), **changes)


def assert_same(stock, patched, data, tolerance=1e-5, **asked):
    fnn.reset_count()
    a, b = stock(**data, **asked), patched(**data, **asked)
    assert not fnn.count().fallback
    a.loss.backward()
    b.loss.backward()
    assert abs(a.loss.item() - b.loss.item()) < tolerance * max(1.0, abs(a.loss.item()))
    if "labels" not in data or data["labels"].ndim == 1:
        assert zoo.relative(b.logits, a.logits) < tolerance
    zoo.assert_same_gradients(stock, patched, tolerance)
    return a, b


@pytest.mark.parametrize("side", ["right", "left", "holes"])
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_loss_logits_states_and_gradients_equal_stock(family, side):
    if family == "modernbert" and side == "left":
        pytest.skip("the head pools padding whose window holds no token: stock averages hidden values there")
    stock, patched = pair(family)
    assert ff.patch(patched)
    data = data_for(family, LENGTHS, side)
    data["labels"] = torch.tensor([0, 1, 2, 0])
    a, b = assert_same(stock, patched, data, output_hidden_states=True)
    real = data["attention_mask"].bool()
    assert len(a.hidden_states) == len(b.hidden_states)
    for x, y in zip(a.hidden_states, b.hidden_states, strict=True):
        assert x.shape == y.shape
        assert zoo.relative(y[real], x[real]) < 1e-5


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("unpad", ["auto", False])
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_without_padding_and_with_padding_kept(family, unpad, implementation):
    if family in ("gpt_oss", "gemma2") and implementation == "sdpa":
        pytest.skip("stock's sdpa has neither sinks nor softcap")
    if family == "electra" and implementation == "sdpa" and not zoo.IS_5:
        pytest.skip("stock has no sdpa before transformers 5")
    stock, patched = pair(family, implementation=implementation)
    ff.patch(patched, unpad=unpad)
    for lengths in ([20, 20], [5]):
        data = data_for(family, lengths)
        data["labels"] = torch.tensor([2, 1])[: len(lengths)]
        stock.zero_grad()
        patched.zero_grad()
        assert_same(stock, patched, data)
    del data["attention_mask"], data["labels"]
    if family in zoo.ENCODERS:
        stock, patched = stock.eval(), patched.eval()
        assert zoo.relative(patched(**data).logits, stock(**data).logits) < 1e-5


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_token_losses(family):
    head = "ForMaskedLM" if family in zoo.ENCODERS else "ForCausalLM"
    if family == "electra":
        head = "ForTokenClassification"
    stock, patched = pair(family, head)
    ff.patch(patched)
    data = data_for(family, LENGTHS)
    labels = torch.randint(0, 3, data["input_ids"].shape)
    data["labels"] = torch.where(data["attention_mask"].bool(), labels, -100)
    assert_same(stock, patched, data)


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_unpatch_leaves_no_trace(family, tmp_path):
    never, model = zoo.build(family, HEAD).eval(), zoo.build(family, HEAD).eval()
    bystander = type(model)(model.config).eval()
    bystander.load_state_dict(model.state_dict())
    keys, classes = list(model.state_dict()), [type(m) for m in model.modules()]
    attributes = [set(m.__dict__) for m in model.modules()]
    data = data_for(family, LENGTHS)
    want = never(**data).logits
    report = ff.patch(model)
    assert list(model.state_dict()) == keys
    fnn.reset_count()
    assert torch.equal(bystander(**data).logits, want)
    assert not fnn.count().fused
    patched = model(**data).logits
    twins = (copy.deepcopy(model), pickle.loads(pickle.dumps(model)))
    for twin in twins:
        assert torch.equal(twin(**data).logits, patched)
    model.save_pretrained(tmp_path)
    loaded, log = type(model).from_pretrained(tmp_path, attn_implementation="eager", output_loading_info=True)
    assert not log["missing_keys"]
    assert not log["unexpected_keys"]
    assert torch.equal(loaded.eval()(**data).logits, want)
    for unpatched in (model, *twins):
        assert ff.unpatch(unpatched) == len(report.replaced)
        assert torch.equal(unpatched(**data).logits, want)
    assert [type(m) for m in model.modules()] == classes
    assert [set(m.__dict__) for m in model.modules()] == attributes


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", [f for f in zoo.FAMILIES if f not in ("bert", "albert")])
def test_gradient_checkpointing(family, reentrant):
    stock, patched = pair(family)
    ff.patch(patched)
    patched.gradient_checkpointing_enable({"use_reentrant": reentrant})
    data = data_for(family, LENGTHS)
    data["labels"] = torch.tensor([0, 1, 2, 0])
    assert_same(stock, patched, data)


@pytest.mark.parametrize("family", zoo.DECODERS)
def test_generation_equals_stock(family):
    stock, patched = (m.eval() for m in pair(family, "ForCausalLM"))
    ff.patch(patched)
    data = data_for(family, [4, 9, 6], "left", width=9)
    ask = {"max_new_tokens": 8, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    a, b = stock.generate(**data, **ask), patched.generate(**data, **ask)
    assert torch.equal(a.sequences, b.sequences)
    for x, y in zip(a.scores, b.scores, strict=True):
        assert zoo.relative(y, x) < 1e-5


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_attention_weights(family, implementation):
    stock = zoo.build(family, "Model").eval()
    patched = zoo.build(family, "Model").eval()
    ff.patch(patched)
    if implementation == "sdpa" and family in zoo.DECODERS and zoo.IS_5 and family not in ("gpt_oss", "gemma2"):
        patched.set_attn_implementation("sdpa")
    data = data_for(family, LENGTHS)
    a, b = (m(**data, output_attentions=True).attentions for m in (stock, patched))
    real = data["attention_mask"].bool()
    for x, y in zip(a, b, strict=True):
        # Queries that are padding are nobody's; the sink of a GPT-OSS row is in neither.
        assert zoo.relative(y.transpose(1, 2)[real], x.transpose(1, 2)[real]) < 1e-5


@pytest.mark.parametrize("family", zoo.LATER)
def test_families_of_another_shape_are_reported_and_unharmed(family):
    stock, patched = pair(family)
    report = ff.patch(patched)
    assert report.skipped
    data = data_for(family, LENGTHS)
    data["labels"] = torch.tensor([0, 1, 2, 0])
    a, b = stock(**data), patched(**data)
    a.loss.backward()
    b.loss.backward()
    assert zoo.relative(b.logits, a.logits) < 1e-5
    zoo.assert_same_gradients(stock, patched)


def test_torch_save_of_a_routed_model():
    model = zoo.build("llama", HEAD).eval()
    ff.patch(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    data = data_for("llama", LENGTHS)
    loaded = torch.load(buffer, weights_only=False)
    assert torch.equal(loaded(**data).logits, model(**data).logits)
