"""Buckets: the few shapes that batches are rounded up to, and the static buffers of one of them.

A batch of n real tokens in b sequences of at most s tokens runs in the bucket (rows >= n, batch >= b, seqlen >= s).
Tokens are what costs, so they are rounded finely (at most 12.5 % of surplus rows in large batches); the longest
sequence only sizes grids and the padded outputs, and is rounded coarsely. Sequences that only the bucket has are empty,
their labels ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastformer.integrations.families.batch import LENGTHS, PER_TOKEN
from fastformer.integrations.plan import packing_of, remember
from fastformer.ops.bucket_packing import BucketPacking

# What an encoder-decoder takes one of for every token that it is to write.
TARGETS = ("labels", "decoder_input_ids", "decoder_attention_mask")
IGNORED = -100  # label of torch.nn.functional.cross_entropy's ignore_index
_ROWS_STEP, _LENGTH_STEP, _BATCH_STEP = 64, 32, 8


@dataclass(frozen=True, order=True)
class Bucket:
    """Shapes of a captured step: rows of packed tensors, sequences, tokens of the longest one, and of the longest one
    that an encoder-decoder is to write."""

    rows: int
    batch: int
    seqlen: int
    target: int = 0

    def holds(self, other: Bucket) -> bool:
        fits = self.rows >= other.rows and self.batch >= other.batch and self.seqlen >= other.seqlen
        return fits and self.target >= other.target

    def __str__(self) -> str:
        text = f"{self.rows} tokens, {self.batch} sequences of up to {self.seqlen}"
        return f"{text}, {self.target} to write" if self.target else text


def round_up(number: int, step: int, bits: int, limit: int) -> int:
    """`number` rounded up to a multiple of `step` of about `bits` leading bits, and to `limit` at most."""
    grain = max(step, 1 << max(0, number.bit_length() - bits))
    return min(limit, -(-max(1, number) // grain) * grain)


@dataclass(frozen=True)
class Arrival:
    """A call of the model, read.

    Attributes:
        bucket: the smallest that holds it.
        tensors: name -> (role, tensor). Roles: "token" ([batch, seqlen, ...]), "row" (packed, [1, tokens, ...]),
            "target" ([batch, target, ...]), "sequence" ([batch, ...]), "whole" (anything of a shape that never varies).
        others: arguments that are no tensors, (name, value); part of what a captured step is for.
        batch, seqlen: shape of the padded batch, which outputs are to have.
        tokens: how many are real.
        boundaries: int32 [batch + 1] of a batch that came packed, else None.
        facts: (starts_real, contiguous) of the packing.
        target: length of the sequences that an encoder-decoder is to write, 0 if it is given none.
    """

    bucket: Bucket
    tensors: dict[str, tuple[str, Tensor]]
    others: tuple[tuple[str, Any], ...]
    batch: int
    seqlen: int
    tokens: int
    boundaries: Tensor | None
    facts: tuple[bool, bool]
    target: int = 0

    @property
    def packed(self) -> bool:
        return self.boundaries is not None

    @property
    def signature(self) -> tuple[Any, ...]:
        """All but sizes that a captured step depends on."""
        kinds = tuple(
            (name, role, t.dtype, t.shape[{"token": 2, "row": 2, "target": 2, "sequence": 1, "whole": 0}[role] :])
            for name, (role, t) in sorted(self.tensors.items())
        )
        return kinds, self.others, self.packed, self.facts


class CannotCapture(Exception):
    """Why a call runs without a graph, in a few words."""


def read(call: Mapping[str, Any], token_budget: int, max_seqlen: int, writes: bool = False) -> Arrival:
    """Read the arguments of a call; `writes`: of an encoder-decoder.

    An attention mask on a GPU whose packing nobody knows yet costs the batch's one host read, as without graphs.

    Raises:
        CannotCapture: for what no bucket holds.
    """
    call = {name: value for name, value in call.items() if value is not None}
    ids = call.get("input_ids", call.get("inputs_embeds"))
    if not isinstance(ids, Tensor) or ids.ndim < 2:
        raise CannotCapture("no input_ids")
    if call.get("output_attentions"):
        raise CannotCapture("output_attentions")
    packed = call.get("cu_seq_lens_q") is not None
    if packed and writes:
        raise CannotCapture("a packed batch of an encoder-decoder")
    if packed:
        batch, seqlen, tokens, facts = _packed_sizes(call, ids)
        longest = seqlen
    else:
        batch, seqlen = ids.shape[:2]
        mask = call.get("attention_mask")
        if mask is None:
            tokens, longest, facts = batch * seqlen, seqlen, (True, True)
        elif not isinstance(mask, Tensor) or mask.shape != ids.shape[:2]:
            raise CannotCapture("attention_mask is not [batch, seqlen]")
        else:
            packing = packing_of(mask)
            tokens, facts = packing.tokens, (packing.starts_real, packing.contiguous)
            # Padding on the right ends with the longest sequence; any other may reach to the end of a row.
            longest = packing.max_seqlen if all(facts) else seqlen
    if tokens == 0:
        raise CannotCapture("an empty batch")
    tensors: dict[str, tuple[str, Tensor]] = {}
    others: list[tuple[str, Any]] = []
    for name, value in sorted(call.items()):
        if name in LENGTHS or (packed and name == "attention_mask"):
            continue
        if isinstance(value, Tensor):
            if value.requires_grad:
                raise CannotCapture(f"{name} requires a gradient")
            role = _role(name, value, batch, seqlen, packed, writes)
            if role == "token" and name not in (*PER_TOKEN, "attention_mask"):
                longest = seqlen  # its padding may mean something
            tensors[name] = (role, value)
        elif isinstance(value, bool | int | float | str):
            others.append((name, value))
        else:
            raise CannotCapture(f"{name} is a {type(value).__name__}")
    if tokens > token_budget:
        raise CannotCapture(f"more than token_budget={token_budget} tokens")
    if longest > max_seqlen:
        raise CannotCapture(f"longer than max_seqlen={max_seqlen}")
    most = round_up(longest, _LENGTH_STEP, 2, max_seqlen)
    grown = _may_grow(tensors, others)
    sequences = round_up(batch, _BATCH_STEP, 3, 1 << 30) if grown else batch
    rows = min(round_up(tokens, _ROWS_STEP, 4, token_budget), sequences * most)
    boundaries = call.get("cu_seq_lens_q")
    targets = {value.shape[1] for role, value in tensors.values() if role == "target"} or {0}
    target = targets.pop()
    if targets:
        raise CannotCapture("labels and decoder inputs of different lengths")
    if target > max_seqlen:
        raise CannotCapture(f"longer to write than max_seqlen={max_seqlen}")
    bucket = Bucket(rows, sequences, most, round_up(target, _LENGTH_STEP, 2, max_seqlen) if target else 0)
    return Arrival(bucket, tensors, tuple(others), batch, seqlen, tokens, boundaries, facts, target)


def _packed_sizes(call: Mapping[str, Any], ids: Tensor) -> tuple[int, int, int, tuple[bool, bool]]:
    if ids.shape[0] != 1 or call.get("max_length_q") is None or call.get("attention_mask") is not None:
        raise CannotCapture("a packed batch that the model will refuse")
    return call["cu_seq_lens_q"].shape[0] - 1, int(call["max_length_q"]), ids.shape[1], (True, True)


def _role(name: str, value: Tensor, batch: int, seqlen: int, packed: bool, writes: bool) -> str:
    shape = tuple(value.shape)
    if writes and name in TARGETS and value.ndim == 2 and shape[0] == batch and not value.is_floating_point():
        return "target"
    if packed and name in PER_TOKEN:
        return "row"
    if value.ndim >= 2 and shape[:2] == (batch, seqlen) and not (name == "labels" and value.is_floating_point()):
        return "token"
    if name in PER_TOKEN and shape[:2] == (1, seqlen):
        return "token"  # one row for all, as position_ids may be
    if value.ndim >= 1 and shape[0] == batch:
        return "sequence"
    if value.ndim == 0:
        return "whole"
    raise CannotCapture(f"{name} of shape {shape} is neither one a token nor one a sequence")


def _may_grow(tensors: Mapping[str, tuple[str, Tensor]], others: list[tuple[str, Any]]) -> bool:
    """Whether sequences may be added: nothing of the batch but ids and labels that can say "ignore me"."""
    known = {*PER_TOKEN, "attention_mask", "labels"}
    if any(role in ("token", "target", "sequence") and name not in known for name, (role, _) in tensors.items()):
        return False
    labels = tensors.get("labels")
    return labels is None or labels[1].dtype == torch.int64


class StaticBatch:
    """Buffers at fixed addresses that hold one batch of a bucket.

    Args:
        bucket: their shapes.
        like: an arrival, of whose signature the batches will be.
        pad_token_id: the id at places without a token.
        device: of the buffers.
    """

    def __init__(self, bucket: Bucket, like: Arrival, pad_token_id: int, device: torch.device) -> None:
        self.bucket, self.packed, self.facts, self.others = bucket, like.packed, like.facts, dict(like.others)
        self.buffers: dict[str, Tensor] = {}
        self.fills: dict[str, int] = {}
        for name, (role, value) in like.tensors.items():
            lead = {
                "token": (bucket.batch, bucket.seqlen),
                "row": (1, bucket.rows),
                "target": (bucket.batch, bucket.target),
                "sequence": (bucket.batch,),
                "whole": (),
            }[role]
            fills = {"input_ids": pad_token_id, "decoder_input_ids": pad_token_id, "labels": IGNORED}
            self.fills[name] = fills.get(name, 0)
            shape = (*lead, *value.shape[len(lead) :])
            self.buffers[name] = torch.full(shape, self.fills[name], dtype=value.dtype, device=device)
        if self.packed:
            self.boundaries = torch.zeros(bucket.batch + 1, dtype=torch.int32, device=device)
        elif "attention_mask" not in self.buffers:
            self.buffers["attention_mask"] = torch.zeros(bucket.batch, bucket.seqlen, dtype=torch.int64, device=device)
            self.fills["attention_mask"] = 0

    def fill(self, arrival: Arrival) -> None:
        """Copy a batch in; places it does not reach get what means nothing."""
        for name, (_, value) in arrival.tensors.items():
            self._copy(name, value, arrival)
        if arrival.boundaries is not None:
            # Sequences beyond the batch are empty: they begin and end where it ends.
            self.boundaries.fill_(arrival.tokens)
            self.boundaries[: arrival.batch + 1].copy_(arrival.boundaries, non_blocking=True)
        elif "attention_mask" not in arrival.tensors:
            mask = self.buffers["attention_mask"]
            mask.zero_()
            mask[: arrival.batch, : arrival.seqlen] = 1

    def _copy(self, name: str, value: Tensor, arrival: Arrival) -> None:
        buffer = self.buffers[name]
        role = arrival.tensors[name][0]
        if role == "token":
            value = value[:, : buffer.shape[1]].expand(arrival.batch, *[-1] * (value.ndim - 1))
            target = buffer[: value.shape[0], : value.shape[1]]
        elif role == "row":
            target = buffer[:, : value.shape[1]]
        elif role == "target":
            target = buffer[: value.shape[0], : value.shape[1]]
        elif role == "sequence":
            target = buffer[: value.shape[0]]
        else:
            target = buffer
        if target.shape != buffer.shape:
            buffer.fill_(self.fills[name])
        target.copy_(value, non_blocking=True)

    def arguments(self) -> dict[str, Any]:
        """The arguments of the model's call on the buffers: device work only, to run inside a capture."""
        call: dict[str, Any] = {**self.others, **self.buffers}
        bucket = self.bucket
        if self.packed:
            packing = BucketPacking.of_boundaries(self.boundaries, bucket.seqlen, bucket.rows)
            for name in PER_TOKEN:
                if name in call:
                    call[name] = packing.pad(call[name].squeeze(0))
            if "input_ids" in call:
                places = packing.places()
                call["input_ids"] = torch.where(places, call["input_ids"], self.fills["input_ids"])
            mask = packing.places().to(torch.int64)
        else:
            mask = self.buffers["attention_mask"].clone()
            packing = BucketPacking.of_mask(mask, bucket.rows, *self.facts)
        call["attention_mask"] = remember(mask, packing)
        return call
