"""Reading passages: from the standard library, from CSV and JSON lines; splitting them."""

import json
import sysconfig
from pathlib import Path

import pytest

from fastformer.demo.data import STDLIB_PACKAGES, Corpus, read_corpus, split, stdlib_corpus
from fastformer.demo.errors import UserError


@pytest.fixture(scope="module")
def stdlib() -> Corpus:
    return stdlib_corpus(per_package=300, seed=0)


def test_stdlib_has_passages_of_every_package(stdlib):
    assert stdlib.names == list(STDLIB_PACKAGES)
    counts = [stdlib.labels.count(k) for k in range(len(stdlib.names))]
    assert max(counts) == 300
    assert min(counts) > 80  # json, the smallest


def test_stdlib_passages_are_paragraphs_of_their_package(stdlib):
    root = Path(sysconfig.get_path("stdlib"))
    for label in (0, len(stdlib.names) - 1):
        sources = "".join(path.read_text("utf-8") for path in (root / stdlib.names[label]).rglob("*.py"))
        passages = [text for text, k in zip(stdlib.texts, stdlib.labels, strict=True) if k == label]
        for passage in passages[:50]:
            assert "\n\n" not in passage
            assert passage.splitlines()[0] in sources  # further lines lose common indentation


def test_stdlib_passages_are_unique_and_repeatable(stdlib):
    assert len(set(stdlib.texts)) == len(stdlib.texts)
    assert stdlib_corpus(per_package=300, seed=0) == stdlib
    assert stdlib_corpus(per_package=300, seed=1) != stdlib


def test_passages_of_two_packages_are_dropped(tmp_path):
    for package in STDLIB_PACKAGES:
        (tmp_path / package / "tests").mkdir(parents=True)
        own = [f"# passage {i} of the package {package}, long enough to be kept" for i in range(30)]
        shared = "# a licence notice that stands in each of the packages"
        (tmp_path / package / "__init__.py").write_text("\n\n".join([shared, *own, own[0], "x = 1"]))
        (tmp_path / package / "tests" / "test_it.py").write_text("# a passage of the tests, which is to be left out")
    corpus = stdlib_corpus(per_package=100, seed=0, stdlib=tmp_path)
    assert len(corpus.texts) == 30 * len(STDLIB_PACKAGES)
    assert all(name in text for text, name in zip(corpus.texts, (corpus.names[k] for k in corpus.labels), strict=True))


def test_a_python_without_sources_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"0 passages.*--data"):
        stdlib_corpus(per_package=10, seed=0, stdlib=tmp_path)


def test_csv_fields_may_hold_anything(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text('\ufefflabel,text\n10,"a ""quoted"", long\nfield"\n9,naïve \u2028 text\n9,  \n9,z\n', "utf-8")
    corpus = read_corpus(path, "text", "label")
    assert corpus.texts == ['a "quoted", long\nfield', "naïve \u2028 text", "z"]
    assert corpus.names == ["9", "10"]  # numbers in their own order
    assert corpus.labels == [1, 0, 0]
    assert corpus.note == "1 rows without text were left out"


def test_csv_field_longer_than_the_modules_limit(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text(f"text,label\n{'word ' * 50_000},a\ny,b\n")
    assert len(read_corpus(path, "text", "label").texts[0]) == 250_000


def test_jsonl_lines_end_at_newlines_only(tmp_path):
    rows = [{"body": f"line \u2028 separator \x85 {i}", "topic": i % 2} for i in range(4)]
    path = tmp_path / "x.JSONL"
    path.write_text("\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n", "utf-8", newline="")
    corpus = read_corpus(path, "body", "topic")
    assert corpus.texts == [row["body"] for row in rows]
    assert corpus.names == ["0", "1"]


def test_deeply_nested_json_is_one_sentence(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("[" * 100_000)
    with pytest.raises(UserError, match="line 1: no valid JSON"):
        read_corpus(path, "text", "label")


def test_split_keeps_shares_and_loses_nothing():
    labels = [0] * 100 + [1] * 40 + [2]
    corpus = Corpus([f"text {i}" for i in range(len(labels))], labels, ["a", "b", "c"], "here")
    train, test = split(corpus, held_out=0.2, seed=3)
    assert sorted(train.texts + test.texts) == sorted(corpus.texts)
    assert [test.labels.count(k) for k in range(3)] == [20, 8, 0]
    assert split(corpus, held_out=0.2, seed=3) == (train, test)
    for text, label in zip(train.texts, train.labels, strict=True):
        assert labels[int(text.split()[1])] == label
    assert len(split(corpus, held_out=0.2, seed=3, most=14)[1].texts) == 14


def test_split_needs_a_label_with_two_rows():
    with pytest.raises(UserError, match="one row for each label"):
        split(Corpus(["x", "y"], [0, 1], ["a", "b"], "here"), held_out=0.2, seed=0)
