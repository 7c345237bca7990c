"""Fine-tuning a patched BERT is fine-tuning the stock one: the same numbers without dropout, the same law with it.

Dropout off, fp32: losses of 50 steps and gradients equal to rounding. Dropout on, the two draw different random
numbers, so single losses differ; what must agree is their distribution. It is tested at fixed weights on one padded
batch: the loss, the norm of its gradient by the word embeddings and two logits, over several hundred seeds of each
model, are compared by two-sample tests of the mean (Welch), the spread (Brown-Forsythe) and the whole law
(Kolmogorov-Smirnov), with hidden and attention dropout taken one at a time, so that neither hides in the other's noise.
The same tests must refuse a model whose rate is off, or they would prove nothing.
"""

import copy
from statistics import mean

import pytest
import torch

import fastformer as ff
from fastformer.demo.training import Run, batches, collate, fine_tune, largest_difference
from tests.demo.conftest import LENGTH

stats = pytest.importorskip("scipy.stats")

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
STEPS = 50
DRAWS = 300
# Of 12 tests a model, at fixed seeds: the smallest p of equal laws is below this once in 160 choices of seeds.
ALPHA = 0.0005


def patched(model):
    model = copy.deepcopy(model)
    report = ff.patch(model, unpad="auto")
    assert report
    assert "removed" in report.unpad
    return model


def gradients(model, batch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("length", [LENGTH, None], ids=["max_length", "dynamic"])
def test_losses_and_gradients_without_dropout(tiny_bert, passages, length):
    base = tiny_bert(**NO_DROPOUT)
    plan = batches(len(passages.ids), 16, 4, 0)[:STEPS]
    runs = [
        Run(name, model, length, 0, STEPS, 3e-3, 0, torch.device("cpu"))
        for name, model in (("stock", copy.deepcopy(base)), ("patched", patched(base)))
    ]
    ff.nn.reset_count()
    fine_tune(runs, passages, plan)
    assert ff.nn.count().fused["BertModel"] == STEPS, "the patched run did not run patched"
    assert not ff.nn.count().fallback
    stock, fast = runs
    assert mean(stock.losses[-10:]) < mean(stock.losses[:10]) - 0.1, "nothing was learned, so nothing was compared"
    assert largest_difference(fast.losses, stock.losses) < 1e-5

    # Gradients at the same weights: those that training began with and those that the stock run ended with.
    for weights in (base.state_dict(), stock.model.state_dict()):
        for run in runs:
            run.model.load_state_dict(weights)
        batch = collate(passages, plan[0], 0, length)
        expected, found = (gradients(run.model, batch) for run in runs)
        assert expected.keys() == found.keys()
        largest = max(grad.norm() for grad in expected.values())
        for name, grad in expected.items():
            # Softmax does not see a constant added to a row of scores: the true gradient of key.bias is 0.
            scale = largest if name.endswith("key.bias") else grad.norm()
            assert scale > 0, name
            assert (found[name] - grad).norm() <= 1e-5 * scale, name


def draws(model, batch, seed: int) -> torch.Tensor:
    """Loss, gradient norm and two logits of each of DRAWS forward and backward passes: [4, DRAWS]."""
    embeddings = model.bert.embeddings.word_embeddings.weight
    rows = []
    model.train()
    for k in range(DRAWS):
        torch.manual_seed(seed + k)
        output = model(**batch)
        (grad,) = torch.autograd.grad(output.loss, embeddings)
        rows.append(torch.stack([output.loss.detach(), grad.norm(), *output.logits.detach()[:2, 0]]))
    return torch.stack(rows, 1).double()


def smallest_p(a: torch.Tensor, b: torch.Tensor) -> float:
    tests = (
        lambda x, y: stats.ttest_ind(x, y, equal_var=False),
        lambda x, y: stats.levene(x, y, center="median"),
        stats.ks_2samp,
    )
    return min(test(x.numpy(), y.numpy()).pvalue for x, y in zip(a, b, strict=True) for test in tests)


@pytest.mark.parametrize("kind", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
def test_distribution_with_dropout(tiny_bert, passages, kind):
    other = NO_DROPOUT | {"classifier_dropout": 0.0}
    # Larger weights than BERT's initial ones make attention uneven, so that dropout in it shows in the logits.
    rates = {rate: tiny_bert(**(other | {kind: rate}), initializer_range=0.2) for rate in (0.2, 0.35)}
    batch = collate(passages, range(8), 0, LENGTH)
    stock = draws(rates[0.2], batch, seed=0)
    fast = draws(patched(rates[0.2]), batch, seed=10_000)
    wrong = draws(patched(rates[0.35]), batch, seed=20_000)
    assert stock.std(1).min() > 1e-3, "without noise there is nothing to compare"
    assert smallest_p(stock, fast) > ALPHA
    assert smallest_p(stock, wrong) < ALPHA / 100
