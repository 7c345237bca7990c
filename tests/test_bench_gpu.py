"""The driver of `make gpu`: wrong results are refused, cut-off stages go on, other machines' rows are dropped."""

import dataclasses
import json
import random

import pytest
import torch

import fastformer as ff


@pytest.fixture(autouse=True)
def _rehearse(monkeypatch):
    monkeypatch.setenv("FASTFORMER_REHEARSE", "1")


@pytest.fixture
def machine():
    from bench.gpu.machine import this_machine

    return this_machine()


def plant(monkeypatch, name, change):
    """Make ff.ops.<name> return something a little wrong."""
    sound = getattr(ff.ops, name)
    monkeypatch.setattr(ff.ops, name, lambda *args, **kwargs: change(sound(*args, **kwargs)), raising=True)


def test_a_planted_wrong_attention_is_not_timed(monkeypatch, machine, tmp_path):
    from bench.gpu import attention, report
    from bench.gpu.results import Results, measure

    plant(monkeypatch, "scaled_dot_product_attention", lambda out: out * 1.001)
    plant(monkeypatch, "attention_varlen", lambda out: out * 1.001)
    plant(monkeypatch, "attention_kv_cache", lambda out: out * 1.001)
    results = Results("bench-attention", tmp_path, machine)
    measure(results, attention.cases(), 60)
    assert results.rows
    for row in results.rows.values():
        assert "WRONG RESULT" in row["fault"]
        assert not {"fwd", "decode"} & set(row)
    assert len(results.faults()) == len(results.rows)
    assert "WRONG RESULT" in report.write(tmp_path)
    with pytest.raises(SystemExit):
        report.save(tmp_path)


def test_a_planted_wrong_gradient_is_not_timed(monkeypatch, machine, tmp_path):
    from bench.gpu import fused
    from bench.gpu.results import Results, measure

    class Skew(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * 1.01

    plant(monkeypatch, "add_layer_norm", lambda outs: (Skew.apply(outs[0]), outs[1]))
    results = Results("bench-fused", tmp_path, machine)
    monkeypatch.setattr(ff.ops, "swiglu", lambda gate, up: Skew.apply(torch.nn.functional.silu(gate) * up))
    measure(results, fused.cases(), 60)
    faults = {key: row["fault"] for key, row in results.rows.items() if "fault" in row}
    assert all("WRONG RESULT: dx" in fault for key, fault in faults.items() if key.startswith("add_layer_norm"))
    assert "WRONG RESULT: gradient 0" in faults.pop("swiglu")
    assert len(faults) == sum(key.startswith("add_layer_norm") for key in results.rows) > 0
    assert "fwd" in results.rows["geglu"]


def test_a_wandering_result_is_a_race(monkeypatch):
    from bench.gpu import races
    from bench.gpu.results import WrongResult

    plant(monkeypatch, "add_layer_norm", lambda outs: (outs[0] + random.random(), outs[1]))
    found = races.subjects(small=True)
    assert set(ff.ops.__all__) - {"attention_kv_cache", "attention_weights", "merge_attention"} <= {
        {"attention": "scaled_dot_product_attention"}.get(name, name) for name in found
    }
    with pytest.raises(WrongResult, match="repeat 1"):
        races.repeats(found["add_layer_norm dropout"])
    races.repeats(found["layer_norm"])


def test_nan_is_wrong():
    from bench.gpu.results import WrongResult, check_close

    x = torch.ones(4)
    with pytest.raises(WrongResult):
        check_close("x", x * torch.nan, x, x)


def test_a_cut_off_stage_goes_on(machine, tmp_path):
    from bench.gpu.results import Results, measure

    ran = []

    def case(name):
        return name, lambda: ran.append(name) or {"line": name}

    measure(Results("s", tmp_path, machine), [case("a"), case("b")], seconds=-1)
    assert ran == []
    assert not Results("s", tmp_path, machine).complete
    measure(Results("s", tmp_path, machine), [case("a")], seconds=60)
    measure(Results("s", tmp_path, machine), [case("a"), case("b")], seconds=60)
    assert ran == ["a", "b"]
    assert Results("s", tmp_path, machine).complete
    other = dataclasses.replace(machine, sources="another version")
    assert Results("s", tmp_path, other).rows == {}


def test_one_broken_case_does_not_stop_the_others(machine, tmp_path):
    from bench.gpu.results import Results, measure

    broken = [True]

    def fragile():
        if broken[0]:
            raise RuntimeError("broken")
        return {"line": "fine"}

    cases = [("fragile", fragile), ("sound", lambda: {"line": "fine"})]
    results = Results("s", tmp_path, machine)
    measure(results, cases, 60)
    assert results.faults() == ["fragile: RuntimeError: broken"]
    assert results.rows["sound"]["line"] == "fine"
    broken[0] = False
    again = Results("s", tmp_path, machine)
    measure(again, cases, 60)
    assert again.faults() == []


def test_a_failing_test_file_is_a_fault(tmp_path):
    from bench.gpu import correctness
    from bench.gpu.machine import ROOT
    from bench.gpu.results import WrongResult

    sound, broken = (ROOT / "build" / f"test_{name}_{tmp_path.name}.py" for name in ("sound", "broken"))
    sound.parent.mkdir(exist_ok=True)
    try:
        sound.write_text("def test_one():\n    pass\n")
        broken.write_text("def test_two():\n    assert 1 == 2\n")
        row = correctness.tests(sound, tmp_path / "log")
        assert row["counts"] == {"passed": 1, "failed": 0, "skipped": 0}
        with pytest.raises(WrongResult, match="test_two"):
            correctness.tests(broken, tmp_path / "log")
    finally:
        sound.unlink()
        broken.unlink()
    assert "test_broken" in (tmp_path / "log").read_text()


def test_a_backward_lost_in_noise_has_no_time():
    from bench.gpu.timing import Timing, difference

    assert difference(Timing(1.0, 0.01, 10, "graph"), Timing(0.99, 0.01, 10, "graph")) is None
    found = difference(Timing(3.0, 0.01, 10, "graph"), Timing(1.0, 0.01, 10, "graph"))
    assert found is not None
    assert found.seconds == 2.0


def test_rehearsed_timings_are_not_saved(machine, tmp_path):
    from bench.gpu import report
    from bench.gpu.results import Results

    results = Results("bench-fused", tmp_path, machine)
    results.add("a", {"line": "fine"})
    with pytest.raises(SystemExit, match="rehearsal"):
        report.save(tmp_path)


def test_what_is_proven_enters_the_table(machine, tmp_path):
    from bench.gpu import prove
    from bench.gpu.results import Results

    table = tmp_path / "targets.py"
    table.write_text(prove.TABLE.read_text())

    def run(row, **changes):
        changes = {"device": "NVIDIA H200", "driver": "580.1", "triton": "3.6.0", **changes}
        results = Results("correctness", tmp_path, dataclasses.replace(machine, **changes), fresh=True)
        results.add(prove.TESTS, row)
        results.complete = True
        results.write()
        return prove.prove(tmp_path, table)

    passed, skipped = ({"counts": {"passed": n, "failed": 0, "skipped": 1 - n}} for n in (1, 0))
    for row, changes in ((skipped, {}), ({"fault": "WRONG"}, {}), (passed, {"device": "CPU rehearsal"})):
        with pytest.raises(ValueError, match=r"no Hopper GPU|failed"):
            run(row, **changes)
    with pytest.raises(ValueError, match="no complete correctness stage"):
        prove.prove(tmp_path / "nowhere", table)
    assert table.read_text() == prove.TABLE.read_text()
    assert run(passed) == ("NVIDIA H200", "3.6")
    run(passed, device="NVIDIA H100 80GB HBM3", triton="3.7.1")
    run(passed)
    scope = {}
    exec(compile(table.read_text().replace("from __future__", "# "), str(table), "exec"), {"__name__": "table"}, scope)
    assert scope["HOPPER_PROVEN"] == {("NVIDIA H200", "3.6"), ("NVIDIA H100 80GB HBM3", "3.7")}


def test_tables_give_ratios(machine, tmp_path):
    from bench.gpu import report
    from bench.gpu.results import Results

    def rate(tflops):
        return {"us": 1.0, "tflops": tflops, "spread": 0.0, "method": "graph"}

    results = Results("bench-attention", tmp_path, machine)
    results.add("ceilings", {"ceilings": {"matmul_tflops": 800.0, "copy_gbs": 1.0, "launch_us": 1.0, "graph_us": 1.0}})
    results.add(
        "case",
        {
            "fwd": {"ours": rate(400.0), "flash": rate(500.0), "cudnn": {"unavailable": "no"}},
            "bwd": {"ours": rate(1.0)},
        },
    )
    results.complete = True
    results.write()
    assert "median 0.80" in report.write(tmp_path)
    table = (tmp_path / "summary.md").read_text()
    assert "| case | 400 | 500 | – | 0.80 | 0.50 | 1.00 |" in table
    assert len(json.loads((tmp_path / "results.json").read_text())["stages"]["bench-attention"]["rows"]) == 2
