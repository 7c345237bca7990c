"""The loop: batches, padding, turns that do not disturb each other, memory and the model without dropout."""

import copy
import itertools

import pytest
import torch

from fastformer.demo.memory import peak_increase
from fastformer.demo.training import (
    Passages,
    Run,
    accuracy,
    batches,
    collate,
    fine_tune,
    largest_difference,
    peak_memory,
    without_dropout,
)
from tests.demo.conftest import LENGTH

CPU = torch.device("cpu")


def new_run(model, steps: int, length: int | None = LENGTH, rate: float = 1e-3, seed: int = 0) -> Run:
    return Run("run", model, length, 0, steps, rate, seed, CPU)


def test_batches_pass_over_every_row_in_a_new_order_each_epoch():
    plan = batches(10, batch_size=4, epochs=2, seed=0)
    assert [len(rows) for rows in plan] == [4, 4, 2, 4, 4, 2]
    first, second = ([i for rows in half for i in rows] for half in (plan[:3], plan[3:]))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert plan == batches(10, batch_size=4, epochs=2, seed=0) != batches(10, batch_size=4, epochs=2, seed=1)


@pytest.mark.parametrize(("length", "width"), [(6, 6), (None, 3)])
def test_collate_pads_on_the_right(length, width):
    batch = collate(Passages([[5, 6], [7, 8, 9], [1] * 6], [1, 0, 1]), [1, 0], pad_id=4, length=length)
    assert batch["input_ids"].tolist() == [[7, 8, 9] + [4] * (width - 3), [5, 6] + [4] * (width - 2)]
    assert batch["attention_mask"].tolist() == [[1, 1, 1] + [0] * (width - 3), [1, 1] + [0] * (width - 2)]
    assert batch["labels"].tolist() == [0, 1]


def test_runs_in_turns_are_each_what_they_are_alone(tiny_bert, passages):
    """Dropout on: another run between two steps must not take random numbers away."""
    plan = batches(len(passages.ids), 8, 1, 0)[:10]
    alone = new_run(tiny_bert(), len(plan))
    fine_tune([alone], passages, plan, chunk=len(plan))
    state = torch.get_rng_state()
    turns = [new_run(tiny_bert(), len(plan)), new_run(tiny_bert(), len(plan)), new_run(tiny_bert(), len(plan), seed=1)]
    steps = []
    fine_tune(turns, passages, plan, chunk=3, progress=steps.append)
    assert turns[0].losses == turns[1].losses == alone.losses != turns[2].losses
    assert sum(steps) == 3 * len(plan)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_a_run_counts(tiny_bert, passages):
    plan = batches(len(passages.ids), 8, 1, 0)[:5]
    fixed, dynamic = new_run(tiny_bert(), 5), new_run(tiny_bert(), 5, length=None)
    fine_tune([fixed, dynamic], passages, plan, chunk=2)
    tokens = sum(len(passages.ids[i]) for rows in plan for i in rows)
    assert fixed.tokens == dynamic.tokens == tokens
    assert fixed.slots == 5 * 8 * LENGTH > dynamic.slots > tokens
    assert len(fixed.losses) == 5
    assert [count for count, _ in fixed.rounds] == [count for count, _ in dynamic.rounds]
    assert fixed.seconds == pytest.approx(sum(seconds for _, seconds in fixed.rounds))
    assert min(fixed.seconds, fixed.cpu_seconds, dynamic.seconds, dynamic.cpu_seconds) > 0


def test_learning_rate_climbs_then_falls_to_nothing(tiny_bert, passages):
    run = new_run(tiny_bert(), steps=20, rate=0.1)
    rates = []
    for _ in range(20):
        rates.append(run.optimizer.param_groups[0]["lr"])
        run.optimizer.step()
        run.scheduler.step()
    assert rates[:3] == pytest.approx([0.05, 0.1, 0.1])
    assert all(a > b for a, b in itertools.pairwise(rates[2:]))
    assert 0 < rates[-1] < 0.01
    assert [group["weight_decay"] for group in run.optimizer.param_groups] == [0.01, 0.0]


def test_it_learns_and_accuracy_counts_what_is_right(tiny_bert, passages):
    plan = batches(len(passages.ids), 16, 12, 0)
    run = new_run(tiny_bert(), len(plan), rate=3e-3)
    before, _ = accuracy(run, passages, 32)
    fine_tune([run], passages, plan)
    after, predicted = accuracy(run, passages, 32)
    assert before < 0.6 < 0.85 < after
    assert after == sum(a == b for a, b in zip(predicted, passages.labels, strict=True)) / len(passages.labels)
    assert run.model.training


def test_largest_difference():
    assert largest_difference([1.0, 2.0, 4.0], [1.0, 2.5, 3.75]) == 0.5
    with pytest.raises(ValueError):
        largest_difference([1.0], [1.0, 2.0])


def test_peak_of_memory_is_that_of_the_work():
    held = []

    def work():
        held.append(torch.ones(16 * 2**20))  # 64 MiB
        torch.ones(32 * 2**20)  # 128 MiB more for a moment

    peak = peak_increase(work, CPU)
    if peak is None:
        pytest.skip("this system does not tell the peak of a period")
    assert 190 * 2**20 < peak < 220 * 2**20


def test_measuring_memory_changes_nothing(tiny_bert, passages):
    run = new_run(tiny_bert(), steps=4)
    weights = copy.deepcopy(run.model.state_dict())
    state = torch.get_rng_state()
    peak_memory(run, passages, batches(len(passages.ids), 8, 1, 0))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, weights[name]) for name, value in run.model.state_dict().items())
    assert all(p.grad is None for p in run.model.parameters())
    assert not run.optimizer.state


def test_without_dropout_has_the_same_weights_and_no_randomness(tiny_bert, passages):
    model = tiny_bert().train()
    twin = without_dropout(model).train()
    batch = collate(passages, range(8), 0, LENGTH)
    assert model(**batch).loss.item() != model(**batch).loss.item()
    assert twin(**batch).loss.item() == twin(**batch).loss.item()
    assert twin(**batch).loss.item() == pytest.approx(model.eval()(**batch).loss.item(), abs=1e-6)
    assert model.config.hidden_dropout_prob == 0.1
