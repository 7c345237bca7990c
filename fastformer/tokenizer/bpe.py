"""BPETokenizer: the public face of the engine."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fastformer.tokenizer import _bpe, files, huggingface, image
from fastformer.tokenizer import padding as _padding
from fastformer.tokenizer.added import matcher, split
from fastformer.tokenizer.compat import TiktokenEncoding
from fastformer.tokenizer.model import Compiled, Model
from fastformer.tokenizer.normalize import normalize
from fastformer.tokenizer.patterns import Pattern
from fastformer.tokenizer.streaming import StreamDecoder

Special = Literal["all"] | Collection[str]


class BPETokenizer(_bpe.Encoding):
    """A byte-level BPE tokenizer whose ids are those of tiktoken and Hugging Face tokenizers on every string.

    Text that looks like a special token is ordinary text unless `allowed_special` names it. Lone surrogates in a str
    become U+FFFD, surrogate pairs the character they mean. Bytes that are no UTF-8 are encoded as tiktoken's
    `Encoding._encode_bytes` does: everything from the last pretoken before the fault on is one pretoken.

    Objects are immutable, pickle, copy, and may be used from any number of threads and across fork.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._engine = model.engine()
        # The scanner's number where text goes to the engine as it is, None where Python has something to do first.
        self._number = model.pattern.number if model.plain else None
        self._bind(self._engine, -1 if self._number is None else self._number)
        self._specials = {name: token.id for name, token in model.added.items() if token.special}
        self._raw = {name: token for name, token in model.added.items() if not token.normalized}
        self._normalized = {self._normalize(n): token for n, token in model.added.items() if token.normalized}

    @classmethod
    def from_file(
        cls, path: str | Path, pattern: str | None = None, special_tokens: dict[str, int] | None = None
    ) -> BPETokenizer:
        """Load a vocabulary.

        Args:
            path: a `.tiktoken` file, a `tokenizer.json`, a `.ffbpe` file that `save` wrote, or a folder that holds
                tokenizer.json, vocab.json and merges.txt, or encoder.json and vocab.bpe. With the environment variable
                FASTFORMER_TOKENIZER_CACHE naming a folder, what is built is kept there as .ffbpe and found the next
                time; what is found there damaged or stale is built anew.
            pattern: "gpt2", "cl100k", "o200k", "llama3", "qwen2", "deepseek", "whole", or a regular expression. By
                default what tokenizer.json says, "gpt2" for the other formats.
            special_tokens: strings and their ids, on top of those that the file names.

        Raises:
            FileNotFoundError: nothing is there.
            ValueError: the file is malformed, or asks for what the engine cannot do exactly.
        """
        return cls(files.load(Path(path), pattern, special_tokens))

    @classmethod
    def train(
        cls,
        source: str | Path | Sequence[str | Path] | Iterable[str],
        vocab_size: int,
        pattern: str = "gpt2",
        special_tokens: Sequence[str] = (),
        min_frequency: int = 0,
        max_token_length: int | None = None,
        progress: bool | Callable[[int], object] = False,
        threads: int = 1,
    ) -> BPETokenizer:
        """Learn a vocabulary; the merges are those of Hugging Face's BpeTrainer over the whole ByteLevel alphabet.

        See fastformer.tokenizer.training.train for the arguments.
        """
        from fastformer.tokenizer import training

        options = (pattern, special_tokens, min_frequency, max_token_length, progress, threads)
        return cls(training.train(source, vocab_size, *options))

    # Encoding; `encode` itself is the engine's, which comes back to _encode where Python has something to do.

    def encode_array(
        self, text: str | bytes, *, allowed_special: Special = (), disallowed_special: Special = ()
    ) -> np.ndarray:
        """The ids of `text` as a uint32 array [tokens]; arguments as for `encode`."""
        if allowed_special or disallowed_special or self._number is None:
            return self._encode_added(text, allowed_special, disallowed_special)
        return _numbers(self._engine.encode_array(text, self._number), np.uint32)

    def encode_packed(self, texts: Any, *, threads: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all texts in one uint32 array [tokens], and where each text begins: int32 [texts + 1].

        Args:
            texts: a sequence of str and bytes-like objects, or an Arrow array, chunked array or column of strings
                (anything with `__arrow_c_array__` or `__arrow_c_stream__`), which is read where it lies. A null has
                no ids.
            threads: how many to work on it at most, without the GIL; each has caches of its own, of up to 64 MB.
        """
        if isinstance(texts, str | bytes):
            raise TypeError(f"texts must be a sequence of texts, got one {type(texts).__name__}")
        if not isinstance(threads, int) or threads < 1:
            raise ValueError(f"threads must be an int of at least 1, got {threads!r}")
        if self._number is None:
            if hasattr(texts, "__arrow_c_array__") or hasattr(texts, "__arrow_c_stream__"):
                texts = [text or "" for text in texts.to_pylist()]
            parts = [self._encode_added(text, (), ()) for text in texts]
            lengths = np.fromiter((len(part) for part in parts), np.int32, len(parts))
            ids = np.concatenate([*parts, np.empty(0, np.uint32)])
            return ids, np.concatenate([np.zeros(1, np.int32), np.cumsum(lengths, dtype=np.int32)])
        packed, offsets = self._engine.encode_batch(texts, self._number, threads)
        return _numbers(packed, np.uint32), _numbers(offsets, np.int32)

    def encode_batch(
        self,
        texts: Sequence[str | bytes],
        *,
        allowed_special: Special = (),
        disallowed_special: Special = (),
        threads: int = 1,
    ) -> list[list[int]]:
        """The ids of each text; arguments as for `encode` and `encode_packed`."""
        if allowed_special or disallowed_special or self._number is None:
            return [
                self.encode(text, allowed_special=allowed_special, disallowed_special=disallowed_special)
                for text in texts
            ]
        packed, offsets = self.encode_packed(texts, threads=threads)
        ids, ends = packed.tolist(), offsets.tolist()
        return [ids[low:high] for low, high in itertools.pairwise(ends)]

    def encode_with_offsets(
        self, text: str | bytes, *, unit: Literal["character", "byte"] = "character", allowed_special: Special = ()
    ) -> tuple[np.ndarray, np.ndarray]:
        """The ids, uint32 [tokens], and where each begins and ends in `text`, int64 [tokens, 2].

        A token that begins or ends within a character covers all of it, so neighbours may overlap by one. Offsets in
        a str with surrogates are those of the text after each pair became one character.

        Raises:
            ValueError: the tokenizer normalizes text, puts a space before it, or has added tokens that take white
                space with them, so that ids do not map back to places in `text`.
        """
        if unit not in ("character", "byte"):
            raise ValueError(f'unit must be "character" or "byte", got {unit!r}')
        model = self._model
        if model.normalizers or model.prefix_space or any(t.lstrip or t.rstrip for t in model.added.values()):
            raise ValueError("offsets need a tokenizer that encodes the text as it is")
        ids = self.encode_array(text, allowed_special=allowed_special)
        ends = np.cumsum(np.frombuffer(self._engine.lengths(ids), dtype=np.uint32), dtype=np.int64)
        offsets = np.stack([np.concatenate([[0], ends[:-1]]), ends], axis=1) if len(ids) else np.zeros((0, 2), np.int64)
        if unit == "character" and len(ids):
            if isinstance(text, str):
                text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode("utf-8")
            heads = np.cumsum((np.frombuffer(text, dtype=np.uint8) & 0xC0) != 0x80, dtype=np.int64)
            offsets = np.stack([np.maximum(heads[offsets[:, 0]] - 1, 0), heads[offsets[:, 1] - 1]], axis=1)
        return ids, offsets

    def count(self, text: str | bytes) -> int:
        """The number of ids of `text`."""
        return len(self.encode_array(text)) if self._number is None else self._engine.count(text, self._number)

    def __call__(
        self,
        texts: str | Sequence[str],
        *,
        padding: bool | str = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        pad_token: str | None = None,
        add_special_tokens: bool = True,
        allowed_special: Special = (),
    ) -> dict[str, Any]:
        """`input_ids` and `attention_mask` as transformers' tokenizers return them.

        Args:
            texts: one text, or a sequence of them.
            padding: False; True or "longest": to the longest text; "max_length": to `max_length`.
            truncation: cut every text at `max_length` ids.
            max_length: in ids.
            return_tensors: None for lists, "np" or "pt" for int64 arrays [texts, length].
            pad_token: the special token to pad with. By default the one that is called <pad>, [PAD], <|pad|> or
                <|padding|>; if there is none, padding raises ValueError.
            add_special_tokens: put the tokens around each text that the file's post-processor asks for.
            allowed_special: as for `encode`.
        """
        return _padding.call(
            self, texts, padding, truncation, max_length, return_tensors, pad_token, add_special_tokens, allowed_special
        )

    # Decoding

    def decode_bytes(self, ids: Iterable[int] | np.ndarray) -> bytes:
        """The bytes of `ids`. Raises KeyError naming an id that is no token."""
        return self._engine.decode(_id_buffer(ids))

    def decode(self, ids: Iterable[int] | np.ndarray, errors: str = "replace") -> str:
        """The text of `ids`; `errors` says what to do with bytes that are no UTF-8, as for bytes.decode."""
        return self.decode_bytes(ids).decode("utf-8", errors)

    def decode_batch(self, batch: Iterable[Iterable[int] | np.ndarray], errors: str = "replace") -> list[str]:
        return [self.decode(ids, errors) for ids in batch]

    def stream(self, errors: str = "replace") -> StreamDecoder:
        """A decoder that takes ids as they come and never gives out half a character."""
        return StreamDecoder(self, errors)

    # The vocabulary

    @property
    def vocab(self) -> dict[bytes, int]:
        """The bytes of every ordinary token and its id."""
        return dict(self._model.vocab)

    @property
    def vocab_size(self) -> int:
        """One more than the highest id: the number of rows that an embedding needs."""
        return self._engine.id_limit()

    def __len__(self) -> int:
        return self.vocab_size

    @property
    def special_tokens(self) -> dict[str, int]:
        return dict(self._specials)

    @property
    def pattern(self) -> Pattern:
        return self._model.pattern

    def token_to_id(self, token: str | bytes) -> int:
        """The id of a special token's string or of a token's bytes. Raises KeyError for what is no token."""
        if isinstance(token, str) and token in self._specials:
            return self._specials[token]
        data = token.encode("utf-8") if isinstance(token, str) else token
        number = self._engine.token_id(data)
        if number is None:
            raise KeyError(token)
        return number

    def id_to_token(self, token_id: int) -> bytes:
        """The bytes of an id. Raises KeyError for what is no token."""
        return self._engine.decode([token_id])

    def as_tiktoken(self, name: str = "fastformer") -> TiktokenEncoding:
        """An object with the methods and defaults of tiktoken.Encoding."""
        return TiktokenEncoding(self, name)

    def save(self, path: str | Path) -> None:
        """Write `path`: a `.tiktoken` file, a `.ffbpe` file, or a tokenizer.json for `.json` and for a folder
        (anything else). A `.ffbpe` file is the engine's own form: it holds everything, loads at once, and is read by
        versions of the library that share its format only.

        Raises:
            ValueError: the format cannot say what this tokenizer does. A .tiktoken file holds neither merges nor
                special tokens, so the merges must follow from the ids, and special tokens are left out.
        """
        path = Path(path)
        if path.suffix == ".ffbpe":
            files.write_atomic(path, image.dumps(self._model, self._engine))
            return
        if path.suffix == ".tiktoken":
            if not self._model.plain:
                raise ValueError(
                    f"{path}: a .tiktoken file holds no normalizers, prefix or added tokens; save a tokenizer.json"
                )
            model = Model(self._model.vocab, None, True, self._model.pattern, {})
            if self._model.merges is not None and not self._same_merges(model):
                raise ValueError(
                    f"{path}: the merges of this vocabulary do not follow from its ids; save a tokenizer.json"
                )
            files.write_atomic(path, files.tiktoken_bytes(self._model.vocab))
            return
        if path.suffix != ".json":
            path = path / "tokenizer.json"
        files.write_atomic(path, huggingface.dump(self._model, self._merges()))

    def _merges(self) -> list[tuple[bytes, bytes]]:
        if self._model.merges is not None:
            return self._model.merges
        return Compiled(self._engine, True, self._model.pattern, {}).merges or []

    def _same_merges(self, other: Model) -> bool:
        rows = np.frombuffer(self._engine.merges(), dtype=np.uint32).reshape(-1, 3)
        if not np.array_equal(rows, np.frombuffer(other.engine().merges(), dtype=np.uint32).reshape(-1, 3)):
            return False
        return self._model.whole_piece or len(rows) + 256 == len(self._model.vocab)

    # Details

    def _encode(
        self, text: str | bytes, *, allowed_special: Special = (), disallowed_special: Special = ()
    ) -> list[int]:
        if allowed_special or disallowed_special or self._number is None:
            return self._encode_added(text, allowed_special, disallowed_special).tolist()
        return self._engine.encode(text, self._number)

    def _special_set(self, which: Special, name: str) -> frozenset[str]:
        if isinstance(which, str):
            if which != "all":
                raise ValueError(f'{name} must be "all" or a collection of special tokens, got {which!r}')
            return frozenset(self._specials)
        return frozenset(which)

    def _normalize(self, text: str) -> str:
        for form in self._model.normalizers:
            text = normalize(form, text)
        return text

    def _encode_added(self, text: str | bytes, allowed_special: Special, disallowed_special: Special) -> np.ndarray:
        allowed = self._special_set(allowed_special, "allowed_special")
        disallowed = self._special_set(disallowed_special, "disallowed_special")
        if disallowed_special == "all":
            disallowed -= allowed
        if not isinstance(text, str):
            text = _as_str(text)
        if disallowed and (match := matcher(disallowed).search(text)):
            raise ValueError(
                f"the text holds the special token {match.group()!r} at {match.start()}; name it in allowed_special to "
                "encode it as one, or leave it out of disallowed_special to encode it as text"
            )
        # Surrogates first: the regular expressions and normalizers must see the characters that are encoded.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        parts = [np.empty(0, np.uint32)]
        for raw, raw_token in split(text, self._raw, allowed, self._model.hugging_face):
            if raw_token is not None:
                parts.append(np.asarray([raw_token.id], dtype=np.uint32))
                continue
            piece = self._normalize(raw)
            for part, token in split(piece, self._normalized, allowed, self._model.hugging_face):
                ids = self._encode_part(part) if token is None else np.asarray([token.id], dtype=np.uint32)
                parts.append(ids)
        return np.concatenate(parts)

    def _encode_part(self, text: str) -> np.ndarray:
        if self._model.prefix_space and not text.startswith(" "):
            text = " " + text
        pattern = self._model.pattern
        if pattern.number is not None:
            return _numbers(self._engine.encode_array(text, pattern.number), np.uint32)
        return _numbers(self._engine.encode_pieces(text, pattern.boundaries(text)), np.uint32)

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickle, (type(self), image.dumps(self._model, self._engine))

    def __copy__(self) -> BPETokenizer:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> BPETokenizer:
        return self

    def __repr__(self) -> str:
        return f"<BPETokenizer of {self.vocab_size} ids, pattern {self._model.pattern.name!r}>"


def _unpickle(cls: type[BPETokenizer], data: bytes) -> BPETokenizer:
    return cls(image.loads(data))


def _numbers(ids: _bpe.Ids, dtype: type[np.generic]) -> np.ndarray:
    return np.frombuffer(ids, dtype=dtype)  # type: ignore[call-overload]


def _as_str(data: Any) -> str:
    try:
        return bytes(data).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"text: bytes that are no UTF-8 need a plain vocabulary and no special tokens: {error}"
        ) from None
    except TypeError:
        raise TypeError(f"text must be str or a bytes-like object, got {type(data).__name__}") from None


def _id_buffer(ids: Iterable[int] | np.ndarray) -> Any:
    """What the engine decodes: a list, or a contiguous uint32 array."""
    if isinstance(ids, list | tuple):
        return ids
    if hasattr(ids, "__array__"):
        array = np.asarray(ids)
        if array.ndim != 1:
            raise ValueError(f"ids must have one dimension, got the shape {array.shape}")
        if array.size == 0:
            return []
        if not np.issubdtype(array.dtype, np.integer):
            raise TypeError(f"ids must be integers, got {array.dtype}")
        if array.dtype != np.uint32:
            if int(array.min()) < 0 or int(array.max()) > 0xFFFFFFFF:
                return array.tolist()
            array = array.astype(np.uint32)
        return np.ascontiguousarray(array)
    return list(ids)
