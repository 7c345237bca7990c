"""Losses of heads, through cross_entropy and without logits: stock's numbers, and stock's way where ours cannot."""

import copy

import pytest
import torch

import fastformer as ff
import fastformer.nn as fnn
from fastformer.ops.packing import Packing

transformers = pytest.importorskip("transformers", minversion="4.57")
import zoo  # noqa: E402

LENGTHS = [4, 20, 9]
LANGUAGE = [*zoo.FAMILIES, *zoo.SEQ2SEQ]


def language_model(family, **changes):
    if family in ("gemma2", "gemma3"):
        changes = {"final_logit_softcapping": 2.0, **changes}
    if family in zoo.SEQ2SEQ:
        head = "ForConditionalGeneration"
    else:
        head = "ForMaskedLM" if family in zoo.ENCODERS else "ForCausalLM"
    return zoo.build(family, head, **changes).train()


def pad_of(family):
    return zoo.ALL[family][1].get("pad_token_id", 0)


def language_batch(family, seed=1):
    data = zoo.batch(LENGTHS, pad=pad_of(family), seed=seed)
    labels = torch.where(data["attention_mask"].bool(), data["input_ids"], -100)
    labels[0, 1] = -100
    return {**data, "labels": labels[:, :7].contiguous() if family in zoo.SEQ2SEQ else labels}


def assert_same_loss(stock, patched, data, **asked):
    stock.zero_grad()
    patched.zero_grad()
    a, b = stock(**data, **asked), patched(**data, **asked)
    assert zoo.relative(b.loss, a.loss) < 1e-6
    assert b.loss.dtype == a.loss.dtype
    a.loss.backward()
    b.loss.backward()
    zoo.assert_same_gradients(stock, patched)
    return a, b


@pytest.mark.parametrize("fused_loss", [False, True])
@pytest.mark.parametrize("family", LANGUAGE)
def test_language_models(family, fused_loss):
    stock, patched = language_model(family), language_model(family)
    report = ff.patch(patched, fused_loss=fused_loss)
    what = "loss without logits in training" if fused_loss else "fused cross-entropy"
    assert ("", what) in report.replaced
    data = language_batch(family)
    for asked in ({}, {"num_items_in_batch": torch.tensor(17)}, {"num_items_in_batch": 17}):
        if asked and family not in zoo.DECODERS and not zoo.IS_5:
            continue
        fnn.reset_count()
        a, b = assert_same_loss(stock, patched, data, **asked)
        assert not fnn.count().fallback
        assert fnn.count().fused[type(stock).__name__] >= 1
        if fused_loss:
            assert b.logits is None
        else:
            assert zoo.relative(b.logits[data["labels"] != -100], a.logits[data["labels"] != -100]) < 1e-5
    # A decoder in training fills no cache unless it is asked to.
    missing = {"past_key_values", "logits"} if fused_loss else {"past_key_values"}
    assert [name for name in b if name not in missing] == [name for name in a if name not in missing]
    # Evaluation has logits, and so has a call without labels.
    a, b = stock.eval()(**data), patched.eval()(**data)
    assert zoo.relative(b.loss, a.loss) < 1e-6
    assert zoo.relative(b.logits[data["labels"] != -100], a.logits[data["labels"] != -100]) < 1e-5
    assert patched.train()(input_ids=data["input_ids"], **_decoder_inputs(family)).logits is not None
    ff.unpatch(patched)
    assert torch.equal(patched.eval()(**data).loss, a.loss)


def _decoder_inputs(family):
    return {"decoder_input_ids": torch.ones(len(LENGTHS), 3, dtype=torch.long)} if family in zoo.SEQ2SEQ else {}


@pytest.mark.parametrize("family", ["bert", "llama", "gemma2", "bart"])
def test_half_precision_losses_are_stocks(family):
    if family not in zoo.FAMILIES and family not in zoo.SEQ2SEQ:
        pytest.skip("another shape in this transformers")
    stock = language_model(family)
    exact = stock(**language_batch(family)).loss.item()
    errors, dtypes = [], []
    for make in (lambda m: m, ff.patch, lambda m: ff.patch(m, fused_loss=True)):
        model = copy.deepcopy(stock).to(torch.bfloat16)
        make(model)
        loss = model(**language_batch(family)).loss
        errors.append(abs(loss.item() - exact))
        dtypes.append(loss.dtype)
    assert dtypes[0] == dtypes[1] == dtypes[2]
    # One rounding to bf16 of a loss near 5 is up to 2^-7.
    assert max(errors[1:]) <= 2 * errors[0] + (2**-7 if dtypes[0] == torch.bfloat16 else 2e-3)


def test_no_logits_are_kept():
    sizes = []
    for fused_loss in (False, True):
        model = zoo.build("llama", "ForCausalLM", vocab_size=997).train()
        ff.patch(model, fused_loss=fused_loss)
        seen = set()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, seen=seen: (seen.add(tuple(t.shape)), t)[1], lambda t: t
        ):
            model(**language_batch("llama")).loss.backward()
        # A shape with the vocabulary in it is one of logits, unless it is the weight's.
        sizes.append([shape for shape in seen if 997 in shape and 48 not in shape])
    assert sizes[0]
    assert not sizes[1]


@pytest.mark.parametrize("labels", ["single", "several", "regression", "int32", "own"])
@pytest.mark.parametrize("family", ["bert", "distilbert", "gpt2", "llama", "modernbert"])
def test_sequence_heads(family, labels):
    if family not in zoo.FAMILIES:
        pytest.skip("another shape in this transformers")
    changes = {"num_labels": 1} if labels == "regression" else {}
    stock, patched = (zoo.build(family, "ForSequenceClassification", **changes).train() for _ in range(2))
    ff.patch(patched)
    data = zoo.batch(LENGTHS, pad=pad_of(family))
    data["labels"] = {
        "single": torch.tensor([0, 2, 1]),
        "several": torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]),
        "regression": torch.tensor([0.5, -1.0, 2.0]),
        "int32": torch.tensor([0, 2, 1], dtype=torch.int32),
        "own": torch.tensor([0, 2, 1]),
    }[labels]
    if labels == "own":
        for model in (stock, patched):
            model.loss_function = lambda labels, pooled_logits, **kwargs: pooled_logits.square().sum()
    if labels == "int32":
        for model in (stock, patched):
            with pytest.raises(RuntimeError):
                model(**data)
        return
    fnn.reset_count()
    assert_same_loss(stock, patched, data)
    assert patched.config.problem_type == stock.config.problem_type
    calls_function = family == "llama"
    head = type(stock).__name__
    fused = labels == "single" or (labels == "own" and not calls_function)
    assert fnn.count().fused[head] == fused
    assert bool(fnn.count().fallback) == (labels in ("several", "regression"))


@pytest.mark.parametrize("family", ["bert", "llama", "vit"])
def test_token_and_image_heads(family):
    if family == "vit":
        settings = {"image_size": 16, "patch_size": 4, "num_labels": 3, "num_hidden_layers": 1, "hidden_size": 48}
        config = transformers.ViTConfig(
            num_attention_heads=4, intermediate_size=80, hidden_dropout_prob=0.0, **settings
        )
        torch.manual_seed(0)
        stock = transformers.ViTForImageClassification(config).train()
        data = {"pixel_values": torch.randn(3, 3, 16, 16), "labels": torch.tensor([0, 2, 1])}
    else:
        stock = zoo.build(family, "ForTokenClassification", classifier_dropout=0.0).train()
        data = zoo.batch(LENGTHS, pad=pad_of(family))
        data["labels"] = torch.where(data["attention_mask"].bool(), data["input_ids"] % 3, -100)
    patched = copy.deepcopy(stock)
    ff.patch(patched)
    fnn.reset_count()
    assert_same_loss(stock, patched, data)
    assert fnn.count().fused[type(stock).__name__] == 1
    a, b = (model(**data, return_dict=False) for model in (stock, patched))
    assert len(a) == len(b)
    assert zoo.relative(b[0], a[0]) < 1e-6


def test_what_needs_logits_gets_them_and_is_reported():
    stock = language_model("llama")
    data = language_batch("llama")
    hooked, kept, resized, own = (copy.deepcopy(stock) for _ in range(4))
    hooked.lm_head.register_forward_hook(lambda *a: None)
    assert any("output layer is hooked" in why for _, why in ff.patch(hooked, fused_loss=True).skipped)
    for model in (kept, resized, own):
        ff.patch(model, fused_loss=True)
    resized.set_output_embeddings(torch.nn.Linear(48, zoo.VOCAB, bias=False))
    own.loss_function = lambda logits, labels, **kwargs: logits.square().mean()
    reasons = []
    short = {**data, "labels": data["labels"][:, -5:].contiguous()}
    for model, batch, asked in (
        (hooked, data, {}), (kept, short, {"logits_to_keep": 5}), (resized, data, {}), (own, data, {}),
    ):  # fmt: skip
        fnn.reset_count()
        assert model(**batch, **asked).logits.shape[-1] == zoo.VOCAB
        reasons += [why for (_, why) in fnn.count().fallback]
    assert reasons == [
        "logits are computed: logits_to_keep",
        "logits are computed: its output layer was replaced",
        "logits are computed: its loss function is somebody's own",
    ]
    assert zoo.relative(own(**data).loss, own(**data).logits.square().mean()) < 1e-6
    report = ff.patch(zoo.build("bert", "ForSequenceClassification"), fused_loss=True)
    assert any("found no language model's head" in note for note in report.notes)
    with pytest.raises(ValueError, match="fused_loss must be True or False"):
        ff.patch(stock, fused_loss="linear")


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("wrapped", ["target_modules", "modules_to_save"])
def test_adapters_on_the_output_layer(wrapped, when):
    peft = pytest.importorskip("peft")
    models = []
    for patched in (False, True):
        model = language_model("llama", tie_word_embeddings=False)
        settings = {"target_modules": ["q_proj"]}
        settings[wrapped] = [*settings.get(wrapped, []), "lm_head"]
        if patched and when == "before":
            ff.patch(model, fused_loss=True)
        torch.manual_seed(3)
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, init_lora_weights=False, **settings))
        if patched and when == "after":
            report = ff.patch(model, fused_loss=True)
            assert any("its loss takes logits: its output layer is a" in why for _, why in report.skipped)
        models.append(model)
    fnn.reset_count()
    _, b = assert_same_loss(*models, language_batch("llama"))
    assert b.logits is not None
    if when == "before":
        assert fnn.count().fallback["LlamaForCausalLM", "logits are computed: its output layer was replaced"] == 1


def test_tied_and_resized_embeddings():
    stock, patched = (language_model("llama", tie_word_embeddings=True) for _ in range(2))
    ff.patch(patched, fused_loss=True)
    for model in (stock, patched):
        torch.manual_seed(2)
        model.resize_token_embeddings(zoo.VOCAB + 7, mean_resizing=False)
        assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_same_loss(stock, patched, language_batch("llama"))
    # Patched again, the new output layer is known.
    ff.patch(patched, fused_loss=True)
    _, b = assert_same_loss(stock, patched, language_batch("llama"))
    assert b.logits is None


def test_label_smoothing_and_accumulation_of_trainer(tmp_path):
    pytest.importorskip("accelerate")
    rows = [{"input_ids": list(range(3, 3 + n)), "labels": list(range(3, 3 + n))} for n in (4, 9, 6, 12) * 6]

    def collate(examples):
        longest = max(len(e["input_ids"]) for e in examples)
        fill = {"input_ids": 0, "labels": -100}
        batch = {
            name: torch.tensor([e[name] + [value] * (longest - len(e[name])) for e in examples])
            for name, value in fill.items()
        }
        return {**batch, "attention_mask": (batch["input_ids"] != 0).long()}

    for settings in ({"label_smoothing_factor": 0.1}, {"gradient_accumulation_steps": 3}):
        runs = []
        for kind in ("stock", "patched", "linear"):
            model = language_model("llama")
            if kind != "stock":
                ff.patch(model, fused_loss=kind == "linear")
            arguments = transformers.TrainingArguments(
                output_dir=str(tmp_path), per_device_train_batch_size=2, max_steps=4, learning_rate=1e-3,
                logging_steps=1, report_to=[], use_cpu=True, seed=7, disable_tqdm=True, save_strategy="no", **settings,
            )  # fmt: skip
            runner = transformers.Trainer(
                model, arguments, train_dataset=rows, eval_dataset=rows[:4], data_collator=collate
            )
            runner.train()
            losses = [entry["loss"] for entry in runner.state.log_history if "loss" in entry]
            runs.append([*losses, runner.evaluate()["eval_loss"]])
        for other in runs[1:]:
            assert max(abs(a - b) for a, b in zip(runs[0], other, strict=True)) < 1e-4
        assert runs[0][0] > runs[0][3]


CLASSIFIERS = [name for name in ("bert", "roberta", "electra", "albert", "distilbert") if name in zoo.ENCODERS]


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_classifiers_get_the_first_places_back_and_no_padding(family, monkeypatch):
    stock, patched = (zoo.build(family, "ForSequenceClassification").train() for _ in range(2))
    ff.patch(patched)
    padded, pad = [], Packing.pad
    monkeypatch.setattr(Packing, "pad", lambda self, rows: padded.append(rows) or pad(self, rows))
    labels = {"labels": torch.tensor([2, 0, 1])}
    a, b = assert_same_loss(stock, patched, {**zoo.batch(LENGTHS, pad=pad_of(family)), **labels})
    assert zoo.relative(b.logits, a.logits) < 1e-5
    assert not padded
    # A row without tokens has no first place. Stock makes something of it; the others have their logits.
    data = zoo.batch([4, 0, 9], pad=pad_of(family))
    a, b = stock(**data), patched(**data)
    assert zoo.relative(b.logits[::2], a.logits[::2]) < 1e-5
    assert padded


class _Mean(torch.nn.Linear):
    def forward(self, states):
        return super().forward(states.mean(1))


def test_another_head_gets_every_place():
    """What somebody puts in place of a stock head may pool as it likes."""
    stock, patched = (zoo.build("roberta", "ForSequenceClassification") for _ in range(2))
    stock.classifier = torch.nn.Sequential(_Mean(48, 3))
    patched.classifier = copy.deepcopy(stock.classifier)
    ff.patch(patched)
    data = {"input_ids": torch.full((2, 6), 5), "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2])}
    seen = []
    patched.classifier.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    with_hook = patched(**data).logits
    patched.classifier._forward_pre_hooks.clear()
    assert torch.equal(patched(**data).logits, with_hook)
    assert seen == [(2, 6, 48)]
    assert zoo.relative(with_hook[:1], stock(**data).logits[:1]) < 1e-5


@pytest.mark.parametrize(("family", "part"), [("bert", "bert"), ("bert", "bert.pooler"), ("roberta", "classifier")])
def test_who_looks_on_sees_every_place(family, part):
    model = zoo.build(family, "ForSequenceClassification").train()
    ff.patch(model)
    seen = []
    look = lambda module, args, out: seen.append(args[0] if part != "bert" else out[0])  # noqa: E731
    handle = model.get_submodule(part).register_forward_hook(look)
    data = zoo.batch(LENGTHS, pad=pad_of(family))
    hooked = model(**data).logits
    handle.remove()
    assert seen[0].shape[:2] == data["input_ids"].shape
    torch.testing.assert_close(model(**data).logits, hooked)
    assert model(**data, output_hidden_states=True).hidden_states[-1].shape[:2] == data["input_ids"].shape
