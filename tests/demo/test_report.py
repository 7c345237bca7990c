"""The table, and files that are either whole or not there."""

import json

import pytest

from fastformer.demo.errors import UserError
from fastformer.demo.report import Row, atomically, draw, output_folder, smooth, table, write_json

ROWS = [
    Row("stock", 1000.0, 500.0, 10.0, 3 * 2**20, 0.5, 0.75, None),
    Row("dynamic", 2000.0, 1000.0, 5.0, None, 0.25, 0.5, 1.25e-7),
    Row("patched", 3456.7, 1500.0, 2.5, 5 * 2**29, 1.0, 1.0, 0.0),
]


def test_table_is_aligned_and_relative_to_its_first_row():
    lines = table(ROWS).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[2].split() == ["stock", "1,000", "1.00x", "10.0", "3", "MiB", "0.500", "75.0%", "reference"]
    assert lines[3].split() == ["dynamic", "2,000", "2.00x", "5.0", "n/a", "0.250", "50.0%", "1.2e-07"]
    assert lines[4].split() == ["patched", "3,457", "3.46x", "2.5", "2.50", "GiB", "1.000", "100.0%", "0.0e+00"]


def test_smooth_is_a_mean_of_what_came_before():
    assert smooth([4.0, 2.0]) == [4.0, 2.0]
    assert smooth([float(i) for i in range(40)])[:3] == [0.0, 0.5, 1.5]


def test_picture_and_numbers(tmp_path):
    pytest.importorskip("matplotlib")
    curves = [[1.0, 0.5]] * 3
    draw(tmp_path / "demo.png", ROWS, curves, "title")
    write_json(tmp_path / "results.json", ROWS, {"seed": 1}, curves)
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG\r\n")
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["settings"] == {"seed": 1}
    assert [run["losses"] for run in content["runs"]] == curves
    assert content["runs"][1]["peak_memory"] is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo.png", "results.json"]


@pytest.mark.parametrize("end", [KeyboardInterrupt, OSError])
def test_a_write_that_ends_early_leaves_the_old_file(tmp_path, end):
    path = tmp_path / "file.json"
    path.write_text("old")

    def write(temporary):
        temporary.write_text("half")
        raise end

    with pytest.raises(end):
        atomically(path, write)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_written_files_have_the_usual_mode(tmp_path):
    atomically(tmp_path / "a", lambda temporary: temporary.write_text("x"))
    (tmp_path / "b").write_text("x")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_output_folder_goes_when_nothing_was_written(tmp_path):
    with pytest.raises(KeyboardInterrupt), output_folder(tmp_path / "a" / "b"):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    with output_folder(tmp_path / "a" / "b") as folder:
        (folder / "file").touch()
    assert (tmp_path / "a" / "b" / "file").exists()
    with pytest.raises(RuntimeError), output_folder(tmp_path / "a" / "b"):
        raise RuntimeError
    assert (tmp_path / "a" / "b" / "file").exists()


def test_output_folder_under_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written: Not a directory"), output_folder(tmp_path / "file" / "x"):
        pass
