"""tokenizer.json: reading what the engine does exactly, refusing the rest by name, and writing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from fastformer.tokenizer.added import AddedToken
from fastformer.tokenizer.files import read_json, to_byte_level, to_bytes
from fastformer.tokenizer.model import Model, specials
from fastformer.tokenizer.normalize import FORMS, Form
from fastformer.tokenizer.patterns import CL100K_ONIGURUMA, GPT2, ONIGURUMA_KNOWN, Pattern, resolve

# What the regex engine of Hugging Face's tokenizers reads otherwise than the `regex` package: `$` and `^` are ends of
# lines, {1,3}+ is no possessive quantifier, && intersects classes, and the shorthand classes differ.
_AMBIGUOUS = re.compile(
    r"\$|(?<!\[)\^|[0-9,]\}\+|&&|\[\[|\\[wWdDbBhHRXGAZzKkg<>xu0-9]|\(\?[a-z]*[msx]|\(\?<[a-zA-Z]|\."
)


def load(path: Path, pattern: str | None, special_tokens: dict[str, int] | None) -> Model:
    """The Model of a tokenizer.json.

    Raises:
        ValueError: naming what the file asks for and the engine cannot do exactly, or what is malformed.
    """
    data = read_json(path)
    if not isinstance(data, dict) or not isinstance(data.get("model"), dict):
        raise ValueError(f"{path}: needs one JSON object with a `model`")
    try:
        return _model(data, pattern, special_tokens)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"malformed: {error!r}" if not isinstance(error, ValueError) else error
        raise ValueError(f"{path}: {reason}") from None


def _model(data: dict[str, Any], pattern: str | None, special_tokens: dict[str, int] | None) -> Model:
    model = data["model"]
    if model.get("type", "BPE") != "BPE":
        raise ValueError(f"model type {model.get('type')!r} is not supported; the engine is byte-level BPE")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise ValueError(f"the model's {option}={model[option]!r} is not supported")
    for option in ("truncation", "padding"):
        if data.get(option):
            raise ValueError(f"{option} in the file is not supported; pass it with the texts")
    _check_decoder(data.get("decoder"))
    added = specials(special_tokens or {})
    for item in data.get("added_tokens") or []:
        if item.get("single_word"):
            raise ValueError(f"the added token {item['content']!r} has single_word=true, which is not supported")
        number = model["vocab"].get(item["content"], item["id"])
        if item["content"] not in model["vocab"] and number != (want := _next_id(len(model["vocab"]), added)):
            raise ValueError(
                f"the added token {item['content']!r} has the id {number}; tokenizers would give it {want}"
            )
        flags = {flag: bool(item.get(flag)) for flag in ("special", "lstrip", "rstrip", "normalized")}
        added.setdefault(item["content"], AddedToken(item["content"], number, **flags))
    merges: list[tuple[bytes, bytes]] = []
    used: set[bytes] = set()
    for number, merge in enumerate(model.get("merges") or []):
        pair = [to_bytes(part) for part in (merge.split(" ") if isinstance(merge, str) else merge)]
        if len(pair) != 2 or pair[0] is None or pair[1] is None:
            raise ValueError(f"merge {number} is no pair of byte-level tokens: {merge!r}")
        merges.append((pair[0], pair[1]))
        used.update((pair[0], pair[1], pair[0] + pair[1]))
    vocab = {}
    for text, number in model["vocab"].items():
        token = to_bytes(text)
        if text in added and (token is None or (token not in used and len(token) > 1)):
            continue
        if token is None:
            raise ValueError(f"the token {text!r} is neither byte-level nor an added token")
        vocab[token] = number
    cut, prefix_space = _pattern(data.get("pre_tokenizer"))
    return Model(
        vocab,
        merges,
        bool(model.get("ignore_merges")),
        resolve(pattern) if pattern else cut,
        added,
        _normalizers(data.get("normalizer")),
        prefix_space,
        _template(data.get("post_processor")),
        hugging_face=True,
    )


def _next_id(vocab_size: int, added: dict[str, AddedToken]) -> int:
    """The id that Hugging Face's loader gives an added token that the model's vocabulary does not hold."""
    return max([vocab_size, *(token.id + 1 for token in added.values())])


def _check_decoder(decoder: dict[str, Any] | None) -> None:
    if decoder is None or decoder["type"] == "ByteLevel":
        return
    if decoder["type"] == "Sequence" and [d["type"] for d in decoder["decoders"]] == ["ByteLevel"]:
        return
    raise ValueError(f"decoder {decoder['type']!r} is not supported; it must be ByteLevel")


def _normalizers(normalizer: dict[str, Any] | None) -> tuple[Form, ...]:
    if normalizer is None:
        return ()
    if normalizer["type"] == "Sequence":
        return tuple(form for step in normalizer["normalizers"] for form in _normalizers(step))
    for form in FORMS:
        if normalizer["type"] == form:
            return (form,)
    raise ValueError(f"normalizer {normalizer['type']!r} is not supported")


def _template(post: dict[str, Any] | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that a post_processor puts before and after one text."""
    if post is None or post["type"] == "ByteLevel":
        return (), ()
    if post["type"] == "Sequence":
        found = [_template(step) for step in post["processors"]]
        if sum(template != ((), ()) for template in found) > 1:
            raise ValueError("post_processor: several steps that add tokens are not supported")
        return next((template for template in found if template != ((), ())), ((), ()))
    if post["type"] == "RobertaProcessing":
        return (post["cls"][1],), (post["sep"][1],)
    if post["type"] != "TemplateProcessing":
        raise ValueError(f"post_processor {post['type']!r} is not supported")
    before: list[int] = []
    after: list[int] = []
    seen = False
    for step in post["single"]:
        if "Sequence" in step:
            if seen:
                raise ValueError("post_processor: a template with the text twice is not supported")
            seen = True
        else:
            (after if seen else before).extend(post["special_tokens"][step["SpecialToken"]["id"]]["ids"])
    if not seen:
        raise ValueError("post_processor: a template without the text is not supported")
    return tuple(before), tuple(after)


def _pattern(pre: dict[str, Any] | None) -> tuple[Pattern, bool]:
    """The cut that a pre_tokenizer makes, which must end in ByteLevel, and whether it adds a space in front."""
    if pre is None:
        raise ValueError("there is no pre_tokenizer; the engine needs ByteLevel")
    steps = pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    expressions: list[str] = []
    removes = False
    for i, step in enumerate(steps):
        kind = step["type"]
        if kind == "ByteLevel":
            if i != len(steps) - 1:
                raise ValueError("a pre_tokenizer after ByteLevel is not supported")
            prefix_space = bool(step.get("add_prefix_space"))
            if prefix_space and expressions:
                raise ValueError("ByteLevel with add_prefix_space=true after another pre_tokenizer is not supported")
            if step.get("use_regex", True):
                expressions.append(GPT2)
            cut = _resolve(tuple(expressions))
            if removes and cut.name in ("regex", "deepseek", "whole"):
                raise ValueError("Split with behavior='Removed' is supported only where its regex matches every text")
            return cut, prefix_space
        if kind == "Digits":
            expressions.append(r"\p{N}" if step.get("individual_digits") else r"\p{N}+")
            continue
        if kind != "Split":
            raise ValueError(f"pre_tokenizer {kind!r} is not supported")
        if step["behavior"] == "Removed" and step.get("invert"):
            removes = True
        elif step["behavior"] != "Isolated":
            raise ValueError(
                f"Split with behavior={step['behavior']!r}, invert={step.get('invert')!r} is not supported"
            )
        find = step["pattern"]
        expressions.append(find["Regex"] if "Regex" in find else re.escape(find["String"]))
    raise ValueError("the pre_tokenizer has no ByteLevel step")


def _resolve(expressions: tuple[str, ...]) -> Pattern:
    if not expressions:
        return resolve("whole")
    if expressions in ONIGURUMA_KNOWN:
        return resolve(ONIGURUMA_KNOWN[expressions])
    for expression in expressions:
        if expression not in (GPT2, r"\p{N}", r"\p{N}+") and (found := _AMBIGUOUS.search(expression)):
            raise ValueError(f"Split with the regex {expression!r} is not supported: it holds {found.group()!r}")
    return resolve(expressions)


def _pre_tokenizer(model: Model) -> dict[str, Any]:
    pattern = model.pattern
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": model.prefix_space,
        "trim_offsets": True,
        "use_regex": pattern.name == "gpt2",
    }
    if pattern.name in ("gpt2", "whole"):
        return byte_level
    expressions = (CL100K_ONIGURUMA,) if pattern.name == "cl100k" else pattern.expressions
    if pattern.name == "regex":
        _resolve(expressions)  # refuses what the reader would read otherwise
    splits = [
        {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
        for expression in expressions
    ]
    return {"type": "Sequence", "pretokenizers": [*splits, byte_level]}


def _post_processor(model: Model) -> dict[str, Any] | None:
    before, after = model.template
    if not before and not after:
        return None
    name_of = {token.id: name for name, token in model.added.items()}
    names = {number: name_of.get(number, str(number)) for number in (*before, *after)}
    return {
        "type": "TemplateProcessing",
        "single": [
            *({"SpecialToken": {"id": names[number], "type_id": 0}} for number in before),
            {"Sequence": {"id": "A", "type_id": 0}},
            *({"SpecialToken": {"id": names[number], "type_id": 0}} for number in after),
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {name: {"id": name, "ids": [number], "tokens": [name]} for number, name in names.items()},
    }


def dump(model: Model, merges: list[tuple[bytes, bytes]]) -> bytes:
    """The tokenizer.json of a model whose merges, in the order of rank, are `merges`."""
    vocab = {to_byte_level(token): number for token, number in model.vocab.items()}
    for name, token in model.added.items():
        vocab.setdefault(name, token.id)
    forms = [{"type": form} for form in model.normalizers]
    data = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": token.id,
                "content": token.content,
                "single_word": False,
                "lstrip": token.lstrip,
                "rstrip": token.rstrip,
                "normalized": token.normalized,
                "special": token.special,
            }
            for token in sorted(model.added.values(), key=lambda token: token.id)
        ],
        "normalizer": None
        if not forms
        else forms[0]
        if len(forms) == 1
        else {"type": "Sequence", "normalizers": forms},
        "pre_tokenizer": _pre_tokenizer(model),
        "post_processor": _post_processor(model),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": model.whole_piece,
            "vocab": dict(sorted(vocab.items(), key=lambda item: item[1])),
            "merges": [[to_byte_level(left), to_byte_level(right)] for left, right in merges],
        },
    }
    return json.dumps(data, ensure_ascii=False).encode("utf-8")
