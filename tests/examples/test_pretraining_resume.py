"""Pre-training that is interrupted and resumed is the run that was not, bit for bit; and the stream under it."""

import importlib
import itertools

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

transformers = pytest.importorskip("transformers", minversion="5")
pytest.importorskip("tqdm")
import pretraining_data as data  # noqa: E402
import recipe  # noqa: E402

from fastformer.demo.errors import UserError  # noqa: E402
from tests.examples.conftest import SMALL  # noqa: E402

STEPS = ["--steps", "14", "--save-every", "5", "--dropout", "0.2"]


@pytest.fixture
def pretrain():
    return importlib.import_module("pretrain")


def stop_at(monkeypatch, pretrain, step):
    stock = pretrain.Run.train_step

    def train_step(run):
        if run.step + 1 == step:
            raise KeyboardInterrupt
        stock(run)

    monkeypatch.setattr(pretrain.Run, "train_step", train_step)


@pytest.mark.parametrize("objective", ["mlm", "mlm+nsp", "clm"])
@pytest.mark.parametrize("patch", ["--patch", "--no-patch"])
def test_resumed_is_uninterrupted(objective, patch, pretrain, corpus, tmp_path, monkeypatch):
    arguments = ["--data", str(corpus), *SMALL, *STEPS, "--objective", objective, patch, "--output"]
    whole = pretrain.main([*arguments, str(tmp_path / "whole")])
    for last in (8, 13):  # twice, in one output
        with monkeypatch.context() as planted:
            stop_at(planted, pretrain, last)
            with pytest.raises(KeyboardInterrupt) as stopped:
                pretrain.main([*arguments, str(tmp_path / "cut"), *(["--resume"] if last > 8 else [])])
            assert "the last good checkpoint is" in stopped.value.__notes__[0]
    torch.manual_seed(99)  # whatever else happened in between
    rest = pretrain.main([*arguments, str(tmp_path / "cut"), "--resume"])
    assert rest["losses"] == whole["losses"]
    assert len(rest["losses"]) == 14
    assert (rest["value"], rest["tokens"]) == (whole["value"], whole["tokens"])
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not (tmp_path / "cut" / "checkpoint.pt").exists()


def test_another_run_is_not_resumed(pretrain, corpus, tmp_path, monkeypatch):
    arguments = ["--data", str(corpus), *SMALL, *STEPS, "--output", str(tmp_path)]
    with monkeypatch.context() as planted:
        stop_at(planted, pretrain, 7)
        with pytest.raises(KeyboardInterrupt):
            pretrain.main(arguments)
    with pytest.raises(UserError, match="give --resume or another --output"):
        pretrain.main(arguments)
    with pytest.raises(UserError, match="--batch-size was 8 when the checkpoint was saved, now it is 4"):
        pretrain.main([*arguments, "--resume", "--batch-size", "4"])


def test_nan_stops_and_leaves_the_last_good_checkpoint(pretrain, corpus, tmp_path, monkeypatch):
    stock = pretrain.Run.train_step

    def train_step(run):
        if run.step == 7:
            with torch.no_grad():
                next(run.model.parameters()).fill_(torch.nan)
        stock(run)

    monkeypatch.setattr(pretrain.Run, "train_step", train_step)
    with pytest.raises(recipe.Diverged, match="the loss became nan at step 8") as stopped:
        pretrain.main(["--data", str(corpus), *SMALL, *STEPS, "--output", str(tmp_path)])
    assert "the last good checkpoint is" in stopped.value.__notes__[0]
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["counts"][0] == 5
    assert all(bool(torch.isfinite(value).all()) for value in state["parts"][0].values())


def ids_of(text, **_):
    return {"input_ids": [[ord(c) for c in one] for one in text] if isinstance(text, list) else [ord(c) for c in text]}


def test_every_paragraph_comes_once_a_pass_but_those_held_out(corpus):
    files = data.text_files(corpus)
    assert [path.name for path in files] == ["a.txt", "b.txt.gz", "c.txt.xz"]
    texts = [text for path in files for _, text in data.paragraphs(path)]
    kept = sorted(text for text in texts if not data.is_held_out(text))
    out = data.held_out(files, 1000)
    assert sorted(out) == sorted(text for text in texts if data.is_held_out(text))
    assert 0 < len(out) < len(texts) / 10
    stream = data.TextStream(files, ids_of, limit=10_000, seed=0, buffer=16)
    drawn = ["".join(map(chr, next(stream)[0])) for _ in range(3 * len(kept))]
    counts = [drawn.count(text) / kept.count(text) for text in set(kept)]
    assert 2 <= min(counts) <= max(counts) <= 4  # three passes, give or take what waits in the buffer
    assert drawn[: len(kept)] != kept


@pytest.mark.parametrize("place", [0, 5, 433, 900])
def test_a_stream_goes_on_where_it_stood(corpus, place):
    files = data.text_files(corpus)
    first, second = (data.TextStream(files, ids_of, 30, seed=1, pairs=True, buffer=16) for _ in range(2))
    for _ in range(place):
        next(first)
    second.restore(first.state())
    for _ in range(600):
        assert next(first) == next(second)
        assert first.chance() == second.chance()
        assert first.other() == second.other()


def test_paragraphs_from_any_line_are_the_rest(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\n\na\nb\n\n \nc\n\nd")
    found = list(data.paragraphs(path))
    assert [text for _, text in found] == ["a\nb", "c", "d"]
    for (line, _), rest in zip(found, itertools.count(1)):
        assert list(data.paragraphs(path, line)) == found[rest:]


def test_masks_are_devlins(tmp_path):
    class Tokenizer:
        all_special_ids, mask_token_id = (0, 1), 2

        def __len__(self):
            return 1000

    draw = np.random.default_rng(0)
    ids = [0, *range(3, 900), 1]
    counts = np.zeros(4)
    for _ in range(60):
        out = data.mask_tokens({"input_ids": ids}, Tokenizer(), draw)
        told = np.array(out["labels"])
        new, old = np.array(out["input_ids"]), np.array(ids)
        chosen = told != data.IGNORED
        assert (told[chosen] == old[chosen]).all()
        assert (new[~chosen] == old[~chosen]).all()
        assert not chosen[[0, -1]].any()
        masked, same = new[chosen] == 2, new[chosen] == old[chosen]
        counts += [chosen.sum(), masked.sum(), same.sum(), (~masked & ~same).sum()]
    share = counts / (60 * 897)
    assert share[0] == pytest.approx(0.15, abs=0.005)
    assert share[1:] / share[0] == pytest.approx([0.8, 0.1, 0.1], abs=0.02)
    short = data.mask_tokens({"input_ids": [0, 5, 1]}, Tokenizer(), draw)
    assert short["labels"] == [data.IGNORED, 5, data.IGNORED]


def test_a_tokenizer_without_the_special_tokens(corpus, tmp_path):
    from types import SimpleNamespace

    bare = SimpleNamespace(sep_token_id=None, eos_token_id=1, cls_token_id=None, mask_token_id=None)
    with pytest.raises(UserError, match="--objective mlm needs a tokenizer with the tokens cls, mask"):
        data.Batches("mlm", 1, None, bare, None, 0)
    data.Batches("clm", 1, None, bare, None, 0)
