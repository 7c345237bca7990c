"""`pytest --benchmark` and `fastformer bench report`: wrong results are never timed, figures stand beside peers'."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastformer.cli import main

ROOT = Path(__file__).resolve().parents[1]
pytest.importorskip("pytest_benchmark")

PLANTED = """
import fastformer as ff

sound = ff.ops.layer_norm
ff.ops.layer_norm = lambda *args, **kwargs: sound(*args, **kwargs) * 1.001
"""


def suite(*options, path=(), check=True):
    # In a worker of pytest-xdist, benchmarks would switch themselves off.
    outer = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = {**outer, "PYTHONPATH": os.pathsep.join([str(ROOT), *map(str, path)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "--benchmark", "-p", "no:cacheprovider", "-p", "no:xdist", *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def test_every_case_runs():
    """Once, untimed, results and gradients against the reference; of one size each, and without torch.compile, which
    takes minutes."""
    files = [f"bench/bench_{name}.py" for name in ("norm", "activation", "loss", "rotary")]
    sizes = ("1365-768", "341-3072", "4096-1024", "64-30522", "12-12-64")
    done = suite("--benchmark-disable", "-k", f"not compile and ({' or '.join(sizes)})", *files)
    assert " passed" in done.stdout


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A run of two cases, and the same with a wrong result planted."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "planted_fault.py").write_text(PLANTED)
    options = ("bench/bench_norm.py", "-k", "layer and 1365-768 and forward and (eager or fastformer)")
    suite(*options, f"--benchmark-json={folder / 'sound.json'}")
    failed = suite(
        *options, "-p", "planted_fault", f"--benchmark-json={folder / 'planted.json'}", path=[folder], check=False
    )
    return folder, failed


def test_a_planted_wrong_result_is_not_timed(measured):
    folder, failed = measured
    assert failed.returncode == 1
    assert "wrong results are not timed" in failed.stdout
    timed = [entry["name"] for entry in json.loads((folder / "planted.json").read_text())["benchmarks"]]
    assert len(timed) == 1
    assert "eager" in timed[0]


def test_report(measured, tmp_path, capsys):
    folder, _ = measured
    assert main(["bench", "report", str(folder / "sound.json"), "--output", str(tmp_path)]) == 0
    (table,) = tmp_path.glob("*/norm.md")
    assert str(table) in capsys.readouterr().out
    text = table.read_text()
    assert "| fastformer, µs | eager, µs | best peer ÷ ours |" in text.replace("| case ", "")
    for word in ("torch 2", "commit", "copy_gbs", "matmul_tflops", "launch_us", "GB/s"):
        assert word in text
    assert table.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"


def stored(key="case", **row):
    machine = dict.fromkeys(("driver", "torch", "triton", "transformers", "python", "commit", "sources"), "x")
    ceilings = {"key": "ceilings", "ceilings": {"copy_gbs": 4000.0, "matmul_tflops": 800.0}}
    stage = {"stage": "bench-fused", "machine": {"device": "GPU A/B", **machine}, "complete": True,
            "rows": [ceilings, {"key": key, **row}]}  # fmt: skip
    return {"stages": {"bench-fused": stage}}


def test_figures_beside_the_best_peer_and_the_limit(tmp_path):
    rates = {
        "ours": {"us": 10.0, "gbs": 3200.0},
        "eager": {"us": 40.0, "gbs": 800.0},
        "compiled": {"us": 15.0, "gbs": 2133.0},
    }
    (tmp_path / "results.json").write_text(json.dumps(stored(fwd=rates)))
    assert main(["bench", "report", str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "gpu-a-b" / "bench-fused.md").read_text()
    assert "| case fwd | 10 | 40 | 15 | 1.5 | 3.2e+03 GB/s | 0.8 |" in text


def test_host_cost_table(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(stored("layer_norm", host_us={"forward": 12.5, "both": 31.0})))
    assert main(["bench", "report", str(tmp_path), "--output", str(tmp_path / "out")]) == 0
    (table,) = (tmp_path / "out").glob("*/*.md")
    assert "| layer_norm | – | 12.5 | 31 | – | – |" in table.read_text()


def test_what_cannot_be_reported_is_said_in_one_sentence(tmp_path, capsys):
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "b.json").write_text("nonsense")
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    (wrong / "results.json").write_text(json.dumps(stored(fault="WRONG RESULT: dx")))
    empty = tmp_path / "empty"
    empty.mkdir()
    rehearsed = stored(fwd={"ours": {"us": 1.0, "gbs": 1.0}})
    rehearsed["stages"]["bench-fused"]["machine"]["device"] = "CPU rehearsal"
    (tmp_path / "rehearsed").mkdir()
    (tmp_path / "rehearsed" / "results.json").write_text(json.dumps(rehearsed))
    for source, message in (
        ("a.json", "was not written by pytest --benchmark"),
        ("b.json", "is no JSON"),
        ("missing.json", "No such file"),
        ("wrong", "holds wrong or missing results (case)"),
        ("empty", "holds no result of make gpu"),
        ("rehearsed", "comes from a rehearsal"),
    ):
        assert main(["bench", "report", str(tmp_path / source), "--output", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_peers_are_listed():
    done = suite("--peers")
    for line in ("torch ", "liger-kernel", "flash-attn"):
        assert line in done.stdout + done.stderr


def test_peak_memory_counts_what_lives_at_once():
    import torch

    from bench.operators import peak_bytes

    def step():
        a = torch.empty(1000, 1000)
        b = a + 1.0
        del a
        return (b * 2.0).sum()

    assert 8_000_000 <= peak_bytes(step) < 8_100_000
