"""Keys and values kept between the steps of incremental decoding."""

from __future__ import annotations

import torch
from torch import Tensor

from fastformer import ops
from fastformer.ops.backend import backend_for
from fastformer.ops.validate import FLOATS


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
        self._check_batch(key)
        self._key, self._value = self._grown(self._key, key), self._grown(self._value, value)
        self.length += key.shape[2]

    def attends(self, query: Tensor, key: Tensor, value: Tensor) -> bool:
        """Whether `append_and_attend` takes this step: on the kernels' devices, where no derivative is asked for.

        Elsewhere PyTorch's attention over `read()` is faster than the composite behind `ops.attention_kv_cache`.
        """
        if torch.is_grad_enabled() and any(
            x is not None and x.requires_grad for x in (query, key, value, self._key, self._value)
        ):
            return False
        return query.dtype in FLOATS and backend_for(query.device) == "triton"

    def append_and_attend(self, query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
        """Add key and value and attend to all so far, in one call of `ops.attention_kv_cache`.

        Args:
            query, key, value: [batch, heads, new tokens, head_dim].
            is_causal: whether a new token is hidden from those before it.

        Returns:
            [batch, heads, new tokens, head_dim], without a derivative.
        """
        if self._key is None or self._value is None:
            self._key, self._value = key[:, :, :0], value[:, :, :0]
        self._check_batch(key)
        end = self.length + key.shape[2]
        self._key, self._value = self._with_room(self._key, end), self._with_room(self._value, end)
        out = ops.attention_kv_cache(
            query.transpose(1, 2),
            self._key.transpose(1, 2),
            self._value.transpose(1, 2),
            torch.full((key.shape[0],), self.length, dtype=torch.int32, device=key.device),
            k=key.transpose(1, 2),
            v=value.transpose(1, 2),
            is_causal=is_causal,
        )
        self.length = end
        return out.transpose(1, 2)

    def _check_batch(self, key: Tensor) -> None:
        if self._key is not None and key.shape[0] != self._key.shape[0]:
            raise ValueError(f"the cache holds a batch of {self._key.shape[0]}, got one of {key.shape[0]}")

    def _grown(self, kept: Tensor, new: Tensor) -> Tensor:
        end = self.length + new.shape[2]
        if torch.is_grad_enabled() and (kept.requires_grad or new.requires_grad):
            return torch.cat((kept[:, :, : self.length], new), 2)
        kept = self._with_room(kept, end)
        kept[:, :, self.length : end] = new
        return kept

    def _with_room(self, kept: Tensor, end: int) -> Tensor:
        """`kept`, or a larger copy, with room for `end` tokens, that may be written to."""
        # The tensor of the first call belongs to the caller's graph of views: never written to, only copied.
        if end > kept.shape[2] or kept.is_inference() != torch.is_inference_mode_enabled():
            room = kept.new_empty(*kept.shape[:2], max(end, 2 * kept.shape[2]), kept.shape[3])
            room[:, :, : self.length] = kept[:, :, : self.length]
            kept = room
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
