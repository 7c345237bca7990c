"""Batches without padding: sequences one after another, with their lengths known on the host."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_IGNORED = -100  # of torch.nn.functional.cross_entropy
_LABELS = ("labels", "label", "label_ids")


class PackedCollator:
    """Collates tokenised examples into one packed row, for a patched model.

    The model packs nothing and waits for nothing: ids come packed, lengths come as host numbers. Its hidden states and
    logits are padded back, one sequence a row, so labels keep their ordinary shapes: one a sequence, or one a token
    padded with -100. Examples may be lists or tensors; an attention_mask among them drops the tokens it hides.

    Not for models that are not patched: transformers' own attention would look across the sequences.

    Args:
        first_position: position of a sequence's first token; RoBERTa counts from its padding_idx + 1. `for_model` reads
            it off a model.
        max_tokens: the most tokens a batch may hold, or None; use `TokenBudget` to draw batches of that size.
    """

    def __init__(self, first_position: int = 0, max_tokens: int | None = None) -> None:
        if first_position < 0:
            raise ValueError(f"first_position must be 0 or more, got {first_position}")
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens must be positive or None, got {max_tokens}")
        self.first_position, self.max_tokens = first_position, max_tokens

    @classmethod
    def for_model(cls, model: torch.nn.Module, max_tokens: int | None = None) -> PackedCollator:
        """The collator for a patched Hugging Face model.

        Raises:
            ValueError: no part of the model removes padding.
        """
        for module in model.modules():
            if hasattr(module, "fastformer_unpad"):
                first: Any = getattr(module, "_first_position", None)
                return cls(0 if first is None else first(), max_tokens)
        raise ValueError(f"model must be patched and able to run without padding, got {type(model).__name__}")

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The arguments of model(...) for a list of examples.

        Args:
            examples: each with input_ids [length], and, in all or none: token_type_ids [length], labels.

        Returns:
            input_ids, position_ids (and token_type_ids) [1, tokens]; cu_seq_lens_q and _k int32 [batch + 1];
            max_length_q and _k; labels [batch, ...] or [batch, longest].

        Raises:
            ValueError: no examples, an empty one, fields that differ, or more than max_tokens.
        """
        if not examples:
            raise ValueError("examples must hold at least one example, got none")
        rows = [_row(example) for example in examples]
        fields = set(rows[0])
        if any(set(row) != fields for row in rows):
            raise ValueError("examples must all have the same fields")
        lengths = [len(row["input_ids"]) for row in rows]
        tokens, longest = sum(lengths), max(lengths)
        if min(lengths) == 0:
            raise ValueError(f"examples must have tokens, got none in number {lengths.index(0)}")
        if self.max_tokens is not None and tokens > self.max_tokens:
            raise ValueError(
                f"the batch has {tokens} tokens, more than max_tokens={self.max_tokens}; draw with TokenBudget"
            )
        bounds = _bounds([row["input_ids"] for row in rows])
        batch: dict[str, Any] = {
            "input_ids": torch.cat([row["input_ids"] for row in rows])[None],
            "position_ids": torch.cat([torch.arange(n) for n in lengths])[None] + self.first_position,
            "cu_seq_lens_q": bounds,
            "cu_seq_lens_k": bounds,
            "max_length_q": longest,
            "max_length_k": longest,
        }
        if "token_type_ids" in fields:
            batch["token_type_ids"] = torch.cat([row["token_type_ids"] for row in rows])[None]
        if "labels" not in fields:
            return batch
        # First, because Trainer takes the batch size from the first tensor it meets.
        return {"labels": _labels([row["labels"] for row in rows], lengths), **batch}


class PackedSeq2SeqCollator:
    """Collates examples for a patched encoder-decoder (T5, BART, mBART): both sides packed, lengths on the host.

    The model waits for nothing. Decoder inputs are each sequence's own labels, shifted as the model's own code shifts
    them; outputs and labels are one sequence a row, labels padded with -100. Evaluation by `generate` wants ordinary
    batches. A batch to fill by size is drawn by `TokenBudget` over the tokens of both sides:

        ff.patch(model)
        collate = PackedSeq2SeqCollator.for_model(model, max_tokens=8192)
        lengths = [len(row["input_ids"]) + len(row["labels"]) for row in rows]
        loader = DataLoader(rows, batch_sampler=TokenBudget(lengths, 8192), collate_fn=collate)
        for batch in loader:
            model(**batch).loss.backward()

    With Trainer, whose batches are of a number of examples, `Trainer(..., data_collator=collate)` is all.

    Args:
        decoder_start_token_id: what a sequence's decoder inputs begin with; None: its last label, the language of
            mBART's. `for_model` reads it off a model.
        pad_token_id: stands among decoder inputs for labels of -100.
        max_tokens: the most tokens of both sides that a batch may hold, or None.
    """

    def __init__(self, decoder_start_token_id: int | None, pad_token_id: int, max_tokens: int | None = None) -> None:
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens must be positive or None, got {max_tokens}")
        self.decoder_start_token_id, self.pad_token_id = decoder_start_token_id, pad_token_id
        self.max_tokens = max_tokens

    @classmethod
    def for_model(cls, model: torch.nn.Module, max_tokens: int | None = None) -> PackedSeq2SeqCollator:
        """The collator for a patched Hugging Face encoder-decoder.

        Raises:
            ValueError: no part of the model removes padding, it has no decoder, or its configuration lacks a token.
        """
        config: Any = getattr(model, "config", None)
        unpads = any(hasattr(module, "fastformer_unpad") for module in model.modules())
        if not unpads or not getattr(config, "is_encoder_decoder", False):
            raise ValueError(f"model must be a patched encoder-decoder, got {type(model).__name__}")
        by_language = config.model_type == "mbart"
        for name in ("pad_token_id",) if by_language else ("pad_token_id", "decoder_start_token_id"):
            if getattr(config, name, None) is None:
                raise ValueError(f"model's configuration must have {name}, got None")
        return cls(None if by_language else config.decoder_start_token_id, config.pad_token_id, max_tokens)

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The arguments of model(...) for a list of examples.

        Args:
            examples: each with input_ids [source] and labels [target], lists or tensors; an attention_mask drops the
                source tokens it hides. Labels of -100 at the end are padding.

        Returns:
            labels [batch, longest]; input_ids [1, source tokens]; decoder_input_ids [1, target tokens]; lengths of the
            decoder's sequences, cu_seq_lens_q int32 [batch + 1] and max_length_q, and of the encoder's, with _k.

        Raises:
            ValueError: no examples, one without tokens on a side, other fields than these, or more than max_tokens.
        """
        if not examples:
            raise ValueError("examples must hold at least one example, got none")
        for example in examples:
            if not {"input_ids", "labels"} <= set(example) <= {"input_ids", "labels", "attention_mask"}:
                raise ValueError(f"examples must have input_ids, labels, maybe attention_mask; got {sorted(example)}")
        sources = [_row({k: v for k, v in example.items() if k != "labels"})["input_ids"] for example in examples]
        labels = [_without_padding(torch.as_tensor(example["labels"])) for example in examples]
        for number, (source, target) in enumerate(zip(sources, labels, strict=True)):
            if not len(source) or not len(target):
                raise ValueError(f"examples must have input_ids and labels, got none of one in number {number}")
        tokens = sum(map(len, sources)) + sum(map(len, labels))
        if self.max_tokens is not None and tokens > self.max_tokens:
            raise ValueError(
                f"the batch has {tokens} tokens, more than max_tokens={self.max_tokens}; draw with TokenBudget"
            )
        # First, because Trainer takes the batch size from the first tensor it meets.
        return {
            "labels": torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=_IGNORED),
            "input_ids": torch.cat(sources)[None],
            "decoder_input_ids": torch.cat([self._shifted(target) for target in labels])[None],
            "cu_seq_lens_q": _bounds(labels),
            "cu_seq_lens_k": _bounds(sources),
            "max_length_q": max(map(len, labels)),
            "max_length_k": max(map(len, sources)),
        }

    def _shifted(self, labels: Tensor) -> Tensor:
        ids = labels.masked_fill(labels == _IGNORED, self.pad_token_id)
        if self.decoder_start_token_id is None:
            # As mBART counts: ids that do not pad, from the front.
            first = ids[(ids != self.pad_token_id).sum() - 1]
        else:
            first = ids.new_tensor(self.decoder_start_token_id)
        return torch.cat((first[None], ids[:-1]))


def _bounds(rows: Sequence[Tensor]) -> Tensor:
    return torch.tensor([0, *map(len, rows)]).cumsum(0).to(torch.int32)


def _without_padding(labels: Tensor) -> Tensor:
    """Labels [length] up to the last that is not -100."""
    if labels.ndim != 1:
        raise ValueError(f"labels must be one row of token ids an example, got shape {tuple(labels.shape)}")
    return labels[: int((labels != _IGNORED).nonzero().max()) + 1] if bool((labels != _IGNORED).any()) else labels[:0]


def _row(example: Mapping[str, Any]) -> dict[str, Tensor]:
    row = {name: torch.as_tensor(example[name]) for name in ("input_ids", "token_type_ids") if name in example}
    for name in _LABELS:
        if example.get(name) is not None:
            row["labels"] = torch.as_tensor(example[name])
    mask = example.get("attention_mask")
    if mask is not None:
        kept = torch.as_tensor(mask) != 0
        length = len(row["input_ids"])
        row = {name: value[kept] if value.ndim == 1 and len(value) == length else value for name, value in row.items()}
    return row


def _labels(labels: list[Tensor], lengths: list[int]) -> Tensor:
    per_token = all(label.ndim == 1 and len(label) == n for label, n in zip(labels, lengths, strict=True))
    # Several labels a sequence (multi-label) are as many in every example; so may be tokens, but not of float dtype.
    if per_token and not labels[0].is_floating_point():
        return torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=_IGNORED)
    return torch.stack(labels)


class TokenBudget(torch.utils.data.Sampler[list[int]]):
    """A batch sampler that fills batches up to a number of tokens, in random order.

    Every example is drawn once an epoch and meets random others, whatever its length: unlike grouping by length there
    is no bias, and unlike a fixed number of examples no batch is much larger than another.

    Args:
        lengths: tokens of every example.
        max_tokens: the most tokens a batch may hold; no example may be longer.
        shuffle: whether to draw in random order.
        seed: of the order; with `set_epoch`, of each epoch's.

    Raises:
        ValueError: an example is longer than max_tokens.
    """

    def __init__(self, lengths: Sequence[int], max_tokens: int, shuffle: bool = True, seed: int = 0) -> None:
        if len(lengths) and max(lengths) > max_tokens:
            raise ValueError(f"max_tokens must hold the longest example of {max(lengths)} tokens, got {max_tokens}")
        self.lengths, self.max_tokens = list(lengths), max_tokens
        self.shuffle, self.seed, self.epoch = shuffle, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose another order; data loaders of Accelerate and of distributed training call it."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        order: Sequence[int] = range(len(self.lengths))
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed + self.epoch)
            order = torch.randperm(len(self.lengths), generator=generator).tolist()
        batch: list[int] = []
        tokens = 0
        for index in order:
            if batch and tokens + self.lengths[index] > self.max_tokens:
                yield batch
                batch, tokens = [], 0
            batch.append(index)
            tokens += self.lengths[index]
        if batch:
            yield batch

    def __len__(self) -> int:
        return sum(1 for _ in self)
