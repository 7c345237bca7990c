"""From ids of unequal length to rectangles, as transformers' tokenizers do it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from fastformer.tokenizer.bpe import BPETokenizer, Special

PAD_NAMES = ("<pad>", "[PAD]", "<|pad|>", "<|padding|>")


def _pad_id(tokenizer: BPETokenizer, pad_token: str | None) -> int:
    specials = tokenizer.special_tokens
    if pad_token is not None:
        if pad_token not in specials:
            raise ValueError(
                f"pad_token {pad_token!r} is no special token of this tokenizer; it has {sorted(specials)}"
            )
        return specials[pad_token]
    for name in PAD_NAMES:
        if name in specials:
            return specials[name]
    raise ValueError(f"padding needs pad_token=…: none of {PAD_NAMES} is among the special tokens {sorted(specials)}")


def call(
    tokenizer: BPETokenizer,
    texts: str | Sequence[str],
    padding: bool | str,
    truncation: bool,
    max_length: int | None,
    return_tensors: str | None,
    pad_token: str | None,
    add_special_tokens: bool,
    allowed_special: Special,
) -> dict[str, Any]:
    """See BPETokenizer.__call__."""
    if padding not in (False, True, "longest", "max_length"):
        raise ValueError(f'padding must be False, True, "longest" or "max_length", got {padding!r}')
    if return_tensors not in (None, "np", "pt"):
        raise ValueError(f'return_tensors must be None, "np" or "pt", got {return_tensors!r}')
    if (truncation or padding == "max_length") and max_length is None:
        raise ValueError("truncation and padding to max_length need max_length")
    if max_length is not None and max_length < 0:
        raise ValueError(f"max_length must not be negative, got {max_length}")
    single = isinstance(texts, str | bytes)
    batch: list[str | bytes] = [texts] if isinstance(texts, str | bytes) else list(texts)
    if allowed_special:
        rows = [tokenizer.encode_array(text, allowed_special=allowed_special) for text in batch]
    else:
        ids, offsets = tokenizer.encode_packed(batch)
        rows = [ids[a:b] for a, b in itertools.pairwise(offsets)]
    before, after = tokenizer._model.template if add_special_tokens else ((), ())
    if truncation and max_length is not None:
        room = max_length - len(before) - len(after)
        if room < 0:
            raise ValueError(
                f"max_length={max_length} leaves no room for the {len(before) + len(after)} special tokens"
            )
        rows = [row[:room] for row in rows]
    if before or after:
        ends = np.asarray(before, np.uint32), np.asarray(after, np.uint32)
        rows = [np.concatenate([ends[0], row, ends[1]]) for row in rows]
    lengths = [len(row) for row in rows]
    if not padding:
        if return_tensors is None:
            lists = [row.tolist() for row in rows]
            masks = [[1] * n for n in lengths]
            return {"input_ids": lists[0] if single else lists, "attention_mask": masks[0] if single else masks}
        if len(set(lengths)) > 1:
            raise ValueError(
                f"texts of {min(lengths)} to {max(lengths)} ids do not make one array; ask for padding=True "
                "or return_tensors=None"
            )
    width = max(lengths, default=0)
    if padding == "max_length" and max_length is not None:
        width = max(width, max_length)
    fill = _pad_id(tokenizer, pad_token) if padding and any(n < width for n in lengths) else 0
    input_ids = np.full((len(rows), width), fill, dtype=np.int64)
    mask = np.zeros((len(rows), width), dtype=np.int64)
    for i, row in enumerate(rows):
        input_ids[i, : len(row)] = row
        mask[i, : len(row)] = 1
    if return_tensors is None:
        lists, masks = input_ids.tolist(), mask.tolist()
        return {"input_ids": lists[0] if single else lists, "attention_mask": masks[0] if single else masks}
    if return_tensors == "np":
        return {"input_ids": input_ids, "attention_mask": mask}
    import torch

    return {"input_ids": torch.from_numpy(input_ids), "attention_mask": torch.from_numpy(mask)}
