"""Keys and values kept between the steps of incremental decoding."""

from __future__ import annotations

import torch
from torch import Tensor


class AttentionCache:
    """Keys and values of one attention, [batch, heads, tokens, head_dim] each.

    Args:
        fixed: whether the first call's keys and values stay for good (attention to an encoder's memory) instead of
            growing with every call.
    """

    def __init__(self, fixed: bool = False) -> None:
        self.fixed = fixed
        self.length = 0
        self._key: Tensor | None = None
        self._value: Tensor | None = None

    def append(self, key: Tensor, value: Tensor) -> None:
        """Add [batch, heads, new tokens, head_dim]; memory grows by doubling, so a step copies what is new."""
        if self._key is None or self._value is None:
            self._key, self._value, self.length = key, value, key.shape[2]
            return
        if key.shape[0] != self._key.shape[0]:
            raise ValueError(f"the cache holds a batch of {self._key.shape[0]}, got one of {key.shape[0]}")
        self._key, self._value = self._grown(self._key, key), self._grown(self._value, value)
        self.length += key.shape[2]

    def _grown(self, kept: Tensor, new: Tensor) -> Tensor:
        end = self.length + new.shape[2]
        if torch.is_grad_enabled() and (kept.requires_grad or new.requires_grad):
            return torch.cat((kept[:, :, : self.length], new), 2)
        # The tensor of the first call belongs to the caller's graph of views: never written to, only copied.
        if end > kept.shape[2] or kept.is_inference() != torch.is_inference_mode_enabled():
            room = kept.new_empty(*kept.shape[:2], max(end, 2 * kept.shape[2]), kept.shape[3])
            room[:, :, : self.length] = kept[:, :, : self.length]
            kept = room
        kept[:, :, self.length : end] = new
        return kept

    def read(self) -> tuple[Tensor, Tensor]:
        """Keys and values so far."""
        if self._key is None or self._value is None:
            raise ValueError("the cache is empty")
        return self._key[:, :, : self.length], self._value[:, :, : self.length]

    def reorder(self, rows: Tensor) -> None:
        """Take these rows of the batch, int64 [new batch], repeated or dropped as they say."""
        if self._key is not None and self._value is not None:
            self._key, self._value = self._key.index_select(0, rows), self._value.index_select(0, rows)


class KVCache:
    """What a `TransformerDecoder` remembers between steps: pass the same one to every call, and only new tokens.

    >>> cache = fastformer.nn.KVCache()
    >>> for step in range(longest):
    ...     hidden = decoder(embed(tokens[:, -1:]), memory, memory_key_padding_mask=padding, cache=cache)

    Each layer's keys and values of the target grow by what a call brings; those of the memory are projected once.
    """

    def __init__(self) -> None:
        self.layers: list[tuple[AttentionCache, AttentionCache]] = []

    def __len__(self) -> int:
        """Target tokens so far."""
        return self.layers[0][0].length if self.layers else 0

    def of_layer(self, number: int) -> tuple[AttentionCache, AttentionCache]:
        """(of the target, of the memory) in layer `number`."""
        while len(self.layers) <= number:
            self.layers.append((AttentionCache(), AttentionCache(fixed=True)))
        return self.layers[number]

    def reorder(self, rows: Tensor, *, same_memory: bool = False) -> None:
        """Let row i continue what row rows[i] was, as beam search asks for.

        Args:
            rows: int64 [new batch].
            same_memory: whether every row stays with the memory it had (beams of one sentence); saves the copy.
        """
        for target, memory in self.layers:
            target.reorder(rows)
            if not same_memory:
                memory.reorder(rows)
