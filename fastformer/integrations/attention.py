"""fastformer's attention behind transformers' AttentionInterface.

Which tokens belong together is read, in this order, from

1. the `Plan` of a patched base model, or of the mask function (`masks`);
2. `cu_seq_lens_q` and its kin, for a batch that came packed;
3. `position_ids` that start again in a batch of one, the convention of packed training;
4. a mask with two or four dimensions, or none.

An argument that is neither understood nor known to be without effect raises: ignoring one gives wrong numbers silently.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from fastformer.integrations.attend import attend, attend_packed, attend_with_weights
from fastformer.integrations.masks import mask_forward
from fastformer.integrations.plan import (
    Plan,
    packing_from_lengths,
    packing_from_mask,
    packing_from_positions,
    plan_in,
)
from fastformer.integrations.scoped import Scoped
from fastformer.nn.counters import count_fused
from fastformer.ops.packing import Packing

NAME = "fastformer"
# Set around a base model's forward whose own code keeps output_attentions from its attention modules (GPT-2).
WANTS_WEIGHTS: Scoped[bool] = Scoped("fastformer_wants_weights", False)

# Bookkeeping of transformers that says nothing about which keys a query may see.
_WITHOUT_EFFECT = frozenset(
    ("cache_position", "deterministic", "encoder_hidden_states", "layer_idx", "num_items_in_batch",
     "output_attentions", "output_hidden_states", "output_router_logits", "past_key_values", "position_embeddings",
     "return_dict", "token_type_ids", "use_cache")
)  # fmt: skip


@functools.cache
def register() -> None:
    """Make `attn_implementation="fastformer"` known to transformers, attention and mask function alike.

    Attention is all it changes: padding goes from the whole model only by `fastformer.patch`. A row packed by
    position_ids that start again is recognised in every model that takes some; inside torch.compile DistilBERT and
    ModernBERT, which keep them from their attention, need cu_seq_lens_q and its kin instead.

    Raises:
        ImportError: transformers is missing, or older than its attention interface.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, mask_forward)


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention as transformers calls it.

    Args:
        query: [batch, heads, seqlen_q, head_dim]; key, value: [batch, kv_heads, seqlen_k, head_dim].
        attention_mask: a `Plan`, a `PlanMask`, [batch, seqlen_k] (True or 1: attend), or [batch, heads or 1, seqlen_q,
            seqlen_k], bool (True: attend) or float (added).
        sliding_window: a query sees as many keys up to itself (causal), or fewer than that many to either side.
        s_aux: [heads], attention sinks. position_bias: broadcastable to the scores, added to them.

    Returns:
        [batch, seqlen_q, heads, head_dim], and None or, with output_attentions, the weights
        [batch, heads, seqlen_q, seqlen_k].

    Raises:
        ValueError: an argument that is not understood, or two that contradict each other.
    """
    for name, given in kwargs.items():
        if given is not None and name not in _WITHOUT_EFFECT:
            raise ValueError(f'attn_implementation="fastformer" does not know the argument {name} of {_name(module)}')
    count_fused(_name(module))
    plan = plan_in(attention_mask)
    if plan is None:
        plan = _plan_of_mask(attention_mask)
    dense_mask = attention_mask if plan is None else None
    causal = next(c for c in (plan and plan.causal, is_causal, getattr(module, "is_causal", True)) if c is not None)
    # Decided here rather than handed on as a condition, which in a graph of any length would be a symbol.
    if dense_mask is not None or query.shape[2] == 1:
        causal = False
    packing = _packing(plan, query, key, position_ids, cu_seq_lens_q, cu_seq_lens_k, max_length_q, dense_mask)
    window = plan.window if plan is not None else None
    if window is None and sliding_window is not None and dense_mask is None:
        window = (sliding_window - 1, 0 if causal else sliding_window - 1)
    options: dict[str, Any] = {
        "dropout_p": dropout,
        "scale": scaling,
        "is_causal": causal,
        "causal_alignment": "bottom-right",
        "enable_gqa": query.shape[1] != key.shape[1],
        "window": window,
        "softcap": softcap,
        "sinks": s_aux,
    }
    wants_weights = WANTS_WEIGHTS.get() or kwargs.get("output_attentions")
    wants_weights = wants_weights or getattr(getattr(module, "config", None), "output_attentions", False)
    if wants_weights and (packing is not None or (plan is not None and plan.keys is not None)):
        raise ValueError("output_attentions needs one sequence a row, got a packed batch")
    if plan is not None and plan.keys is not None:
        return _across(query, key, value, plan, options), None
    if packing is not None:
        if position_bias is not None:
            return _biased(query, key, value, packing, position_bias, options), None
        q, k, v = (t.transpose(1, 2).squeeze(0) for t in (query, key, value))
        return _packed(q, k, v, packing, options)[None], None
    to_itself = causal and query.shape[2] == key.shape[2]
    if to_itself and plan is not None and plan.mask is not None and position_bias is None and not wants_weights:
        out = _unpadded(query, key, value, plan.mask, options)
        if out is not None:
            return out, None
    mask = _dense_mask(plan, dense_mask, position_bias, query.dtype)
    if wants_weights:
        out, weights = attend_with_weights(query, key, value, attn_mask=mask, **options)
        return out.transpose(1, 2), weights
    return attend(query, key, value, attn_mask=mask, **options).transpose(1, 2), None


def _packing(
    plan: Plan | None,
    query: Tensor,
    key: Tensor,
    position_ids: Tensor | None,
    cu_seq_lens_q: Tensor | None,
    cu_seq_lens_k: Tensor | None,
    max_length_q: int | None,
    dense_mask: Tensor | None,
) -> Packing | None:
    """How the rows of a packed batch belong together; None for a batch that has its sequences one a row."""
    if plan is not None and plan.packing is not None:
        return plan.packing
    batch, _, length, _ = query.shape
    if cu_seq_lens_q is not None:
        if batch != 1:
            raise ValueError(f"cu_seq_lens_q describes one packed row, got a batch of {batch}")
        if dense_mask is not None or (plan is not None and plan.mask is not None and not bool(plan.mask.all())):
            raise ValueError("got both cu_seq_lens_q and an attention_mask that hides tokens; pass only one of them")
        if max_length_q is None or key.shape[2] != length:
            raise ValueError("cu_seq_lens_q needs max_length_q and keys of the same packed batch")
        if cu_seq_lens_k is not None and cu_seq_lens_k.shape != cu_seq_lens_q.shape:
            raise ValueError("cu_seq_lens_k must describe the same sequences as cu_seq_lens_q")
        return _remembered(cu_seq_lens_q, lambda: packing_from_lengths(cu_seq_lens_q, int(max_length_q), length))
    if position_ids is None or dense_mask is not None or batch != 1 or key.shape[2] != length:
        return None
    return _remembered(position_ids, lambda: packing_from_positions(position_ids))


def _remembered(tensor: Tensor, make: Any) -> Packing | None:
    """Metadata computed once a batch: it is kept on the tensor that every layer of the batch receives."""
    if not hasattr(tensor, "fastformer_packing"):
        tensor.fastformer_packing = make()  # type: ignore[attr-defined]
    return tensor.fastformer_packing  # type: ignore[attr-defined]


def _plan_of_mask(attention_mask: Tensor | None) -> Plan | None:
    if attention_mask is None:
        return Plan()
    if attention_mask.ndim == 2:
        return Plan(mask=attention_mask != 0)
    if attention_mask.ndim != 4:
        raise ValueError(f"attention_mask must have 2 or 4 dimensions, got shape {tuple(attention_mask.shape)}")
    return None


def _packed(query: Tensor, key: Tensor, value: Tensor, packing: Packing, options: dict[str, Any]) -> Tensor:
    """[rows, heads, head_dim] each, to [rows, heads, head_dim]."""
    lengths, longest = packing.cu_seqlens, packing.max_seqlen
    return attend_packed(query, key, value, lengths, lengths, longest, longest, **options)


def _across(query: Tensor, key: Tensor, value: Tensor, plan: Plan, options: dict[str, Any]) -> Tensor:
    """Cross-attention of packed or padded queries to packed keys; a bias between the two sides there is none."""
    assert plan.keys is not None
    batch, _, length, _ = query.shape
    k, v = (t.transpose(1, 2).squeeze(0) for t in (key, value))
    q = query.transpose(1, 2).flatten(0, 1)
    if plan.packing is not None:
        lengths, longest = plan.packing.cu_seqlens, plan.packing.max_seqlen
    else:
        lengths = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=query.device)
        longest = length
    out = attend_packed(q, k, v, lengths, plan.keys.cu_seqlens, longest, plan.keys.max_seqlen, **options)
    return out.unflatten(0, (batch, length))


def _unpadded(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, options: dict[str, Any]) -> Tensor | None:
    """Attention of a padded batch to itself, without its padding; None if it has none, or windows or a graph forbid."""
    packing = None if torch.compiler.is_compiling() else packing_from_mask(mask)
    if packing is None or (options["window"] is not None and not packing.contiguous):
        return None
    q, k, v = (packing.pack(t.transpose(1, 2)) for t in (query, key, value))
    return packing.pad(_packed(q, k, v, packing, options))


def _biased(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, bias: Tensor, options: dict[str, Any]
) -> Tensor:
    """Packed rows with a bias [1, heads, seqlen, seqlen] by the distance between two places of the padded batch."""
    if bias.shape[-1] not in (1, packing.seqlen):
        raise ValueError(f"position_bias must be for {packing.seqlen} places of a packed batch, got {bias.shape[-1]}")
    if packing.contiguous:
        # Distances within a sequence are the same wherever in its row it stands.
        q, k, v = (t.transpose(1, 2).squeeze(0) for t in (query, key, value))
        longest = packing.max_seqlen
        mask = bias[..., :longest, :longest].to(query.dtype)
        return _packed(q, k, v, packing, {**options, "attn_mask": mask})[None]
    q, k, v = (packing.pad(t.transpose(1, 2).squeeze(0)).transpose(1, 2) for t in (query, key, value))
    mask = bias.to(query.dtype).masked_fill(~packing.places()[:, None, None, :], -torch.inf)
    out = attend(q, k, v, attn_mask=mask, **options)
    return packing.pack(out.transpose(1, 2))[None]


def _dense_mask(
    plan: Plan | None, dense_mask: Tensor | None, position_bias: Tensor | None, dtype: torch.dtype
) -> Tensor | None:
    mask = dense_mask
    if plan is not None and plan.mask is not None:
        mask = plan.mask[:, None, None, :]
    if position_bias is None:
        return mask
    if mask is None:
        return position_bias.to(dtype)
    if mask.dtype == torch.bool:
        return position_bias.to(dtype).masked_fill(~mask, -torch.inf)
    return position_bias.to(dtype) + mask


def _name(module: torch.nn.Module) -> str:
    return type(module).__name__
