"""A patched BERT whose layers run as one operation, over the kernels in Triton's interpreter.

TRITON_INTERPRET=1 FASTFORMER_BACKEND=triton python -m pytest tests/interpreter
"""

import copy

import pytest
import torch

import fastformer as ff
import fastformer.nn as fnn

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
    ("checkpoints", "lower"),
    [(None, None), ("no-reentrant", None), (None, torch.float16), ("reentrant", torch.float16)],
)
def test_a_model_of_them_computes_what_stock_computes(interpreting, checkpoints, lower):
    """Without autocast as stock; under autocast no further from stock without it than stock under autocast."""
    if not interpreting:
        pytest.skip("runs in Triton's interpreter only")
    torch.manual_seed(0)
    gold = transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES)).train()
    with torch.no_grad():
        for p in gold.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    stock, ours = copy.deepcopy(gold), copy.deepcopy(gold)
    before = copy.deepcopy(ours.state_dict())
    ff.patch(ours)
    for name in ("bert.encoder.layer.0.output.dense.weight", "bert.encoder.layer.0.attention.self.key.bias"):
        for model in (gold, stock, ours):
            model.get_parameter(name).requires_grad_(False)
    if checkpoints:
        ours.gradient_checkpointing_enable({"use_reentrant": checkpoints == "reentrant"})
    mask = torch.arange(6) < torch.tensor([6, 2, 4])[:, None]
    call = {"input_ids": torch.randint(1, 50, mask.shape), "attention_mask": mask.long(), "labels": torch.arange(3) % 2}
    fnn.reset_count()
    logits = [_step(model, call, lower if model is not gold else None) for model in (gold, stock, ours)]
    # Recomputed in backward where activations are not kept.
    assert fnn.count().fused["BertLayer"] == 1 + (checkpoints is not None)
    # For checkpoints transformers hooks the embeddings, which are then called.
    assert fnn.count().fused["Embeddings"] == (checkpoints is None)
    found = [("logits", *logits)]
    for (name, a), b, c in zip(gold.named_parameters(), stock.parameters(), ours.parameters(), strict=True):
        assert (b.grad is None) == (c.grad is None), name
        if a.grad is not None:
            assert b.grad.dtype == c.grad.dtype, name
            found.append((name, a.grad, b.grad, c.grad))
    for name, want, theirs, got in found:
        if lower is None:
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-5, msg=name)
        else:
            allowed = 2 * (theirs - want).abs().max() + 8 * torch.finfo(lower).eps * want.abs().max()
            assert (got - want).abs().max() <= allowed, name
    ours.eval()
    with torch.no_grad(), torch.autocast("cpu", lower, enabled=lower is not None):
        torch.testing.assert_close(ours(**call).logits.float(), logits[2].float(), rtol=1e-3, atol=1e-3)
    ff.unpatch(ours)
    assert list(ours.state_dict()) == list(before)
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), before.values(), strict=True))


def test_a_gradient_scaler_sees_overflow(interpreting):
    if not interpreting:
        pytest.skip("runs in Triton's interpreter only")
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES)).train()
    ff.patch(model)
    call = {"input_ids": torch.randint(1, 50, (2, 4)), "labels": torch.arange(2)}
    optimizer = torch.optim.AdamW(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-32)
    fnn.reset_count()
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
    assert fnn.count().fused["BertLayer"] == 2
    assert scaler.get_scale() == 2.0**8
