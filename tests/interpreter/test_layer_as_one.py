"""A patched BERT whose layers run as one operation, over the kernels in Triton's interpreter.

TRITON_INTERPRET=1 FASTFORMER_BACKEND=triton python -m pytest tests/interpreter
"""

import copy

import pytest
import torch

import fastformer as ff
import fastformer.nn as fnn
from fastformer.ops.encoder_layer import encoder_layer

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
FAMILIES = {
    "Bert": SIZES,
    "Roberta": {**SIZES, "pad_token_id": 1},
    # One layer's parameters, twice; GELU by tanh.
    "Albert": {**SIZES, "embedding_size": 16, "num_hidden_layers": 2, "classifier_dropout_prob": 0.0},
    "DistilBert": {
        "vocab_size": 50, "dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 48, "dropout": 0.0,
        "attention_dropout": 0.0, "seq_classif_dropout": 0.0,
    },
}  # fmt: skip


def _model(family):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family])
    model = getattr(transformers, f"{family}ForSequenceClassification")(config).train()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


@pytest.fixture
def layers(interpreting, monkeypatch):
    """A list that grows by one with every layer that runs as one operation."""
    if not interpreting:
        pytest.skip("runs in Triton's interpreter only")
    calls = []

    def call(*arguments):
        calls.append(arguments)
        return encoder_layer(*arguments)

    monkeypatch.setattr("fastformer.integrations.families.encoder_layer.encoder_layer", call)
    return calls


def _step(model, call, lower):
    """Logits; gradients, of a scaled loss where products are formed in fp16, stay in the parameters."""
    scale = 1.0 if lower is None else 2.0**8
    with torch.autocast("cpu", lower, enabled=lower is not None):
        out = model(**call)
    (out.loss * scale).backward()
    for p in model.parameters():
        if p.grad is not None:
            p.grad /= scale
    return out.logits.detach()


@pytest.mark.parametrize(
    ("family", "way", "lower"),
    [
        ("Bert", None, None),
        ("Bert", "no-reentrant", None),
        ("Bert", None, torch.float16),
        ("Bert", "reentrant", torch.float16),
        ("Bert", "hook", torch.float16),
        ("Bert", "lora", torch.float16),
        ("Roberta", None, None),
        ("Albert", None, None),
        ("DistilBert", None, None),
        ("Albert", None, torch.float16),
    ],
)
def test_a_model_of_them_computes_what_stock_computes(layers, family, way, lower):
    """Without autocast as stock; under autocast no further from stock without it than stock under autocast."""
    checkpoints = way in ("no-reentrant", "reentrant")
    if family == "DistilBert" and transformers.__version__ < "5":
        pytest.skip("its layers are others before transformers 5")
    gold = _model(family)
    if way == "lora":
        peft = pytest.importorskip("peft")
        settings = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"], init_lora_weights=False)
        gold = peft.get_peft_model(gold, settings)
    if way == "hook":
        gold.get_submodule("bert.encoder.layer.0.output.dense").register_forward_hook(lambda *a: None)
    stock, ours = copy.deepcopy(gold), copy.deepcopy(gold)
    before = copy.deepcopy(ours.state_dict())
    ff.patch(ours)
    ends = ("key.bias", "k_lin.bias", "output.dense.weight", "ffn_output.weight", "lin2.weight")
    for model in (gold, stock, ours):
        for name, p in model.named_parameters():
            p.requires_grad_(p.requires_grad and not name.endswith(ends))
    if checkpoints:
        ours.gradient_checkpointing_enable({"use_reentrant": way == "reentrant"})
    mask = torch.arange(6) < torch.tensor([6, 2, 4])[:, None]
    ids = torch.where(mask, torch.randint(2, 50, mask.shape), gold.config.pad_token_id)
    call = {"input_ids": ids, "attention_mask": mask.long(), "labels": torch.arange(3) % 2}
    fnn.reset_count()
    logits = [_step(model, call, lower if model is not gold else None) for model in (gold, stock, ours)]
    # Recomputed in backward where activations are not kept.
    expected = 2 if checkpoints or family == "Albert" else way not in ("hook", "lora")
    # ALBERT's first layer gets what a linear layer made, under autocast in its dtype, and runs in parts.
    assert len(layers) == (expected - 1 if family == "Albert" and lower else expected)
    # For checkpoints transformers 5 hooks the embeddings, which are then called.
    assert fnn.count().fused["Embeddings"] == (not checkpoints or transformers.__version__ < "5")
    found, scale = [("logits", *logits)], max(p.grad.norm() for p in gold.parameters() if p.grad is not None)
    for (name, a), b, c in zip(gold.named_parameters(), stock.parameters(), ours.parameters(), strict=True):
        assert (b.grad is None) == (c.grad is None), name
        if a.grad is not None:
            assert b.grad.dtype == c.grad.dtype, name
            found.append((name, a.grad, b.grad, c.grad))
    for name, want, theirs, got in found:
        if lower is None:
            assert (got - want).norm() <= 1e-5 * want.norm() + 1e-7 * scale, name
        else:
            allowed = 2 * (theirs - want).abs().max() + 8 * torch.finfo(lower).eps * want.abs().max()
            assert (got - want).abs().max() <= allowed, name
    ours.eval()
    with torch.no_grad(), torch.autocast("cpu", lower, enabled=lower is not None):
        torch.testing.assert_close(ours(**call).logits.float(), logits[2].float(), rtol=1e-3, atol=1e-3)
    ff.unpatch(ours)
    assert list(ours.state_dict()) == list(before)
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), before.values(), strict=True))


def test_a_gradient_scaler_sees_overflow(layers):
    model = _model("Bert")
    ff.patch(model)
    call = {"input_ids": torch.randint(1, 50, (2, 4)), "labels": torch.arange(2)}
    optimizer = torch.optim.AdamW(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-32)
    for changes in (False, True):
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = model(**call).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert changes != all(map(torch.equal, before, model.parameters()))
        assert all(torch.isfinite(p).all() for p in model.parameters())
    assert len(layers) == 2
    assert scaler.get_scale() == 2.0**8
