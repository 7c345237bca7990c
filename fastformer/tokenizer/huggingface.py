"""tokenizer.json: reading what the engine does exactly, refusing the rest by name, and writing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from fastformer.tokenizer.files import read_json, to_byte_level, to_bytes
from fastformer.tokenizer.model import Model
from fastformer.tokenizer.patterns import CL100K_ONIGURUMA, GPT2, Pattern, resolve


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
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _model(data: dict[str, Any], pattern: str | None, special_tokens: dict[str, int] | None) -> Model:
    model = data["model"]
    if model.get("type", "BPE") != "BPE":
        raise ValueError(f"model type {model.get('type')!r}; the engine is byte-level BPE")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise ValueError(f"the model's {option}={model[option]!r} is not supported")
    for option in ("normalizer", "truncation", "padding"):
        if data.get(option):
            raise ValueError(f"{option} {data[option]!r} is not supported")
    _check_decoder(data.get("decoder"))
    _check_post_processor(data.get("post_processor"))
    added = dict(special_tokens or {})
    for token in data.get("added_tokens") or []:
        for flag in ("single_word", "lstrip", "rstrip"):
            if token.get(flag):
                raise ValueError(f"the added token {token['content']!r} has {flag}=true, which is not supported")
        added.setdefault(token["content"], token["id"])
    merges: list[tuple[bytes, bytes]] = []
    used: set[bytes] = set()
    for number, merge in enumerate(model.get("merges") or []):
        parts = merge.split(" ") if isinstance(merge, str) else merge
        pair = [to_bytes(part) for part in parts]
        if len(pair) != 2 or pair[0] is None or pair[1] is None:
            raise ValueError(f"merge {number} is no pair of byte-level tokens: {merge!r}")
        merges.append((pair[0], pair[1]))
        used.update((pair[0], pair[1], pair[0] + pair[1]))
    vocab = {}
    for text, number in (model.get("vocab") or {}).items():
        token = to_bytes(text)
        if text in added and (token is None or token not in used):
            continue
        if token is None:
            raise ValueError(f"the token {text!r} is neither byte-level nor an added token")
        vocab[token] = number
    cut = resolve(pattern) if pattern else _pattern(data.get("pre_tokenizer"))
    return Model(vocab, merges, bool(model.get("ignore_merges")), cut, added)


def _check_decoder(decoder: dict[str, Any] | None) -> None:
    if decoder is None or decoder.get("type") == "ByteLevel":
        return
    if decoder.get("type") == "Sequence" and [d.get("type") for d in decoder.get("decoders", [])] == ["ByteLevel"]:
        return
    raise ValueError(f"decoder {decoder!r} is not supported; it must be ByteLevel")


def _check_post_processor(post: dict[str, Any] | None) -> None:
    if post is None or post.get("type") == "ByteLevel":
        return
    raise ValueError(f"post_processor {post.get('type')!r} is not supported")


def _pattern(pre: dict[str, Any] | None) -> Pattern:
    """The cut that a pre_tokenizer makes, which must end in ByteLevel."""
    if pre is None:
        raise ValueError("there is no pre_tokenizer; the engine needs ByteLevel")
    steps = pre.get("pretokenizers", []) if pre.get("type") == "Sequence" else [pre]
    expressions = []
    for i, step in enumerate(steps):
        kind = step.get("type")
        if kind == "ByteLevel":
            if i != len(steps) - 1:
                raise ValueError("the ByteLevel pre_tokenizer must come last")
            if step.get("add_prefix_space"):
                raise ValueError("ByteLevel with add_prefix_space=true is not supported")
            if step.get("use_regex", True):
                expressions.append(GPT2)
            return (
                resolve(tuple(expressions) if len(expressions) != 1 else expressions[0])
                if expressions
                else resolve("whole")
            )
        if kind != "Split":
            raise ValueError(f"pre_tokenizer {kind!r} is not supported")
        if step.get("behavior") != "Isolated" or step.get("invert"):
            raise ValueError(
                f"Split with behavior={step.get('behavior')!r}, invert={step.get('invert')!r} is not supported"
            )
        expression = step.get("pattern", {}).get("Regex")
        if expression is None:
            raise ValueError(f"Split with the pattern {step.get('pattern')!r} is not supported; it must be a Regex")
        # Hugging Face's engine reads these otherwise than the `regex` package does.
        if found := re.search(r"\$|(?<!\[)\^|[0-9]\}\+|&&", expression):
            raise ValueError(f"Split with the regex {expression!r} is not supported: it holds {found.group()!r}")
        expressions.append(expression)
    raise ValueError("the pre_tokenizer has no ByteLevel step")


def _pre_tokenizer(pattern: Pattern) -> dict[str, Any]:
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": pattern.name == "gpt2",
    }
    if pattern.name in ("gpt2", "whole"):
        return byte_level
    expressions = (CL100K_ONIGURUMA,) if pattern.name == "cl100k" else pattern.expressions
    splits = [
        {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
        for expression in expressions
    ]
    return {"type": "Sequence", "pretokenizers": [*splits, byte_level]}


def dump(model: Model, merges: list[tuple[bytes, bytes]]) -> bytes:
    """The tokenizer.json of a model whose merges, in the order of rank, are `merges`."""
    vocab = {to_byte_level(token): number for token, number in model.vocab.items()}
    vocab.update({name: number for name, number in model.special_tokens.items() if name not in vocab})
    data = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": number,
                "content": name,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for name, number in sorted(model.special_tokens.items(), key=lambda item: item[1])
        ],
        "normalizer": None,
        "pre_tokenizer": _pre_tokenizer(model.pattern),
        "post_processor": None,
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
