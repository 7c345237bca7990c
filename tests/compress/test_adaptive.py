"""The loop around pruning: when it begins, rises, falls back, stops, and what it refuses."""

import math
import random

import numpy as np
import pytest
import torch

from fastformer.compress import AdaptiveCompressor, Target
from fastformer.compress.search import RateSearch

WIDTH, CHANNELS, STEPS = 8, 64, 4


def make(seed=0, **options):
    """A small stack whose metric is whatever the test says, and an optimizer with moments."""
    torch.manual_seed(seed)
    layer = torch.nn.TransformerEncoderLayer(WIDTH, 2, CHANNELS, dropout=0.1, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    settings = {"standard_error": 0.005, "tolerance": 0.01, "patience": 1, "recovery": 1, "multiple_of": 4}
    return model, optimizer, AdaptiveCompressor(model, optimizer, **{**settings, **options})


def train(model, optimizer, steps=STEPS):
    for _ in range(steps):
        model.train()(torch.randn(3, 5, WIDTH)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def run(model, optimizer, compressor, metrics):
    decisions = []
    for metric in metrics:
        train(model, optimizer)
        decisions.append(compressor.update(metric).decision)
        if compressor.done:
            break
    return decisions


def state_of(model, optimizer):
    moments = [v.clone() for p in model.parameters() for v in optimizer.state[p].values()]
    generators = torch.get_rng_state(), torch.from_numpy(np.random.get_state()[1].copy()), random.getstate()
    return [p.detach().clone() for p in model.parameters()], moments, generators


def assert_same(a, b):
    for left, right in zip(a[0] + a[1] + list(a[2][:2]), b[0] + b[1] + list(b[2][:2]), strict=True):
        assert torch.equal(left, right)
    assert a[2][2] == b[2][2]


def zeros(model):
    return sum(int((p == 0).sum()) for name, p in model.named_parameters() if "linear" in name)


def test_search_rises_then_bisects():
    search = RateSearch(step=0.2, highest=0.9, resolution=0.05)
    limit, tried = 0.55, []
    while (rate := search.next()) is not None:
        tried.append(rate)
        (search.accept if rate <= limit else search.reject)(rate)
    assert tried == pytest.approx([0.2, 0.4, 0.6, 0.5, 0.55])
    assert search.good == pytest.approx(0.55)


def test_search_stops_at_the_highest_rate():
    search = RateSearch(step=0.4, highest=0.9, resolution=0.05)
    tried = []
    while (rate := search.next()) is not None:
        tried.append(rate)
        search.accept(rate)
    assert tried == pytest.approx([0.4, 0.8, 0.9])


def test_waits_for_the_dense_model():
    model, optimizer, compressor = make(patience=2)
    # Progress by more than a standard error (0.005) starts the count again.
    assert run(model, optimizer, compressor, [0.5, 0.502, 0.51, 0.512]) == ["train"] * 4
    assert zeros(model) == 0
    assert run(model, optimizer, compressor, [0.511]) == ["converged"]
    assert compressor.gate.reference == 0.512
    assert zeros(model) > 0


def test_rate_rises_while_the_metric_holds():
    model, optimizer, compressor = make(rise=0.3, max_rate=0.8)
    decisions = run(model, optimizer, compressor, [0.8] * 9)
    assert decisions == ["train", "converged", "accept", "accept", "accept"]
    report = compressor.finish()
    assert report.within_tolerance
    # Channels stay a multiple of four, so that a rate is met from below.
    assert [e.rate for e in report.history] == pytest.approx([0.0, 0.0, 0.3, 0.6, 0.8], abs=0.05)
    assert report.rate == report.history[-1].rate
    assert sum(p.numel() for p in model.parameters()) == report.parameters[1] < 0.5 * report.parameters[0]


def test_a_bad_step_is_rolled_back_to_the_bit():
    model, optimizer, compressor = make(rise=0.3, resolution=0.5)
    run(model, optimizer, compressor, [0.8, 0.8])
    train(model, optimizer)
    good = state_of(model, optimizer)
    assert compressor.update(0.8).decision == "accept"  # keeps this state, then prunes further
    kept = [mask.clone() for mask in compressor.sites and compressor._good.masks]
    assert any(not torch.equal(a, b) for a, b in zip(kept, compressor.pruner.kept, strict=True))
    # The planted step: weights far away, moments and step counts moved, random numbers drawn.
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    train(model, optimizer, 3)
    random.random(), np.random.rand(3)
    with pytest.raises(AssertionError):
        assert_same(good, state_of(model, optimizer))
    assert compressor.update(0.5).decision == "reject"
    assert compressor.phase == "done"
    assert_same(good, state_of(model, optimizer))
    assert all(torch.equal(a, b) for a, b in zip(kept, compressor.pruner.kept, strict=True))


def test_learning_rate_is_not_rolled_back():
    model, optimizer, compressor = make(rise=0.3, resolution=0.5)
    run(model, optimizer, compressor, [0.8, 0.8, 0.8])
    optimizer.param_groups[0]["lr"] = 1e-5
    run(model, optimizer, compressor, [0.1])
    assert optimizer.param_groups[0]["lr"] == 1e-5


def test_recovery_gives_a_rate_more_time():
    model, optimizer, compressor = make(rise=0.3, recovery=3, resolution=0.4)
    decisions = run(model, optimizer, compressor, [0.8, 0.8, 0.7, 0.75, 0.795, 0.5, 0.5, 0.5])
    assert decisions == ["train", "converged", "recover", "recover", "accept", "recover", "recover", "reject"]


def test_pruned_units_stay_zero_under_momentum_and_decay():
    model, optimizer, compressor = make(rise=0.4)
    run(model, optimizer, compressor, [0.8, 0.8])
    before = [(p == 0) & (p.ndim == 2) for p in model.parameters()]
    train(model, optimizer, 5)
    assert zeros(model) > 0
    assert all((p[mask] == 0).all() for p, mask in zip(model.parameters(), before, strict=True))
    assert compressor.rate == pytest.approx(0.4, abs=0.05)


def test_for_a_loss_less_is_better():
    model, optimizer, compressor = make(greater_is_better=False, rise=0.3, resolution=0.5)
    assert run(model, optimizer, compressor, [0.5, 0.5, 0.505, 0.6])[2:] == ["accept", "reject"]
    assert compressor.finish().within_tolerance


def test_nan_metric_stops_and_restores():
    model, optimizer, compressor = make(rise=0.3)
    run(model, optimizer, compressor, [0.8, 0.8])
    train(model, optimizer)
    good = state_of(model, optimizer)
    compressor.update(0.8)
    train(model, optimizer)
    with pytest.raises(
        FloatingPointError, match=r"metric is nan at optimizer step 16, in phase search.*back at step 12"
    ):
        compressor.update(math.nan)
    assert_same(good, state_of(model, optimizer))
    with pytest.raises(ValueError, match="has failed"):
        compressor.update(0.8)


def test_nan_loss_stops_before_it_reaches_the_weights():
    model, optimizer, compressor = make(rise=0.3)
    run(model, optimizer, compressor, [0.8, 0.8])
    (model(torch.randn(3, 5, WIDTH)).mean() * math.nan).backward()
    with pytest.raises(FloatingPointError, match=r"gradients are not finite at optimizer step 9.*back at step 4"):
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


def test_unconverged_model_is_not_pruned():
    model, optimizer, compressor = make()
    run(model, optimizer, compressor, [0.5, 0.6, 0.7])
    with pytest.warns(UserWarning, match="had not converged"):
        report = compressor.finish()
    assert not report.converged
    assert report.parameters[0] == report.parameters[1]
    assert "nothing was pruned" in str(report)


def test_a_reference_that_keeps_improving_is_raised():
    model, optimizer, compressor = make(rise=0.3)
    run(model, optimizer, compressor, [0.8, 0.8])
    with pytest.warns(UserWarning, match="had not converged"):
        run(model, optimizer, compressor, [0.9])
    assert compressor.gate.reference == 0.9


def test_small_tolerance_is_raised_to_two_standard_errors():
    model, optimizer, compressor = make(standard_error=None, eval_size=400, tolerance=0.01)
    with pytest.warns(UserWarning, match="two standard errors"):
        run(model, optimizer, compressor, [0.8, 0.8])
    assert compressor.gate.allowed() == pytest.approx(2 * math.sqrt(0.8 * 0.2 / 400))
    with pytest.raises(ValueError, match="two standard errors"):
        make(standard_error=0.01, tolerance=0.01)


def test_given_reference_is_waited_for():
    model, optimizer, compressor = make(reference=0.9)
    assert run(model, optimizer, compressor, [0.8, 0.85, 0.895]) == ["train", "train", "converged"]
    assert compressor.gate.reference == 0.9


def test_target_is_where_the_search_stops():
    model, optimizer, compressor = make(rise=0.3, target=Target(parameters=0.7))
    run(model, optimizer, compressor, [0.8] * 8)
    report = compressor.finish()
    assert report.target[1]
    assert 0.65 * report.parameters[0] < report.parameters[1] <= 0.7 * report.parameters[0]


def test_target_is_met_even_if_the_metric_forbids_it():
    model, optimizer, compressor = make(
        rise=0.3, resolution=0.4, target=Target(flops=0.6, batch=(torch.randn(2, 5, WIDTH),))
    )
    with pytest.warns(UserWarning, match="did not allow the target"):
        decisions = run(model, optimizer, compressor, [0.8, 0.8, 0.3, 0.4])
    assert decisions[2:] == ["reject", "keep"]
    report = compressor.finish()
    assert report.target[1]
    assert not report.within_tolerance
    assert report.metric == 0.4
    assert "NOT HELD" in str(report)


def test_test_data_is_asked_twice_only():
    seen = []
    model, optimizer, compressor = make(
        rise=0.4, test=lambda m: seen.append(sum(p.numel() for p in m.parameters())) or 0.5
    )
    run(model, optimizer, compressor, [0.8] * 8)
    report = compressor.finish()
    assert seen == list(report.parameters)
    assert report.test == (0.5, 0.5)


def test_plot_and_table(tmp_path):
    pytest.importorskip("matplotlib")
    model, optimizer, compressor = make(rise=0.3)
    run(model, optimizer, compressor, [0.8, 0.8, 0.8, 0.1])
    report = compressor.finish()
    report.plot(tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"
    assert "| 12 | search | 30.1% | 0.8000 | accept |" in report.table()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eval_size": 10}, "exactly one of eval_size"),
        ({"standard_error": None}, "exactly one of eval_size"),
        ({"standard_error": None, "eval_size": 0}, "eval_size must be a positive integer, got 0"),
        ({"rise": 0}, "rise must lie between 0 and 1, got 0"),
        ({"rise": "slow"}, "rise must lie between 0 and 1, got 'slow'"),
        ({"patience": 0}, "patience must be a positive integer, got 0"),
        ({"tolerance": math.nan}, "tolerance must be a finite number"),
        ({"reference": math.inf}, "reference must be a finite number"),
        ({"multiple_of": 0}, "multiple_of must be a positive integer, got 0"),
        ({"target": Target(parameters=10)}, "target must be within reach"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [({}, "exactly one of"), ({"parameters": 1, "flops": 1}, "exactly one of"), ({"latency": 1.0}, "needs a batch"),
     ({"parameters": 0}, "parameters must be a positive number"),
     ({"parameters": "half"}, "parameters must be a positive number, got 'half'")],
)  # fmt: skip
def test_bad_targets(options, message):
    with pytest.raises(ValueError, match=message):
        Target(**options)


def test_steps_inside_a_cuda_graph_are_refused(monkeypatch):
    model, optimizer, _ = make()
    monkeypatch.setattr("fastformer.compress.adaptive.is_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="cannot run inside a CUDA graph"):
        train(model, optimizer)


def test_bad_calls():
    model, optimizer, compressor = make()
    with pytest.raises(ValueError, match="train at least one step"):
        compressor.update(0.5)
    with pytest.raises(TypeError, match="optimizer must be"):
        AdaptiveCompressor(model, "adam", eval_size=10)
    with pytest.raises(TypeError, match="target must be a Target, got float"):
        make(target=0.5)
    with pytest.raises(ValueError, match="heads or channels"):
        AdaptiveCompressor(torch.nn.Linear(2, 2), optimizer, eval_size=10)
    with pytest.raises(ValueError, match="evaluate"):
        compressor.finish(rungs=("int8",))
    model, optimizer, compressor = make(standard_error=None, eval_size=100, tolerance=None)
    train(model, optimizer)
    with pytest.raises(ValueError, match="mean of values between 0 and 1"):
        compressor.update(33.0)
