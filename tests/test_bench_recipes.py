"""The table of `make recipes`: what is run, kept and written."""

import json

import pytest

pytest.importorskip("torch")
from bench import recipes


def result(value, speed):
    return {"metric": "accuracy", "value": value, "cpu_tokens_per_second": speed}


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """The cases that were run, in order; results and the table go to tmp_path."""
    done = []

    def run(case, patched, data):
        done.append((case.name, patched))
        return result(0.5 + 0.25 * patched, 100.0 + 100.0 * patched)

    monkeypatch.setattr(recipes, "run", run)
    monkeypatch.setattr(recipes, "ROOT", tmp_path)
    monkeypatch.setattr(recipes, "KEPT", tmp_path / "rows.json")
    monkeypatch.setenv("FASTFORMER_DATA", str(tmp_path))
    return done


def written(folder):
    (path,) = folder.glob("bench/results/cpu-*/recipes.md")
    return path.read_text()


def test_every_case_is_there():
    for case in recipes.CASES:
        assert (recipes.ROOT / "examples" / f"{case.script}.py").is_file()
        assert not case.base or recipes.by_name(case.base)
    assert len({recipes.slug(case.name) for case in recipes.CASES}) == len(recipes.CASES)
    scripts = {path.stem for path in (recipes.ROOT / "examples").glob("*.py") if "__main__" in path.read_text()}
    assert scripts == {case.script for case in recipes.CASES}


def test_all_run_stock_and_patched(runs, tmp_path):
    assert recipes.main([]) == 0
    assert runs == [(case.name, patched) for case in recipes.CASES for patched in (False, True)]
    assert written(tmp_path).count("| accuracy | 0.500 | 0.750 | 100 | 200 | 2.00x |") == len(recipes.CASES)


def test_some_are_run_again_and_the_rest_is_kept_if_its_arguments_are_the_same(runs, tmp_path):
    recipes.main([])
    rows = json.loads(recipes.KEPT.read_text())
    first, second, third = (case.name for case in recipes.CASES[:3])
    rows[second]["patched"]["value"] = 0.125
    rows[third]["arguments"] = ["--steps", "1"]
    recipes.KEPT.write_text(json.dumps(rows))
    del runs[:]
    assert recipes.main([first]) == 0
    assert [name for name, _ in runs] == [first, first]
    table = written(tmp_path)
    assert f"| {first} | accuracy | 0.500 | 0.750 |" in table
    assert f"| {second} | accuracy | 0.500 | 0.125 |" in table
    assert f"| {third} |" not in table


def test_what_cannot_run(runs, monkeypatch, capsys):
    assert recipes.main(["nothing"]) == 2
    assert "there is no recipe" in capsys.readouterr().err
    monkeypatch.setenv("FASTFORMER_DATA", "/nowhere")
    assert recipes.main([]) == 2
    assert "FASTFORMER_DATA" in capsys.readouterr().err
    assert not runs
