"""A Hugging Face fast tokenizer whose texts go through fastformer's BPE engine.

Everything else (special tokens, pairs, offsets, saving, chat templates) stays transformers' and its `tokenizers`
backend's; a call that needs the backend goes to it. Both give the same ids.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BatchEncoding, PreTrainedTokenizerFast

from fastformer.integrations.families.batch import returns_tuples
from fastformer.tokenizer import BPETokenizer

_PLAIN_TRUNCATIONS = ("do_not_truncate", "longest_first", "only_first")
_SETTINGS = ("model_max_length", "padding_side", "truncation_side", "model_input_names", "clean_up_tokenization_spaces")
_ASKS_BACKEND = (
    "return_overflowing_tokens",
    "return_special_tokens_mask",
    "return_offsets_mapping",
    "return_length",
    "is_split_into_words",
    "sanitize_control_tokens",
)


class FastTokenizer(PreTrainedTokenizerFast):
    """A transformers tokenizer for byte-level BPE vocabularies, several times faster on batches.

    Made like any: `FastTokenizer.from_pretrained(folder)`, `FastTokenizer(tokenizer_file=..., pad_token=...)`, or
    `FastTokenizer.of(tokenizer)` from one that is loaded already. Pads, batches, truncates, saves, pickles and serves
    pipelines and collators. A vocabulary that is no byte-level BPE works too, at transformers' own speed, and says so
    once. Needs transformers 5 to be faster.
    """

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast) -> FastTokenizer:
        """The fast twin of a stock tokenizer.

        Raises:
            TypeError: `tokenizer` has no `tokenizers` backend.
        """
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise TypeError(f"tokenizer must be a fast tokenizer of transformers, got {type(tokenizer).__name__}")
        settings = {
            "tokenizer_object": tokenizer.backend_tokenizer,
            **tokenizer.special_tokens_map,
            **{name: getattr(tokenizer, name) for name in _SETTINGS},
            "chat_template": tokenizer.chat_template,
        }
        return cls(**settings)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_fastformer_engine"}

    def _encode_plus(self, text: Any, text_pair: Any = None, *args: Any, **kwargs: Any) -> BatchEncoding:
        slow = functools.partial(super()._encode_plus, text, text_pair, *args, **kwargs)
        if args or text_pair is not None or not self._is_plain(text, kwargs):
            return slow()
        engine = self._engine()
        adds = kwargs.get("add_special_tokens", True)
        limit = kwargs.get("max_length") if _value(kwargs, "truncation_strategy") != "do_not_truncate" else None
        if engine is None or (limit is not None and limit <= engine.added):
            return slow()
        single = isinstance(text, str)
        rows = engine.encode([text] if single else text, limit, adds, self.truncation_side)
        tensors = _name(kwargs.get("return_tensors"))
        data = self._columns(rows, kwargs, tensors)
        if data is None:
            return slow()
        if single and tensors is None:
            data = {name: value[0] for name, value in data.items()}
        longest = max(rows, key=len)
        self._eventual_warn_about_too_long_sequence(
            longest.tolist(), kwargs.get("max_length"), kwargs.get("verbose", True)
        )
        return _LazyEncoding(data, slow)

    def _is_plain(self, text: Any, asked: dict[str, Any]) -> bool:
        """Whether the engine can answer this call."""
        texts = [text] if isinstance(text, str) else text
        if returns_tuples() or not isinstance(texts, list) or not texts or any(type(t) is not str for t in texts):
            return False
        splits = asked.get("split_special_tokens")
        splits = self.split_special_tokens if splits is None else splits
        if splits or any(asked.get(name) for name in _ASKS_BACKEND):
            return False
        known = _value(asked, "truncation_strategy") in _PLAIN_TRUNCATIONS
        return known and _name(asked.get("return_tensors")) in (None, "pt", "np")

    def _engine(self) -> _Engine | None:
        backend: Any = self._tokenizer
        # The backend is anybody's to change; what its texts go through is cheap to compare.
        parts = (backend.normalizer, backend.pre_tokenizer, backend.post_processor)
        version = (backend.get_vocab_size(with_added_tokens=True), *map(repr, parts))
        known = self.__dict__.get("_fastformer_engine")
        if known is None or known[0] != version:
            engine = None
            try:
                engine = _Engine(backend)
            except ValueError as error:
                warnings.warn(f"texts go through transformers' own tokenizer: {error}", stacklevel=4)
            known = self.__dict__["_fastformer_engine"] = (version, engine)
        return known[1]

    def _columns(self, rows: list[np.ndarray], asked: dict[str, Any], tensors: str | None) -> dict[str, Any] | None:
        """What the call returns, by name; None if the rows do not fit into one array as asked."""
        lengths = [len(row) for row in rows]
        width, strategy = max(lengths), _value(asked, "padding_strategy", "do_not_pad")
        pads = strategy != "do_not_pad"
        if strategy == "max_length" and asked.get("max_length") is not None:
            if width > asked["max_length"]:
                return None
            width = asked["max_length"]
        multiple = asked.get("pad_to_multiple_of")
        if pads and multiple:
            if _value(asked, "truncation_strategy") != "do_not_truncate" and asked["max_length"] % multiple:
                return None
            width = -(-width // multiple) * multiple
        if not pads and min(lengths) < width:
            return None if tensors else self._select(asked, _Ragged(rows))
        left = (asked.get("padding_side") or self.padding_side) == "left"
        ids = np.full((len(rows), width), self.pad_token_id if pads else 0, np.int64)
        mask = np.zeros_like(ids)
        for i, row in enumerate(rows):
            place = slice(width - len(row), width) if left else slice(0, len(row))
            ids[i, place] = row
            mask[i, place] = 1
        columns = self._select(asked, {
            "input_ids": ids,
            "token_type_ids": np.where(mask == 1, 0, self.pad_token_type_id),
            "attention_mask": mask,
        })  # fmt: skip
        if tensors == "pt":
            return {name: torch.from_numpy(value) for name, value in columns.items()}
        return columns if tensors else {name: value.tolist() for name, value in columns.items()}

    def _select(self, asked: dict[str, Any], columns: Any) -> dict[str, Any]:
        chosen = {"input_ids": columns["input_ids"]}
        for name in ("token_type_ids", "attention_mask"):
            wanted = asked.get(f"return_{name}")
            if name in self.model_input_names if wanted is None else wanted:
                chosen[name] = columns[name]
        return chosen


class _Engine:
    """fastformer's engine for a `tokenizers` backend, with the tokens its post-processor adds.

    Raises:
        ValueError: the backend asks for what the engine cannot do exactly.
    """

    def __init__(self, backend: Any) -> None:
        data = json.loads(backend.to_str())
        data["truncation"] = data["padding"] = None
        text = json.dumps(data)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "tokenizer.json"
            path.write_text(text, encoding="utf-8")
            self._bpe = BPETokenizer.from_file(path)
        plain = type(backend).from_str(text)
        bare, full = plain.encode("a", add_special_tokens=False).ids, plain.encode("a")
        starts = [i for i in range(len(full.ids)) if full.ids[i : i + len(bare)] == bare]
        if len(starts) != 1 or any(full.type_ids):
            raise ValueError("its post-processor does more than put tokens around a text")
        self._before = np.asarray(full.ids[: starts[0]], np.uint32)
        self._after = np.asarray(full.ids[starts[0] + len(bare) :], np.uint32)
        self.added = len(self._before) + len(self._after)
        names = sorted(self._bpe.special_tokens, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, names))) if names else None

    def encode(self, texts: list[str], limit: int | None, adds: bool, side: str) -> list[np.ndarray]:
        """The ids of each text, cut to `limit` from `side` with the added tokens counted."""
        if self._special is not None and any(map(self._special.search, texts)):
            rows = [self._bpe.encode_array(text, allowed_special="all") for text in texts]
        else:
            ids, bounds = self._bpe.encode_packed(texts)
            rows = [ids[a:b] for a, b in itertools.pairwise(bounds.tolist())]
        if limit is not None:
            kept = limit - self.added * adds
            rows = [row[:kept] if side == "right" else row[max(0, len(row) - kept) :] for row in rows]
        return [np.concatenate((self._before, row, self._after)) for row in rows] if adds and self.added else rows


class _Ragged(dict[str, Any]):
    """Columns of rows of different lengths, as lists."""

    def __init__(self, rows: list[np.ndarray]) -> None:
        super().__init__(
            input_ids=[row.tolist() for row in rows],
            token_type_ids=[[0] * len(row) for row in rows],
            attention_mask=[[1] * len(row) for row in rows],
        )


class _LazyEncoding(BatchEncoding):
    """A BatchEncoding that asks the backend for its encodings (offsets, words) only if somebody looks at them."""

    def __init__(self, data: dict[str, Any], slow: Callable[[], BatchEncoding]) -> None:
        self.__dict__["_slow"] = slow
        super().__init__(data, None, n_sequences=1)

    @property
    def _encodings(self) -> Any:
        if self.__dict__.get("_made") is None and self.__dict__.get("_slow") is not None:
            self.__dict__["_made"] = self.__dict__["_slow"]().encodings
        return self.__dict__.get("_made")

    @_encodings.setter
    def _encodings(self, value: Any) -> None:
        self.__dict__["_made"] = value


def _value(asked: dict[str, Any], name: str, default: str = "do_not_truncate") -> str:
    """The value of an argument that is one of transformers' enumerations."""
    return _name(asked.get(name)) or default


def _name(value: Any) -> str | None:
    return None if value is None else str(getattr(value, "value", value))
