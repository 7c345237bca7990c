"""What encoder families share; a family's table fills in the names of its parts.

- `PackedEncoder`: packs ids before the embeddings, runs embeddings and layers on real tokens only, pads back once at
  the end. Layers receive the `Plan` in place of the attention mask.
- `SelfAttention`: attention over the packed (or dense) batch.
- `AddNorm`: dropout + residual + LayerNorm in one pass.

A behaviour is a class with the family's table as its attribute, at module level so that a patched model pickles. Its
own names begin with an underscore: a public one would hide a child module of the same name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastformer import ops
from fastformer.integrations.attend import attend, attend_packed, attend_with_weights
from fastformer.integrations.families import batch
from fastformer.integrations.families.embeddings import embed_at_once
from fastformer.integrations.packed_linear import project
from fastformer.integrations.plan import Plan
from fastformer.nn.counters import count_fallback, count_fused
from fastformer.nn.norm import has_hooks, is_plain_dropout, is_plain_norm
from fastformer.ops.random import drawn_together


@dataclass(frozen=True)
class EncoderTable:
    """Names of a base model's parts.

    Attributes:
        label: name in the counters.
        encoder: child that holds the layers.
        output: class of transformers.modeling_outputs that stock returns.
    """

    label: str
    encoder: str = "encoder"
    output: str = "BaseModelOutputWithPoolingAndCrossAttentions"


@dataclass(frozen=True)
class AttentionTable:
    """Names of an attention module's projections and dropout, and of the attributes that hold its sizes."""

    label: str
    projections: tuple[str, str, str] = ("query", "key", "value")
    dropout: str = "dropout"
    heads: str = "num_attention_heads"
    head_size: str = "attention_head_size"


class PackedEncoder:
    """Forward of a base model without its padding.

    A batch that came packed (cu_seq_lens_q and max_length_q given, ids [1, tokens]) comes back padded, one sequence a
    row, so that heads pool and classify as they always do. A batch of one whose position_ids start again is packed too,
    and comes back as it came.
    """

    _table: ClassVar[EncoderTable]
    fastformer_unpad: str | bool

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = batch.named_arguments(self, args, kwargs)
        reason = self._why_stock(call)
        if reason:
            batch.refuse_packed(call, reason)
            count_fallback(self._table.label, reason)
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        count_fused(self._table.label)
        if not self.training or torch.compiler.is_compiling():  # type: ignore[attr-defined]
            return self._run(call)
        # Three dropouts a layer, and the embeddings'.
        with drawn_together(1 + 3 * sum(1 for _ in self._layers())):
            return self._run(call)

    def _run(self, call: dict[str, Any]) -> Any:
        inputs = self._token_inputs(call)
        weighs = batch.wants(self, call, "attentions")
        plan, pads = batch.plan_of(call, inputs, False if weighs else self.fastformer_unpad, pools_first=True)
        if weighs:
            if plan.packing is not None:
                raise ValueError("output_attentions needs one sequence a row, got a packed batch")
            plan = dataclasses.replace(plan, weights=[])
        if plan.packing is not None:
            inputs = batch.pack_inputs(inputs, plan.packing, self._first_position())
        hidden, states = self._embed(inputs), None
        if batch.wants(self, call, "hidden_states"):
            states = list(self._run_layers(hidden, plan, pads))
            hidden = states[-1]
        else:
            hidden = getattr(self, self._table.encoder)(hidden, plan)[0]
            if pads:
                hidden = plan.first(hidden) if batch.FIRST_PLACE.get() and plan.begins_all else plan.pad(hidden)
        return self._answer(call, hidden, states, plan.weights)

    def _token_inputs(self, call: dict[str, Any]) -> dict[str, Tensor | None]:
        """What the embeddings take, [batch, seqlen, ...] each."""
        return {name: call.get(name) for name in batch.PER_TOKEN}

    def _first_position(self) -> int:
        """Position of a sequence's first token."""
        return 0

    def _embed(self, inputs: dict[str, Tensor | None]) -> Tensor:
        embeddings = self.embeddings  # type: ignore[attr-defined]
        hidden = embed_at_once(embeddings, inputs)
        if hidden is not None:
            return hidden
        if "token_type_ids" in inputs and inputs["token_type_ids"] is None:
            # Stock takes zeros from a buffer as long as the longest sequence, which a packed row exceeds.
            source = inputs["input_ids"] if inputs["input_ids"] is not None else inputs["inputs_embeds"]
            assert source is not None
            zeros = torch.zeros(source.shape[:2], dtype=torch.long, device=source.device)
            inputs = {**inputs, "token_type_ids": zeros}
        return embeddings(**inputs)

    def _layers(self) -> Iterator[torch.nn.Module]:
        return iter(getattr(self, self._table.encoder).layer)

    def _pool(self, hidden: Tensor) -> Tensor | None:
        pooler = self.pooler  # type: ignore[attr-defined]
        return None if pooler is None else pooler(hidden)

    def _run_layers(self, hidden: Tensor, plan: Plan, pads: bool) -> Iterator[Tensor]:
        """The hidden states around every layer, padded back if `pads`."""
        for layer in self._layers():
            if pads:
                shown = plan.pad(hidden)
                yield shown
                # From what was shown on, so that it has a gradient if somebody asks for one.
                hidden = plan.repack(shown) if shown.requires_grad else hidden
            else:
                yield hidden
            out = layer(hidden, plan)
            hidden = out[0] if isinstance(out, tuple) else out
        yield plan.pad(hidden) if pads else hidden

    def _why_stock(self, call: dict[str, Any]) -> str:
        config = self.config  # type: ignore[attr-defined]
        if getattr(config, "is_decoder", False):
            return "is_decoder=True"
        if getattr(config, "chunk_size_feed_forward", 0):
            return "chunk_size_feed_forward"
        encoder = getattr(self, self._table.encoder)
        if batch.wants(self, call, "hidden_states") and has_hooks(encoder):
            return "output_hidden_states of a hooked encoder"
        if batch.wants(self, call, "attentions") and (call.get("cu_seq_lens_q") is not None or _checkpoints(self)):
            return "output_attentions of a packed batch or with checkpointing"
        return batch.why_stock(self, call, gives_weights=True)

    def _answer(
        self, call: dict[str, Any], hidden: Tensor, states: list[Tensor] | None, weights: list[Tensor] | None
    ) -> Any:
        from transformers import modeling_outputs

        fields: dict[str, Any] = {"last_hidden_state": hidden, "hidden_states": states and tuple(states)}
        if weights is not None:
            fields["attentions"] = tuple(weights)
            if "CrossAttentions" in self._table.output and not batch.returns_tuples():
                fields["cross_attentions"] = ()
        if "Pooling" in self._table.output:
            fields["pooler_output"] = self._pool(hidden)
        return batch.answer(self, getattr(modeling_outputs, self._table.output)(**fields), call.get("return_dict"))


class SelfAttention:
    """Forward of a self-attention module over the batch that a patched base model hands down."""

    _table: ClassVar[AttentionTable]

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(attention_mask, Plan):
            count_fallback(self._table.label, "called by stock code")
            return super().forward(hidden_states, attention_mask, *args, **kwargs)  # type: ignore[misc]
        count_fused(self._table.label)
        return self._finish(self._attend(hidden_states, attention_mask), hidden_states), None

    def _finish(self, attended: Tensor, hidden_states: Tensor) -> Tensor:
        """What the module does after attention."""
        return attended

    def _attend(self, hidden_states: Tensor, plan: Plan) -> Tensor:
        table = self._table
        shape = (getattr(self, table.heads), getattr(self, table.head_size))
        dropout_p = getattr(self, table.dropout).p if self.training else 0.0  # type: ignore[attr-defined]
        if plan.packing is not None:
            q, k, v = project(self, table.projections, hidden_states.squeeze(0), shape)
            lengths, longest = plan.packing.cu_seqlens, plan.packing.max_seqlen
            out = attend_packed(q, k, v, lengths, lengths, longest, longest, dropout_p=dropout_p)[None]
        else:
            q, k, v = (t.transpose(1, 2) for t in project(self, table.projections, hidden_states, shape))
            mask = None if plan.mask is None else plan.mask[:, None, None, :]
            if plan.weights is None:
                out = attend(q, k, v, attn_mask=mask, dropout_p=dropout_p).transpose(1, 2)
            else:
                out, weights = attend_with_weights(q, k, v, attn_mask=mask, dropout_p=dropout_p)
                plan.weights.append(weights)
                out = out.transpose(1, 2)
        return out.flatten(2)


class AddNorm:
    """Forward of BERT's output modules: LayerNorm(residual + dropout(dense(x)))."""

    _label: ClassVar[str]

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        dense, norm, dropout = self.dense, self.LayerNorm, self.dropout  # type: ignore[attr-defined]
        if not fusable(norm, dropout):
            count_fallback(self._label, "LayerNorm or dropout is hooked or replaced")
            return super().forward(hidden_states, input_tensor)  # type: ignore[misc]
        count_fused(self._label)
        return add_norm(dense(hidden_states), input_tensor, norm, dropout)


def fusable(norm: torch.nn.Module, dropout: torch.nn.Module | None = None) -> bool:
    """Whether a LayerNorm and the dropout before it may be read instead of called."""
    return is_plain_norm(norm) and (dropout is None or is_plain_dropout(dropout))


def add_norm(branch: Tensor, residual: Tensor, norm: Any, dropout: Any = None) -> Tensor:
    """norm(residual + dropout(branch)) in one pass; `fusable` must have agreed."""
    p, training = (0.0, False) if dropout is None else (dropout.p, dropout.training)
    out = ops.add_layer_norm(branch, residual, norm.weight, norm.bias, norm.eps, dropout_p=p, training=training)
    assert isinstance(out, Tensor)
    return out


def _checkpoints(model: Any) -> bool:
    """Whether layers run again in backward, where they would put out their weights again."""
    return model.training and any(getattr(part, "gradient_checkpointing", False) for part in model.modules())


def why_not_absolute(module: torch.nn.Module) -> str:
    """Reason why an attention module or a model cannot be replaced, or ""."""
    config: Any = getattr(module, "config", None)
    kind = getattr(module, "position_embedding_type", None) or getattr(config, "position_embedding_type", None)
    if kind not in (None, "absolute"):
        return f"position_embedding_type={kind!r}"
    if getattr(module, "is_decoder", False) or getattr(config, "is_decoder", False):
        return "is_decoder=True: padding is removed for encoders only"
    return ""
