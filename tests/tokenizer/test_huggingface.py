"""tokenizer.json: what is read exactly, and what is refused by name."""

import copy
import itertools
import json
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import normalizers

from fastformer.tokenizer import BPETokenizer
from fastformer.tokenizer.normalize import FORMS, normalize
from tests.tokenizer.conftest import code_points, hard_strings, write_json


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A tokenizer.json with a few special tokens."""
    path = tmp_path_factory.mktemp("hf") / "tokenizer.json"
    texts = hard_strings(800, seed=40)
    BPETokenizer.train(iter(texts), 900, "gpt2", special_tokens=["<s>", "</s>", "<pad>"]).save(path)
    return json.loads(path.read_text(encoding="utf-8"))


def check(data: dict[str, Any], tmp_path: Path, texts: list[str]) -> BPETokenizer:
    path = write_json(tmp_path / "tokenizer.json", data)
    reference, ours = tokenizers.Tokenizer.from_file(str(path)), BPETokenizer.from_file(path)
    for text in texts:
        want = reference.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, allowed_special="all") == want, repr(text)
        assert ours(text, allowed_special="all")["input_ids"] == reference.encode(text).ids, repr(text)
    reference.encode_special_tokens = True
    for text in texts:
        assert ours.encode(text) == reference.encode(text, add_special_tokens=False).ids, repr(text)
    ours.save(tmp_path / "again.json")
    again = BPETokenizer.from_file(tmp_path / "again.json")
    assert [again(text)["input_ids"] for text in texts] == [ours(text)["input_ids"] for text in texts]
    return ours


def added(base: dict[str, Any], *tokens: dict[str, Any]) -> dict[str, Any]:
    data = copy.deepcopy(base)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    for i, token in enumerate(tokens):
        data["added_tokens"].append({**flags, "id": 900 + i, **token})
    return data


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"normalizer": {"type": "NFC"}},
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFKD"}, {"type": "NFC"}]}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
        {
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Digits", "individual_digits": True},
                    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
                ],
            }
        },
        {
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Split", "pattern": {"String": "a"}, "behavior": "Isolated", "invert": False},
                    {"type": "Digits", "individual_digits": False},
                    {
                        "type": "Split",
                        "pattern": {"Regex": r"\p{Lu}\p{L}*|\s+"},
                        "behavior": "Isolated",
                        "invert": True,
                    },
                    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
                ],
            }
        },
        {
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [
                    {"SpecialToken": {"id": "<s>", "type_id": 0}},
                    {"Sequence": {"id": "A", "type_id": 0}},
                    {"SpecialToken": {"id": "</s>", "type_id": 0}},
                ],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
                "special_tokens": {
                    "<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]},
                    "</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]},
                },
            }
        },
        {
            "post_processor": {
                "type": "RobertaProcessing",
                "sep": ["</s>", 1],
                "cls": ["<s>", 0],
                "trim_offsets": True,
                "add_prefix_space": False,
            }
        },
    ],
)
def test_parts(base: dict[str, Any], change: dict[str, Any], tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        check({**base, **change}, tmp_path, ["", " ", *hard_strings(1200, seed=41), "x<s>\n</s>", "<pad> a"])


def test_added_tokens(base: dict[str, Any], tmp_path: Path) -> None:
    data = added(
        base,
        {"content": "<mask>", "special": True, "lstrip": True},
        {"content": "[R]", "rstrip": True},
        {"content": "[B]", "lstrip": True, "rstrip": True},
        {"content": "[Rx]"},
        {"content": "<s>y", "special": True},
        {"content": "né", "normalized": True},
        {"content": "é", "normalized": True},  # a byte's own string: the file's id gives way to the vocabulary's
    )
    data["normalizer"] = {"type": "NFC"}
    parts = [
        "<mask>",
        "[R]",
        "[B]",
        "é",
        "né",
        "ne\u0301",
        "[Rx]",
        "<s>",
        "<s>y",
        " ",
        "\n",
        "\u3000",
        "a",
        "Word",
        "</s>",
    ]
    rng = random.Random(3)
    check(data, tmp_path, ["".join(rng.choices(parts, k=rng.randint(1, 8))) for _ in range(3000)])


def test_ignore_merges(base: dict[str, Any], tmp_path: Path) -> None:
    for ignore in (False, True):
        data = copy.deepcopy(base)
        data["model"]["ignore_merges"] = ignore
        data["model"]["vocab"]["xyzzy"] = 950
        ours = check(data, tmp_path, ["xyzzy", " xyzzy", "xyzzy xyzzy", *hard_strings(200, seed=42)])
        assert (ours.encode("xyzzy") == [950]) is ignore


def test_merges_that_lead_to_one_token_twice(base: dict[str, Any], tmp_path: Path) -> None:
    data = copy.deepcopy(base)
    names = {f"q{a}": 960 + i for i, a in enumerate("wxyz")} | {
        "wx": 970,
        "xy": 971,
        "yz": 972,
        "qwx": 973,
        "wxy": 974,
        "xyz": 975,
    }
    data["model"]["vocab"].update(names)
    extra = [
        ("q", "wx"),
        ("wx", "y"),
        ("x", "y"),
        ("w", "xy"),
        ("w", "x"),
        ("y", "z"),
        ("x", "yz"),
        ("xy", "z"),
        ("q", "w"),
    ]
    data["model"]["merges"] = [list(pair) for pair in extra] + data["model"]["merges"]
    data["model"]["vocab"]["qw"] = 960
    check(data, tmp_path, ["".join(p) for n in range(1, 6) for p in itertools.product("qwxyz", repeat=n)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalizer": {"type": "Lowercase"}}, "Lowercase"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "Whitespace"),
        ({"pre_tokenizer": None}, "pre_tokenizer"),
        ({"post_processor": {"type": "BertProcessing", "sep": ["a", 0], "cls": ["b", 1]}}, "BertProcessing"),
        ({"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}, "WordPiece"),
        ({"truncation": {"max_length": 3}}, "truncation"),
        ({"padding": {"strategy": "BatchLongest"}}, "padding"),
        ({"pre_tokenizer": {"pretokenizers": []}}, "malformed"),
    ],
)
def test_refusals(base: dict[str, Any], change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write_json(tmp_path / "tokenizer.json", {**base, **change})
    with pytest.raises(ValueError, match=message) as caught:
        BPETokenizer.from_file(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("option", "value"),
    [("dropout", 0.1), ("continuing_subword_prefix", "##"), ("end_of_word_suffix", "</w>"), ("type", "Unigram")],
)
def test_model_refusals(base: dict[str, Any], option: str, value: object, tmp_path: Path) -> None:
    data = {**base, "model": {**base["model"], option: value}}
    with pytest.raises(ValueError, match=str(value)):
        BPETokenizer.from_file(write_json(tmp_path / "tokenizer.json", data))


@pytest.mark.parametrize("expression", [r"\w+|\s+", "a$|.", r"\p{N}{1,3}+", r"[a-z&&[^b]]"])
def test_regex_refusals(base: dict[str, Any], expression: str, tmp_path: Path) -> None:
    split = {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    data = {**base, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]}}
    with pytest.raises(ValueError, match="not supported: it holds"):
        BPETokenizer.from_file(write_json(tmp_path / "tokenizer.json", data))


@pytest.mark.parametrize("form", FORMS)
def test_normalization_of_every_code_point(form: Any) -> None:
    reference = getattr(normalizers, form)()
    points = [chr(p) for p in code_points(full=False)]
    for text in ("\n".join(f"a{c}\u0327\u0301" for c in points), *hard_strings(2000, seed=43)):
        assert normalize(form, text) == reference.normalize_str(text)
