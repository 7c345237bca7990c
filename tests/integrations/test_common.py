"""What every Hugging Face model is expected to do, done by a patched one and compared with stock.

The families are those whose own tests matter most; the list of expectations follows what transformers promises of a
PreTrainedModel: outputs, shapes, checkpoints, embeddings, generation, training.
"""

import copy
import inspect

import pytest
import torch

import fastformer as ff
import fastformer.nn as fnn

transformers = pytest.importorskip("transformers", minversion="5")
import zoo  # noqa: E402

ENCODERS = ("bert", "roberta", "distilbert")
DECODERS = ("gpt2", "llama")
SEQ2SEQ = ("t5", "bart", "mbart")
TEXT = (*ENCODERS, *DECODERS, *SEQ2SEQ)
ALL = (*TEXT, "vit")
GENERATIVE = (*DECODERS, *SEQ2SEQ)
LENGTHS = [4, 20, 9]

every = pytest.mark.parametrize("family", ALL)
text = pytest.mark.parametrize("family", TEXT)
generative = pytest.mark.parametrize("family", GENERATIVE)


def main_head(family):
    """The head that is trained on a family most."""
    heads = {"vit": "ForImageClassification", **dict.fromkeys(SEQ2SEQ, "ForConditionalGeneration")}
    return heads.get(family, "ForCausalLM" if family in DECODERS else "ForMaskedLM")


def pair(family, head="Model", **changes):
    stock = zoo.build(family, head, **changes).eval()
    patched = copy.deepcopy(stock)
    assert ff.patch(patched)
    return stock, patched


def inputs(family, lengths=LENGTHS, labels=False, seed=1):
    if family == "vit":
        generator = torch.Generator().manual_seed(seed)
        data = {"pixel_values": torch.randn(len(lengths), 3, 16, 16, generator=generator)}
        return {**data, "labels": torch.arange(len(lengths)) % 3} if labels else data
    data = zoo.batch(lengths, pad=zoo.ALL[family][1].get("pad_token_id", 0), seed=seed)
    targets = zoo.batch([9, 3, 7][: len(lengths)], width=9, seed=seed + 1)
    own = targets if family in SEQ2SEQ else data
    if labels:
        data["labels"] = torch.where(own["attention_mask"].bool(), own["input_ids"], -100)
    elif family in SEQ2SEQ:
        data |= {f"decoder_{name}": value for name, value in targets.items()}
    return data


def first(out):
    return out[0] if isinstance(out[0], torch.Tensor) else out[0][0]


def where_real(family, data, width):
    """Rows of [batch, width, ...] that stand for a token, as a mask."""
    for name in ("decoder_attention_mask", "attention_mask"):
        if name in data and data[name].shape[1] == width:
            return data[name].bool()
    return torch.ones(next(iter(data.values())).shape[0], width, dtype=torch.bool)


def assert_close(family, data, stock, patched, tolerance=1e-5):
    """Two outputs, field by field, at real tokens."""
    assert type(stock) is type(patched)
    assert list(stock) == list(patched)
    for name in stock:
        a, b = stock[name], patched[name]
        if isinstance(a, torch.Tensor):
            a, b = (a,), (b,)
        if not (isinstance(a, tuple) and all(isinstance(t, torch.Tensor) for t in a)):
            continue  # a cache
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert x.shape == y.shape, name
            assert x.dtype == y.dtype, name
            if x.ndim == 4:
                x, y = x.transpose(1, 2), y.transpose(1, 2)  # attention weights, a row a query
            if x.ndim > 2:
                real = where_real(family, data, x.shape[1])
                x, y = x[real], y[real]
            assert zoo.relative(y, x) < tolerance, name


@every
def test_calls_repeat_bit_for_bit(family):
    _, patched = pair(family)
    data = inputs(family)
    assert torch.equal(first(patched(**data)), first(patched(**data)))


@every
def test_signatures_and_errors(family):
    stock, patched = pair(family, main_head(family))
    assert inspect.signature(patched.forward) == inspect.signature(stock.forward)
    for (_, a), (_, b) in zip(stock.named_modules(), patched.named_modules(), strict=True):
        assert inspect.signature(b.forward) == inspect.signature(a.forward)
    with pytest.raises(Exception) as wanted:
        stock()
    with pytest.raises(wanted.type):
        patched()


@every
def test_saved_and_loaded(family, tmp_path):
    stock, patched = pair(family, main_head(family))
    data = inputs(family)
    patched.save_pretrained(tmp_path / "patched")
    stock.save_pretrained(tmp_path / "stock")
    for kind in ("Model", main_head(family)):
        cls = type(zoo.build(family, kind))
        loaded, logs = [], []
        for name in ("stock", "patched"):
            torch.manual_seed(0)
            model, log = cls.from_pretrained(tmp_path / name, output_loading_info=True, attn_implementation="eager")
            loaded.append(model.eval())
            logs.append({key: sorted(map(str, log[key])) for key in log})
        assert logs[0] == logs[1]
        for a, b in zip(*(model.state_dict().items() for model in loaded), strict=True):
            assert a[0] == b[0]
            assert torch.equal(a[1], b[1])
    configs = [{**model.config.to_dict(), "_name_or_path": None} for model in loaded]
    assert configs[0] == configs[1]
    want = first(patched(**data))
    ff.patch(loaded[1])
    assert torch.equal(first(loaded[1](**data)), want)


@text
def test_resized_embeddings(family):
    stock, patched = pair(family, main_head(family))
    for model in (stock, patched):
        torch.manual_seed(0)
        model.resize_token_embeddings(zoo.VOCAB + 10, mean_resizing=False)
        assert model.get_input_embeddings().weight.shape[0] == zoo.VOCAB + 10
    data = inputs(family, labels=True)
    data["input_ids"][0, 0] = zoo.VOCAB + 3
    a, b = stock.train()(**data), patched.train()(**data)
    a.loss.backward()
    b.loss.backward()
    assert b.logits.shape[-1] == zoo.VOCAB + 10
    assert zoo.relative(b.loss, a.loss) < 1e-5
    zoo.assert_same_gradients(stock, patched)


@every
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(family, reentrant):
    stock, patched = pair(family, main_head(family))
    for model in (stock, patched):
        model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert model.is_gradient_checkpointing
        model(**inputs(family, labels=True)).loss.backward()
    zoo.assert_same_gradients(stock, patched)
    patched.gradient_checkpointing_disable()
    assert not patched.is_gradient_checkpointing


@every
@pytest.mark.parametrize("how", ["argument", "configuration"])
def test_hidden_states_and_attentions(family, how):
    stock, patched = pair(family)
    data = inputs(family)
    for wanted in ({"output_hidden_states": True}, {"output_hidden_states": True, "output_attentions": True}):
        asked = wanted if how == "argument" else {}
        if how == "configuration":
            for model in (stock, patched):
                for part in model.modules():
                    for name in wanted if isinstance(part, transformers.PreTrainedModel) else ():
                        setattr(part.config, name, True)
        a, b = stock(**data, **asked), patched(**data, **asked)
        names = [name for name in a if "hidden_states" in name or "attentions" in name]
        assert len(names) >= len(wanted)
        assert_close(family, data, a, b)


@every
def test_tuples_and_dictionaries(family):
    for head in ("Model", main_head(family)):
        stock, patched = pair(family, head)
        data = inputs(family)
        a, b = (model(**data, return_dict=False) for model in (stock, patched))
        named = patched(**data)
        assert type(b) is tuple
        assert len(a) == len(b) == len(named.to_tuple())
        for x, y, z in zip(a, b, named.to_tuple(), strict=True):
            if isinstance(x, torch.Tensor):
                assert torch.equal(y, z)
                assert x.shape == y.shape


@text
def test_embeddings_in_place_of_ids(family):
    stock, patched = pair(family)
    data = inputs(family)
    embeds = stock.get_input_embeddings()(data.pop("input_ids")).detach()
    # RoBERTa tells padding by the id; without ids it counts every place.
    assert_close(family, data, stock(inputs_embeds=embeds, **data), patched(inputs_embeds=embeds, **data))


@text
@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32, torch.uint8])
def test_masks_of_any_dtype(family, dtype):
    stock, patched = pair(family)
    data = inputs(family)
    want = patched(**data)
    masked = {name: value.to(dtype) if name.endswith("mask") else value for name, value in data.items()}
    assert torch.equal(first(patched(**masked)), first(want))
    assert_close(family, data, stock(**data), want)


@text
def test_a_mask_of_ones_is_no_mask(family):
    stock, patched = pair(family)
    data = inputs(family, [20, 20, 20])
    masks = [name for name in data if name == "attention_mask"]
    bare = {name: value for name, value in data.items() if name not in masks}
    assert_close(family, data, stock(**bare), patched(**bare))
    assert_close(family, data, stock(**data), patched(**data))


@every
def test_a_row_alone_is_the_row_in_its_batch(family):
    _, patched = pair(family)
    data = inputs(family)
    whole = first(patched(**data))
    for row, length in enumerate(LENGTHS):
        alone = {name: value[row : row + 1] for name, value in data.items()}
        if "attention_mask" in alone:
            alone = {k: v[:, :length] if k in ("input_ids", "attention_mask") else v for k, v in alone.items()}
        got = first(patched(**alone))[0]
        real = where_real(family, data, whole.shape[1])[row]
        want = whole[row][real]
        assert zoo.relative(got[: len(want)], want) < 1e-5


@every
def test_training_steps(family):
    stock, patched = pair(family, main_head(family))
    losses = []
    for model in (stock, patched):
        optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-3)
        run = []
        for _ in range(4):
            loss = model(**inputs(family, labels=True)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.append(loss.item())
        losses.append(run)
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 1e-4
    assert losses[1][3] < losses[1][0]
    assert [p.grad is None for p in patched.parameters()] == [p.grad is None for p in stock.parameters()]


@text
def test_tied_weights_stay_tied(family):
    stock, patched = pair(family, main_head(family), tie_word_embeddings=True)
    assert len(list(patched.parameters())) == len(list(stock.parameters()))
    for model in (stock, patched):
        optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1)
        model(**inputs(family, labels=True)).loss.backward()
        optimizer.step()
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert zoo.relative(patched.get_input_embeddings().weight, stock.get_input_embeddings().weight) < 1e-5


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_chunked_feed_forward(family):
    stock, patched = pair(family, chunk_size_feed_forward=2)
    data = inputs(family)
    assert_close(family, data, stock(**data), patched(**data))


@every
@pytest.mark.parametrize("padded", [True, False])
def test_gradients_of_hidden_states_and_attentions(family, padded):
    """Somebody looks at the gradients of what a model puts out beside its result."""
    stock, patched = pair(family)
    data = inputs(family, LENGTHS if padded else [20, 20, 20])
    if not padded and family in SEQ2SEQ:
        del data["decoder_attention_mask"]
    kept = []
    for model in (stock, patched):
        out = model.train()(**data, output_hidden_states=True, output_attentions=True)
        seen = [t for name in out if "hidden_states" in name or "attentions" in name for t in out[name]]
        for tensor in seen:
            tensor.retain_grad()
        first(out)[0].square().sum().backward()
        kept.append([tensor.grad for tensor in seen])
    for a, b in zip(*kept, strict=True):
        assert (a is None) == (b is None)
        if a is not None and a.norm() > 1e-6:
            assert zoo.relative(b, a) < 1e-4


@pytest.mark.parametrize("family", ENCODERS)
def test_gradients_of_hidden_states_without_padding(family):
    stock, patched = pair(family)
    data = inputs(family)
    kept = []
    for model in (stock, patched):
        fnn.reset_count()
        out = model.train()(**data, output_hidden_states=True)
        for tensor in out.hidden_states:
            tensor.retain_grad()
        out.last_hidden_state[data["attention_mask"].bool()].square().sum().backward()
        kept.append([tensor.grad for tensor in out.hidden_states])
    assert not fnn.count().fallback
    for a, b in zip(*kept, strict=True):
        assert zoo.relative(b, a) < 1e-5


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(family, dtype):
    stock, patched = pair(family)
    data = inputs(family)
    want = first(stock(**data))
    errors = []
    for model in (stock, patched):
        given = {name: value.to(dtype) if value.is_floating_point() else value for name, value in data.items()}
        out = first(model.to(dtype)(**given))
        assert out.dtype == dtype
        real = where_real(family, data, out.shape[1])
        errors.append((out[real].float() - want[real]).norm() / want[real].norm())
    assert errors[1] <= 2 * errors[0] + torch.finfo(dtype).eps


@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification", "regression"])
@pytest.mark.parametrize("family", [*ENCODERS, *DECODERS, "vit"])
def test_problem_types(family, problem):
    head = "ForImageClassification" if family == "vit" else "ForSequenceClassification"
    labels = {
        "single_label_classification": torch.tensor([0, 2, 1]),
        "multi_label_classification": torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]),
        "regression": torch.tensor([0.5, -1.0, 2.0]),
    }[problem]
    stock, patched = pair(family, head, problem_type=problem, num_labels=1 if problem == "regression" else 3)
    data = inputs(family)
    for model in (stock, patched):
        model.train()(**data, labels=labels).loss.backward()
    zoo.assert_same_gradients(stock, patched)


ASKED = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "samples": {"do_sample": True, "num_return_sequences": 2},
    "no cache": {"do_sample": False, "use_cache": False},
    "one token": {"do_sample": False, "max_new_tokens": 1},
}


@generative
@pytest.mark.parametrize("how", ASKED)
def test_generation(family, how):
    stock, patched = pair(family, main_head(family))
    data = zoo.batch([4, 9, 6], "left", width=9)
    answers = []
    for model in (stock, patched):
        torch.manual_seed(11)
        answers.append(model.generate(**data, **{"max_new_tokens": 8, **ASKED[how]}))
    assert torch.equal(*answers)


@generative
def test_generation_with_attentions(family):
    stock, patched = pair(family, main_head(family))
    data = zoo.batch([4, 9, 6], "left", width=9)
    asked = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    a, b = (m.generate(**data, **asked, output_attentions=True, output_hidden_states=True) for m in (stock, patched))
    for name in a:
        if "attentions" not in name and "hidden_states" not in name:
            continue
        x, y = (torch.utils._pytree.tree_leaves(out[name]) for out in (a, b))
        assert [t.shape for t in x] == [t.shape for t in y]
    assert torch.equal(a.sequences, b.sequences)


@every
def test_export(family):
    """Where stock can be exported, so can a patched model; the number of tokens is data, so padding stays."""
    stock, patched = pair(family, implementation="sdpa")
    data = inputs(family)
    data = {name: value for name, value in data.items() if not name.startswith("decoder_attention")}
    asked = {"use_cache": False} if family in GENERATIVE else {}
    torch.export.export(stock, (), {**data, **asked}, strict=False)
    program = torch.export.export(patched, (), {**data, **asked}, strict=False)
    got = program.module()(**data, **asked)
    assert_close(family, data, stock(**data, **asked), got)
