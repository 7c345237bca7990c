"""Embeddings of BERT's shape (word + position and maybe token type, LayerNorm, dropout) in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastformer import ops
from fastformer.integrations.families import batch
from fastformer.nn.counters import count_fused
from fastformer.nn.norm import is_plain_dropout, is_plain_norm
from fastformer.nn.parts import has_hooks
from fastformer.ops.backend import backend_for

_TABLES = ("word_embeddings", "position_embeddings", "token_type_embeddings")


def embed_at_once(embeddings: Any, inputs: dict[str, Tensor | None]) -> Tensor | None:
    """What the embeddings make of `inputs` (input_ids and maybe more, [batch, seqlen] each), or None if they are not
    plain ones of that shape and must be called, as where no kernel would run."""
    ids = inputs.get("input_ids")
    if torch.compiler.is_compiling() or ids is None or inputs.get("inputs_embeds") is not None:
        return None
    if backend_for(ids.device) == "torch":
        return None
    parts = dict(embeddings.named_children())
    if batch.is_changed(embeddings) or set(parts) | {_TABLES[-1]} != {*_TABLES, "LayerNorm", "dropout"}:
        return None
    norm, dropout = parts["LayerNorm"], parts["dropout"]
    tables: list[Any] = [parts.get(name) for name in _TABLES]
    if (
        not all(table is None or _is_plain(table) for table in tables)
        or not is_plain_norm(norm)
        or not is_plain_dropout(dropout)
    ):
        return None
    word, position, token_type = tables
    # The operator leaves out the gradient of a row of words and of positions only.
    if token_type is not None and token_type.padding_idx is not None:
        return None
    count_fused("Embeddings")
    return ops.embedding_layer_norm(
        ids,
        word.weight,
        position.weight,
        None if token_type is None else token_type.weight,
        norm.weight,
        norm.bias,
        norm.eps,
        dropout.p,
        dropout.training,
        position_ids=_like(inputs.get("position_ids"), ids),
        token_type_ids=_like(inputs.get("token_type_ids"), ids),
        padding_idx=word.padding_idx,
        position_padding_idx=position.padding_idx,
    )


def _is_plain(table: Any) -> bool:
    """Whether a table may be read instead of called."""
    if type(table) is not torch.nn.Embedding or has_hooks(table) or type(table.weight) is not torch.nn.Parameter:
        return False
    return table.max_norm is None and not table.scale_grad_by_freq and not table.sparse


def _like(places: Tensor | None, ids: Tensor) -> Tensor | None:
    """Positions or types of one row serve every row."""
    return None if places is None else places.expand(ids.shape)
