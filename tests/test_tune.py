"""The tile table: what is read, what is refused, that launches obey it, and the tuner from end to end, rehearsed."""

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from fastformer.kernels.attention import config, tiles
from fastformer.kernels.attention.call import Call
from fastformer.kernels.targets import TARGETS

KEY = ("sm_90", "forward", "plain", "half", 64, 512)
ROW = {"device": "sm_90", "pass": "forward", "rules": "plain", "dtype": "half", "head_dim": 64, "length": 512}
ROW |= {"tile": [64, 32, 4, 2], "microseconds": 3.5}


@pytest.fixture
def table(tmp_path):
    def write(rows=(ROW,), **changes):
        path = tmp_path / "tiles.json"
        content = {"format": 1, "kernels": tiles.digest(), "triton": "3.7.1", "rows": rows, **changes}
        path.write_text(json.dumps(content))
        return path

    return write


def call(length, head_dim=64, dtype=torch.bfloat16, mask=None):
    query, key, value = (torch.empty(2, 3, length, head_dim, dtype=dtype, device="meta") for _ in range(3))
    rules = dict.fromkeys(("cu_q", "cu_k", "slopes", "sinks", "seed"))
    rules |= {"max_q": 0, "max_k": 0, "mask": mask, "dropout_p": 0.0, "threshold": 0, "causal": False, "scale": 1.0}
    return Call(query, key, value, bottom_right=False, left=-1, right=-1, softcap=0.0, **rules)


def test_a_table_is_written_and_read(tmp_path):
    rows = {KEY: ((64, 32, 4, 2), 3.5), (*KEY[:5], None): ((128, 64, 8, 3), 4.0)}
    path = tmp_path / "tiles.json"
    tiles.write(path, rows, "3.7.1")
    assert tiles.read(path) == rows
    assert [p.name for p in tmp_path.iterdir()] == ["tiles.json"]


def test_launches_take_the_row_of_their_class_and_defaults_elsewhere(table, monkeypatch):
    target = TARGETS["sm_90"]
    rows = [ROW, {**ROW, "pass": "dK and dV", "length": None, "tile": [16, 32, 4, 1]}]
    default = config.forward_config(target, call(300))
    by_default = config.backward_config(target, call(9000))
    monkeypatch.setenv("FASTFORMER_TILES", str(table(rows)))
    tiles._read_once.cache_clear()
    measured = config.Config(64, 32, 4, 2)
    assert measured != default
    for length in (129, 300, 512):
        assert config.forward_config(target, call(length)) == measured
    for other in (call(128), call(513), call(300, 128), call(300, dtype=torch.float32)):
        assert config.forward_config(target, other) != measured
    mask = torch.empty(2, 1, 1, 300, dtype=torch.bool, device="meta").expand(2, 3, 300, 300)
    assert config.forward_config(target, call(300, mask=mask)) != measured
    assert config.forward_config(TARGETS["sm_80"], call(300)) != measured
    assert config.backward_config(target, call(9000)) == (by_default[0], config.Config(16, 32, 4, 1))


def test_decoding_takes_the_row_of_its_cache(table, monkeypatch):
    row = {**ROW, "pass": "decode", "length": 2048, "tile": [16, 128, 8, 4]}
    monkeypatch.setenv("FASTFORMER_TILES", str(table([row])))
    tiles._read_once.cache_clear()
    target, half = TARGETS["sm_90"], torch.bfloat16
    measured = config.Config(16, 128, 8, 4)
    for rows, capacity in ((1, 2048), (8, 513), (16, 1000)):
        assert config.decode_config(target, 64, half, True, rows, capacity) == measured
    for width, dtype, single, capacity in (
        (64, half, True, 512),
        (64, half, True, 2049),
        (128, half, True, 1000),
        (64, torch.float32, True, 1000),
        (64, half, False, 1000),
    ):
        assert config.decode_config(target, width, dtype, single, 8, capacity) != measured


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, r"must hold .format.: 1"),
        ({"rows": {}}, "list of"),
        ({"kernels": "0123"}, "measured on other kernels .0123. .* run fastformer tune again"),
        ({"rows": [[]]}, "row 0 must be an object"),
        ({"rows": [ROW, {**ROW, "pass": "sideways"}]}, "row 1: .pass. must be one of"),
        ({"rows": [{**ROW, "head_dim": 100}]}, "head_dim. must be one of"),
        ({"rows": [{k: v for k, v in ROW.items() if k != "length"}]}, "length. must be one of"),
        ({"rows": [{**ROW, "tile": [64, 33, 4, 2]}]}, "tile. must be .queries, keys, warps, stages."),
        ({"rows": [{**ROW, "tile": [64, 32, True, 2]}]}, "tile. must be"),
        ({"rows": [{**ROW, "microseconds": None}]}, "microseconds. must be a number"),
    ],
)
def test_what_is_no_table_is_refused(table, change, message):
    path = table(**change)
    with pytest.raises(ValueError, match=message) as refused:
        tiles.read(path)
    assert str(path) in str(refused.value)


def test_an_unreadable_table_is_refused_where_it_is_used(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTFORMER_TILES", str(tmp_path / "none.json"))
    tiles._read_once.cache_clear()
    with pytest.raises(ValueError, match=r"none.json cannot be read"):
        config.forward_config(TARGETS["sm_90"], call(64))


def run(*arguments, **environment):
    code = "import sys; from fastformer.cli import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", code, "tune", *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def test_the_tuner_rehearsed(tmp_path):
    path = tmp_path / "tiles.json"
    done = run("--rehearse", "--output", path)
    assert done.returncode == 0, done.stderr
    rows = tiles.read(path)
    assert {(key[0], key[1], key[2]) for key in rows} == {
        ("interpreter", name, rules)
        for name in tiles.PASSES
        for rules in tiles.RULES
        # Windows take two kernels even where sequences are short, and decoding has one class of rules.
        if (name, rules) not in (("short backward", "rich"), ("decode", "masked"), ("decode", "rich"))
    }
    # A table of other kernels is not added to.
    path.write_text(path.read_text().replace(tiles.digest(), "0" * 16))
    refused = run("--rehearse", "--output", path)
    assert refused.returncode == 2
    assert "measured on other kernels" in refused.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to tune on")
def test_without_a_gpu_the_tuner_says_so():
    done = run()
    assert done.returncode == 2
    assert done.stderr == (
        "fastformer: tuning needs a CUDA GPU that PyTorch sees; --rehearse goes through it without one.\n"
    )
