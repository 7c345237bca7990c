"""The loops people have, with one line more: same losses and same weights as without it."""

import pytest
import torch

import fastformer as ff
import fastformer.nn as fnn

transformers = pytest.importorskip("transformers", minversion="5")
import zoo  # noqa: E402

from fastformer.integrations.transformers import PackedCollator, TokenBudget  # noqa: E402

HEAD = "ForSequenceClassification"


def rows(count=48, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, zoo.WIDTH + 1, (count,), generator=generator).tolist()
    ids = [torch.randint(3, zoo.VOCAB, (n,), generator=generator).tolist() for n in lengths]
    return [{"input_ids": row, "labels": sum(row) % 3} for row in ids]


def pad(examples, pad_id=0):
    longest = max(len(e["input_ids"]) for e in examples)
    ids = [e["input_ids"] + [pad_id] * (longest - len(e["input_ids"])) for e in examples]
    mask = [[1] * len(e["input_ids"]) + [0] * (longest - len(e["input_ids"])) for e in examples]
    labels = [e["labels"] for e in examples]
    return {k: torch.tensor(v) for k, v in (("input_ids", ids), ("attention_mask", mask), ("labels", labels))}


def assert_same_weights(stock, other, tolerance=1e-4):
    for (name, p), q in zip(stock.named_parameters(), other.parameters(), strict=True):
        # Adam divides a gradient by its own size: one that is rounding alone (a key's bias) still moves.
        if not name.endswith(("key.bias", "k_lin.bias")):
            assert zoo.relative(q.detach(), p.detach()) < tolerance, name


def train(model, steps=12, accumulate=2, frozen=()):
    """Plain PyTorch: AdamW, warm-up and cosine decay, clipping, accumulation."""
    for name, p in model.named_parameters():
        p.requires_grad_(not name.startswith(frozen) if frozen else True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, 2, steps)
    data, losses = rows(), []
    for step in range(steps * accumulate):
        batch = pad([data[(step * 4 + i) % len(data)] for i in range(4)])
        loss = model(**batch).loss
        (loss / accumulate).backward()
        losses.append(loss.item())
        if step % accumulate == accumulate - 1:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("family", ["roberta", "distilbert", "modernbert", "gpt2", "llama", "gemma2"])
def test_plain_loop(family):
    losses = []
    for patched in (False, True):
        model = zoo.build(family, HEAD).train()
        if patched:
            assert ff.patch(model)
        losses.append(train(model))
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 1e-4
    assert losses[0][0] != losses[0][-1]


def test_frozen_layers_get_no_gradient():
    models = [zoo.build("bert", HEAD).train() for _ in range(2)]
    ff.patch(models[1])
    losses = [train(model, frozen=("bert.embeddings", "bert.encoder.layer.0")) for model in models]
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 1e-4
    assert models[1].bert.encoder.layer[0].output.LayerNorm.weight.grad is None


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta", "llama"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(family, dtype):
    """No further from fp32 than stock under autocast, in the same dtypes: logits, hidden states, gradients."""
    batch, found = pad(rows(4)), []
    real = batch["attention_mask"][..., None]
    for patched, lower in ((False, False), (False, True), (True, True)):
        model = zoo.build(family, HEAD).train()
        if patched:
            ff.patch(model)
        with torch.autocast("cpu", dtype=dtype, enabled=lower):
            out = model(**batch, output_hidden_states=True)
        out.loss.backward()
        grads = [p.grad for p in model.parameters()]
        found.append([out.logits, out.loss, *(h * real for h in out.hidden_states), *grads])
    for gold, stock, ours in zip(*found, strict=True):
        assert (stock is None) == (ours is None)
        if stock is not None:
            assert ours.dtype == stock.dtype
            allowed = 2 * (stock - gold).norm() + 8 * torch.finfo(dtype).eps * gold.norm()
            assert (ours - gold).norm() <= allowed


def trainer(model, folder, collate, sampler=None, **settings):
    pytest.importorskip("accelerate")
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=8, per_device_eval_batch_size=8, max_steps=6,
        learning_rate=1e-3, logging_steps=1, report_to=[], use_cpu=True, seed=7, remove_unused_columns=False,
        disable_tqdm=True, **settings,
    )  # fmt: skip
    return transformers.Trainer(
        model, arguments, train_dataset=rows(), eval_dataset=rows(16, seed=5), data_collator=collate
    )


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_trainer(family, checkpointing, tmp_path):
    runs = []
    for name in ("stock", "patched", "packed"):
        model = zoo.build(family, HEAD)
        if name != "stock":
            ff.patch(model)
        collate = PackedCollator.for_model(model) if name == "packed" else pad
        runner = trainer(model, tmp_path / name, collate, gradient_checkpointing=checkpointing)
        fnn.reset_count()
        runner.train()
        if name != "stock":
            assert not fnn.count().fallback
        losses = [entry["loss"] for entry in runner.state.log_history if "loss" in entry]
        runs.append((losses, runner.evaluate()["eval_loss"], model))
    (losses, evaluation, stock), *others = runs
    for other_losses, other_evaluation, model in others:
        assert max(abs(a - b) for a, b in zip(losses, other_losses, strict=True)) < 1e-4
        assert abs(evaluation - other_evaluation) < 1e-4
        assert_same_weights(stock, model)


def test_trainer_saves_and_resumes(tmp_path):
    model = zoo.build("bert", HEAD)
    ff.patch(model)
    trainer(model, tmp_path, pad, save_steps=3).train()
    again = zoo.build("bert", HEAD, seed=1)
    ff.patch(again)
    trainer(again, tmp_path, pad, save_steps=3).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_same_weights(model, again, 1e-6)
    loaded = type(model).from_pretrained(tmp_path / "checkpoint-6")
    assert list(loaded.state_dict()) == list(model.state_dict())


def test_accelerate_with_a_token_budget():
    accelerate = pytest.importorskip("accelerate")
    results = []
    for patched in (False, True):
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        model = zoo.build("roberta", HEAD).train()
        data = rows()
        if patched:
            ff.patch(model)
        collate = PackedCollator.for_model(model, max_tokens=80) if patched else lambda batch: pad(batch, pad_id=1)
        sampler = TokenBudget([len(row["input_ids"]) for row in data], 80, seed=2)
        loader = torch.utils.data.DataLoader(data, batch_sampler=sampler, collate_fn=collate)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        losses = []
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
        results.append(losses)
    assert len(results[0]) > 4
    assert max(abs(a - b) for a, b in zip(*results, strict=True)) < 1e-4


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("family", "targets"), [("bert", ["query", "dense"]), ("llama", ["q_proj", "down_proj"])])
def test_lora(family, targets, when):
    peft = pytest.importorskip("peft")
    models = []
    for patched in (False, True):
        model = zoo.build(family, HEAD).train()
        if patched and when == "before":
            ff.patch(model)
        config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=targets, r=4, init_lora_weights="gaussian")
        torch.manual_seed(3)
        model = peft.get_peft_model(model, config)
        if patched and when == "after":
            ff.patch(model)
        torch.manual_seed(4)
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.1)
        models.append(model)
    stock, patched = models
    data = pad(rows(6))
    fnn.reset_count()
    a, b = stock(**data), patched(**data)
    assert not fnn.count().fallback
    a.loss.backward()
    b.loss.backward()
    assert zoo.relative(b.logits, a.logits) < 1e-5
    zoo.assert_same_gradients(stock, patched)
    merged = patched.merge_and_unload()
    ff.unpatch(merged)
    assert zoo.relative(merged.eval()(**data).logits, stock.merge_and_unload().eval()(**data).logits) < 1e-5


def test_modules_to_save_are_not_bypassed():
    peft = pytest.importorskip("peft")
    model = zoo.build("bert", HEAD).train()
    ff.patch(model)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["query"], modules_to_save=["LayerNorm"], r=2))
    fnn.reset_count()
    model(**pad(rows(4))).loss.backward()
    assert fnn.count().fallback["BertOutput", "LayerNorm or dropout is hooked or replaced"] == 4
    trained = [p for name, p in model.named_parameters() if "modules_to_save" in name and "encoder" in name]
    assert trained
    assert all(p.grad is not None for p in trained)
