"""Data for pre-training: paragraphs of many files as token ids, in an order that a checkpoint can go on with; held-out
ones to measure by.
"""

import gzip
import itertools
import lzma
import math
import random
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastformer.demo.errors import UserError

ENDINGS = (".txt", ".txt.gz", ".txt.xz")
HELD_OUT = 50  # one paragraph of so many is never learned from; which ones, their text says
IGNORED = -100  # of cross_entropy
Example = dict[str, Any]


def text_files(path: Path) -> list[Path]:
    """The file itself, or a folder's and its subfolders' text files, sorted. Raises UserError where there are none."""
    found = sorted(p for p in path.rglob("*") if p.name.endswith(ENDINGS)) if path.is_dir() else [path]
    if not found or not found[0].is_file():
        raise UserError(f"--data {path} is neither a text file nor a folder with {', '.join(ENDINGS)} files")
    return found


def lines_of(path: Path) -> Iterator[str]:
    """Lines of a UTF-8 file, plain or compressed. Raises UserError for what is none."""
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            yield from file
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8: {error.reason}") from None
    except (EOFError, lzma.LZMAError, zlib.error, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def paragraphs(path: Path, first_line: int = 0) -> Iterator[tuple[int, str]]:
    """What stands between blank lines, and the number of the line after it.

    first_line: where to begin, one of the numbers that came with a paragraph.
    """
    begun: list[str] = []
    number = first_line
    for number, line in enumerate(itertools.islice(lines_of(path), first_line, None), first_line + 1):
        if line.strip():
            begun.append(line)
        elif begun:
            yield number, "".join(begun).strip()
            begun = []
    if begun:
        yield number + 1, "".join(begun).strip()


def is_held_out(paragraph: str) -> bool:
    return zlib.crc32(paragraph.encode("utf-8", "replace")) % HELD_OUT == 0


def held_out(files: Sequence[Path], count: int) -> list[str]:
    """The first paragraphs, at most `count`, that training never sees, taken from the files in turn."""
    streams = [(text for _, text in paragraphs(path) if is_held_out(text)) for path in files]
    turns = itertools.chain.from_iterable(itertools.zip_longest(*streams))
    return list(itertools.islice((text for text in turns if text is not None), count))


class TextStream:
    """Endless pairs of neighbouring segments (ids, ids of what follows or []) of the files, shuffled.

    Files come in a new order in every pass; segments wait in a buffer, from which they are drawn by chance. state() and
    restore() carry all of that, so that a stream goes on as if it had not been interrupted.

    Args:
        tokenizer: of transformers. limit: ids of a segment, at most; longer paragraphs give several.
        pairs: whether the segment that follows is wanted.
        buffer: segments that wait.
    """

    def __init__(
        self, files: Sequence[Path], tokenizer: Any, limit: int, seed: int, pairs: bool = False, buffer: int = 1024
    ) -> None:
        self._files, self._tokenizer, self._limit, self._pairs, self._size = files, tokenizer, limit, pairs, buffer
        self._draw = random.Random(seed)
        self._order = self._draw.sample(range(len(files)), len(files))
        self._place, self._line, self._yielded = 0, 0, False
        self._buffer: list[list[list[int]]] = []
        self._source = self._read()

    def state(self) -> dict[str, Any]:
        return {
            "draw": self._draw.getstate(),
            "order": self._order,
            "place": self._place,
            "line": self._line,
            "buffer": list(self._buffer),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where the stream with this state stood. Its files must be the same."""
        version, numbers, gauss = state["draw"]
        self._draw.setstate((version, tuple(numbers), gauss))
        self._order, self._place, self._line = list(state["order"]), state["place"], state["line"]
        self._buffer, self._yielded = [list(entry) for entry in state["buffer"]], True
        self._source = self._read()

    def __next__(self) -> list[list[int]]:
        while len(self._buffer) < self._size:
            self._buffer += next(self._source)
        index = self._draw.randrange(len(self._buffer))
        self._buffer[index], self._buffer[-1] = self._buffer[-1], self._buffer[index]
        return self._buffer.pop()

    def other(self) -> list[int]:
        """A segment from somewhere else, to tell from the one that follows."""
        return self._draw.choice(self._buffer)[0]

    def chance(self) -> float:
        return self._draw.random()

    def _read(self) -> Iterator[list[list[list[int]]]]:
        """Entries of one paragraph after another; the position is that after the paragraph."""
        while True:
            while self._place < len(self._order):
                for line, text in paragraphs(self._files[self._order[self._place]], self._line):
                    self._line = line
                    if not is_held_out(text):
                        self._yielded = True
                        yield self._entries(text)
                self._place, self._line = self._place + 1, 0
            if not self._yielded:
                raise UserError(f"there is no text to learn from in {', '.join(map(str, self._files[:3]))}")
            self._order = self._draw.sample(range(len(self._files)), len(self._files))
            self._place = 0

    def _entries(self, text: str) -> list[list[list[int]]]:
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        if not self._pairs:
            return [[ids[i : i + self._limit], []] for i in range(0, len(ids), self._limit)]
        # Two halves that follow each other, of each stretch that fits.
        cuts = [ids[i : i + self._limit] for i in range(0, len(ids), self._limit)]
        return [[cut[: len(cut) // 2], cut[len(cut) // 2 :]] for cut in cuts if len(cut) > 1]


def mask_tokens(example: Example, tokenizer: Any, draw: np.random.Generator, rate: float = 0.15) -> Example:
    """The example with labels for masked language modelling (Devlin et al. 2019), other places at each call.

    Of the tokens that are not special a share of `rate`, at least one, is to be told: 80% of them become the mask
    token, 10% any token, 10% stay.
    """
    ids = np.array(example["input_ids"])
    free = np.flatnonzero(~np.isin(ids, tokenizer.all_special_ids))
    chosen = free[draw.random(len(free)) < rate]
    if not len(chosen) and len(free):
        chosen = draw.choice(free, 1)
    labels = np.full(len(ids), IGNORED)
    labels[chosen] = ids[chosen]
    kind = draw.random(len(chosen))
    ids[chosen[kind < 0.8]] = tokenizer.mask_token_id
    other = chosen[(kind >= 0.8) & (kind < 0.9)]
    ids[other] = draw.integers(0, len(tokenizer), len(other))
    return {**example, "input_ids": ids.tolist(), "labels": labels.tolist()}


class Batches:
    """Batches of an objective ("mlm", "mlm+nsp" or "clm") from a stream, collated by `collate`.

    masking: draws what is masked; a part of the state, as the stream is. Raises UserError for a tokenizer without the
    special tokens of the objective.
    """

    def __init__(self, objective: str, size: int, stream: TextStream, tokenizer: Any, collate: Any, seed: int) -> None:
        self.objective, self.size, self.stream = objective, size, stream
        self.tokenizer, self._collate = tokenizer, collate
        self.masking = np.random.default_rng(seed)
        end = tokenizer.eos_token_id if tokenizer.sep_token_id is None else tokenizer.sep_token_id
        self._begin, self._end = tokenizer.cls_token_id, end
        needs = {"end": end}
        if objective != "clm":
            needs |= {"cls": self._begin, "mask": tokenizer.mask_token_id}
        missing = [name for name, number in needs.items() if number is None]
        if missing:
            raise UserError(f"--objective {objective} needs a tokenizer with the tokens {', '.join(missing)}")

    def state(self) -> dict[str, Any]:
        return {"stream": self.stream.state(), "masking": self.masking.bit_generator.state}

    def restore(self, state: dict[str, Any]) -> None:
        self.stream.restore(state["stream"])
        self.masking.bit_generator.state = state["masking"]

    def __next__(self) -> dict[str, Any]:
        return self.collate([self._example() for _ in range(self.size)])

    def single(self, ids: list[int], masking: np.random.Generator) -> Example:
        """An example of one segment."""
        if self.objective == "clm":
            return {"input_ids": [*ids, self._end], "labels": [*ids, self._end]}
        return mask_tokens({"input_ids": [self._begin, *ids, self._end]}, self.tokenizer, masking)

    def collate(self, examples: list[Example]) -> dict[str, Any]:
        extra = [example.pop("next_sentence_label", None) for example in examples]
        batch = dict(self._collate(examples))
        return batch if extra[0] is None else {**batch, "next_sentence_label": torch.tensor(extra)}

    def _example(self) -> Example:
        first, second = next(self.stream)
        if self.objective != "mlm+nsp":
            return self.single(first, self.masking)
        follows = self.stream.chance() < 0.5
        second = second if follows else self.stream.other()
        ids = [self._begin, *first, self._end, *second, self._end]
        types = [0] * (len(first) + 2) + [1] * (len(second) + 1)
        example = mask_tokens({"input_ids": ids, "token_type_ids": types}, self.tokenizer, self.masking)
        return {**example, "next_sentence_label": int(not follows)}


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}


@torch.no_grad()
def perplexity(model: Any, batches: Batches, texts: Sequence[str], limit: int, device: torch.device) -> float:
    """exp of the mean loss of a predicted token of the texts, with dropout off and the same places masked each time."""
    model.eval()
    masking, total, count = np.random.default_rng(0), 0.0, 0
    rows = [ids[:limit] for ids in batches.tokenizer(list(texts), add_special_tokens=False)["input_ids"]]
    for start in range(0, len(rows), batches.size):
        batch = batches.collate([batches.single(ids, masking) for ids in rows[start : start + batches.size]])
        labels = batch.pop("labels")
        out = model(**to_device(batch, device))
        logits = out.prediction_logits if batches.objective == "mlm+nsp" else out.logits
        if batches.objective == "clm":
            logits, labels = logits[:, :-1], labels[:, 1:]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float().cpu(), labels.flatten(), reduction="sum")
        total, count = total + float(loss), count + int((labels != IGNORED).sum())
    return math.exp(min(50.0, total / max(1, count)))
