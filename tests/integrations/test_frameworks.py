"""Other people's loops and wrappers around a patched model: the same numbers as around a stock one."""

import os
import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import fastformer as ff
import fastformer.nn as fnn

transformers = pytest.importorskip("transformers", minversion="5")
import zoo  # noqa: E402

HEAD = "ForSequenceClassification"
WORLD = 2


def rows(count=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, zoo.WIDTH + 1, (count,), generator=generator).tolist()
    ids = [torch.randint(3, zoo.VOCAB, (n,), generator=generator).tolist() for n in lengths]
    return [{"input_ids": row, "labels": sum(row) % 3} for row in ids]


def pad(examples):
    longest = max(len(e["input_ids"]) for e in examples)
    ids = torch.tensor([e["input_ids"] + [0] * (longest - len(e["input_ids"])) for e in examples])
    labels = torch.tensor([e["labels"] for e in examples])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}


def both(family="bert", head=HEAD, **changes):
    stock, patched = (zoo.build(family, head, **changes).train() for _ in range(2))
    assert ff.patch(patched)
    return stock, patched


def assert_same_losses(runs, tolerance=1e-4):
    stock, patched = runs
    assert len(stock) == len(patched) > 3
    assert max(abs(a - b) for a, b in zip(stock, patched, strict=True)) < tolerance
    assert stock[0] != stock[-1]


def steps(model, count=6, after=lambda step: None):
    """Losses of a plain loop."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    data, losses = rows(), []
    for step in range(count):
        loss = model(**pad(data[4 * step : 4 * step + 4])).loss
        loss.backward()
        optimizer.step()
        after(step)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.filterwarnings("ignore")
def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning")

    class Tuned(lightning.LightningModule):
        def __init__(self, model):
            super().__init__()
            self.model, self.losses = model, []

        def training_step(self, batch, index):
            loss = self.model(**batch).loss
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=5e-3)
            schedule = transformers.get_linear_schedule_with_warmup(optimizer, 1, 4)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    runs = []
    for model in both("roberta"):
        tuned = Tuned(model)
        trainer = lightning.Trainer(
            max_epochs=1, accelerator="cpu", devices=1, accumulate_grad_batches=2, gradient_clip_val=1.0, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            default_root_dir=tmp_path,
        )  # fmt: skip
        fnn.reset_count()
        trainer.fit(tuned, torch.utils.data.DataLoader(rows(), batch_size=4, collate_fn=pad))
        assert not fnn.count().fallback
        runs.append(tuned.losses)
    assert_same_losses(runs)


def test_adalora():
    peft = pytest.importorskip("peft")
    runs = []
    for model in both():
        torch.manual_seed(3)
        config = peft.AdaLoraConfig(
            task_type="SEQ_CLS", init_r=4, target_r=2, tinit=1, tfinal=1, deltaT=1, total_step=6,
            target_modules=["query", "value", "dense"],
        )  # fmt: skip
        adapted = peft.get_peft_model(model, config).train()
        torch.manual_seed(4)
        for name, parameter in adapted.named_parameters():
            if "lora_E" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        fnn.reset_count()
        runs.append(steps(adapted, after=adapted.base_model.update_and_allocate))
        assert not fnn.count().fallback
    assert_same_losses(runs)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_prefix_tuning(family):
    peft = pytest.importorskip("peft")
    runs = []
    for model in both(family):
        torch.manual_seed(3)
        config = peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
        runs.append(steps(peft.get_peft_model(model, config).train()))
    assert_same_losses(runs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_quantization_aware_training(family):
    quantization = pytest.importorskip("torchao.quantization")
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    fake = QATConfig(weight_config=IntxFakeQuantizeConfig(torch.int8, "per_channel"), step="prepare")
    runs, answers = [], []
    for model in both(family):
        quantization.quantize_(model, fake)
        fnn.reset_count()
        runs.append(steps(model))
        assert not fnn.count().fallback
        with torch.no_grad():
            answers.append(model.eval()(**pad(rows(4, seed=5))).logits)
    assert abs(runs[0][0] - runs[1][0]) < 1e-5
    # Later a weight that rounds up here and down there is one step of the grid apart.
    assert_same_losses(runs, 2e-2)
    assert zoo.relative(answers[1], answers[0]) < 2e-2


@pytest.mark.filterwarnings("ignore")
def test_quantized_weights():
    quantization = pytest.importorskip("torchao.quantization")
    answers = []
    for model in both():
        quantization.quantize_(model.eval(), quantization.Int8WeightOnlyConfig())
        with torch.no_grad():
            answers.append(model(**pad(rows(4))).logits)
    assert zoo.relative(answers[1], answers[0]) < 1e-3


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_early_stopping_of_trainer(schedule, tmp_path):
    pytest.importorskip("accelerate")
    stops = []
    for name, model in zip(("stock", "patched"), both("distilbert"), strict=True):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / name), per_device_train_batch_size=8, max_steps=12, learning_rate=2e-2,
            lr_scheduler_type=schedule, warmup_steps=2, eval_strategy="steps", eval_steps=1, save_strategy="steps",
            save_steps=1, load_best_model_at_end=True, metric_for_best_model="eval_loss", save_total_limit=1,
            report_to=[], use_cpu=True, seed=7, disable_tqdm=True,
        )  # fmt: skip
        trainer = transformers.Trainer(
            model, arguments, train_dataset=rows(), eval_dataset=rows(8, seed=5), data_collator=pad,
            callbacks=[transformers.EarlyStoppingCallback(2)],
        )  # fmt: skip
        trainer.train()
        seen = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        stops.append((trainer.state.global_step, trainer.state.best_global_step, seen))
    (step, best, losses), other = stops
    assert (step, best) == other[:2]
    assert step < 12
    assert max(abs(a - b) for a, b in zip(losses, other[2], strict=True)) < 1e-3


def _data_parallel(rank, fused_loss):
    batches = [pad(rows()[4 * other : 4 * other + 4]) for other in range(WORLD)]
    for batch in batches if fused_loss else ():
        batch["labels"] = torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)
    stock, patched = (zoo.build("bert", "ForMaskedLM" if fused_loss else HEAD).train() for _ in range(2))
    ff.patch(patched, fused_loss=fused_loss)
    wrapped = torch.nn.parallel.DistributedDataParallel(patched)
    fnn.reset_count()
    wrapped(**batches[rank]).loss.backward()
    assert not fnn.count().fallback
    # Gradients of processes are averaged.
    sum(stock(**batch).loss for batch in batches).div(WORLD).backward()
    zoo.assert_same_gradients(stock, patched)


def _worker(rank, rendezvous):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD)
    try:
        for fused_loss in (False, True):
            _data_parallel(rank, fused_loss)
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")
def test_data_parallel():
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_worker, (os.path.join(folder, "rendezvous"),), nprocs=WORLD)
