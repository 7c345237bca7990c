"""A post-norm encoder layer as one operation (`fastformer.ops.encoder_layer`), for families with layers of its shape.

Only a layer of plain parts runs so: whatever is hooked, wrapped, subclassed, adapted, quantised or sharded must be
called, and then the layer's parts are, as they are without this. Attention maps need attention's own arguments, so a
layer that is looked at runs in parts too.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fastformer.integrations.families import batch
from fastformer.integrations.families.encoder import SelfAttention, fusable
from fastformer.integrations.packed_linear import is_plain_linear, lie_side_by_side
from fastformer.integrations.plan import Plan
from fastformer.nn.counters import count_fused
from fastformer.nn.norm import is_plain_dropout
from fastformer.nn.parts import has_hooks
from fastformer.nn.recording import is_recording
from fastformer.ops.backend import backend_for
from fastformer.ops.encoder_layer import encoder_layer, why_not
from fastformer.ops.encoder_passes import LayerParameters, LayerSettings, LayerTokens
from fastformer.ops.random import drawn_together


@dataclass(frozen=True)
class LayerTable:
    """Names of a layer's parts, as dotted paths from it.

    Attributes:
        attention: module with the projections, whose table names them.
        out, norm, dropout: what follows attention; dropout None: none.
        up, activation, down, last_norm, last_dropout: the feed-forward part; last_dropout None: none.
        inside: modules that a call of the whole layer goes around.
        counted: names in the counters that the parts have.
    """

    attention: str
    out: str
    norm: str
    dropout: str | None
    up: str
    activation: str
    down: str
    last_norm: str
    last_dropout: str | None
    inside: tuple[str, ...]
    counted: tuple[str, ...]


class EncoderLayer:
    """Forward of a layer as one operation, or with the seeds of its three dropouts drawn at once."""

    _table: ClassVar[LayerTable]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self._in_parts(*args, **kwargs)
        call = batch.named_arguments(self, args, kwargs)
        hidden, plan = call.pop("hidden_states", None), call.pop("attention_mask", None)
        # Before transformers 5 output_attentions comes along as False.
        asks = any(value is not None and value is not False for value in call.values())
        whole = isinstance(hidden, Tensor) and isinstance(plan, Plan) and not asks
        # `why_not` asks this too, but after all the parts were looked at one by one.
        whole = whole and backend_for(hidden.device) != "torch"
        with drawn_together(3):
            if whole and (parameters := self._parameters_of(hidden, plan)) is not None:
                for name in self._table.counted:
                    count_fused(name)
                out = self._as_one(hidden, plan, parameters)
                return (out,) if batch.returns_tuples() else out
            return self._in_parts(*args, **kwargs)

    def _in_parts(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)  # type: ignore[misc]

    def _as_one(self, hidden: Tensor, plan: Plan, parameters: LayerParameters) -> Tensor:
        table = self._table
        attention: Any = attrgetter(table.attention)(self)
        norm, last_norm = attrgetter(table.norm, table.last_norm)(self)
        dropouts = [None if name is None else attrgetter(name)(self) for name in (table.dropout, table.last_dropout)]
        p, last_p = (0.0 if dropout is None else dropout.p for dropout in dropouts)
        settings = LayerSettings(
            getattr(attention, attention._table.heads),
            getattr(attention, attention._table.dropout).p,
            p,
            last_p,
            norm.eps,
            last_norm.eps,
            _gelu(attrgetter(table.activation)(self)),
        )
        tokens = LayerTokens(mask=plan.mask)
        if plan.packing is not None:
            tokens = LayerTokens(plan.packing.cu_seqlens, plan.packing.max_seqlen)
        return encoder_layer(hidden, parameters, settings, tokens, self.training)  # type: ignore[attr-defined]

    def _parameters_of(self, hidden: Tensor, plan: Plan) -> LayerParameters | None:
        """The parameters, or None if the layer must run in parts."""
        table = self._table
        attention: Any = attrgetter(table.attention)(self)
        if plan.weights is not None or plan.keys is not None or plan.causal is not None or plan.window is not None:
            return None
        if is_recording() or not isinstance(attention, SelfAttention):
            return None
        parts = [attrgetter(name)(self) for name in table.inside]
        if any(map(batch.is_changed, parts)) or any(map(_is_chunked, (self, *parts))):
            return None
        names = attention._table.projections
        out, up, down = linears = attrgetter(table.out, table.up, table.down)(self)
        if not all(is_plain_linear(linear) and linear.bias is not None for linear in linears):
            return None
        norm, last_norm = attrgetter(table.norm, table.last_norm)(self)
        dropout, last_dropout = (
            None if name is None else attrgetter(name)(self) for name in (table.dropout, table.last_dropout)
        )
        if not fusable(norm, dropout) or not fusable(last_norm, last_dropout):
            return None
        # One training flag speaks for all three dropouts.
        dropouts = [d for d in (getattr(attention, attention._table.dropout), dropout, last_dropout) if d is not None]
        if not all(is_plain_dropout(d) and d.training == self.training for d in dropouts):  # type: ignore[attr-defined]
            return None
        if norm.weight is None or last_norm.weight is None or not _gelu(attrgetter(table.activation)(self)):
            return None
        if not lie_side_by_side(attention, names, hidden):
            return None
        projections = [getattr(attention, name) for name in names]
        if projections[0].bias is None:
            return None
        found: list[Any] = [p.weight for p in projections] + [p.bias for p in projections]
        for part in (out, norm, up, down, last_norm):
            found += (part.weight, part.bias)
        parameters = LayerParameters(*found)
        return None if why_not(hidden, parameters) else parameters


def _is_chunked(part: Any) -> bool:
    """Whether a module runs its feed-forward part over pieces of the sequence, which saves memory."""
    return bool(getattr(part, "chunk_size_feed_forward", 0))


# Classes of transformers' activations that compute GELU by tanh, each in its own way.
_TANH = ("NewGELUActivation", "GELUTanh", "PytorchGELUTanh", "FastGELUActivation")


def _gelu(activation: Any) -> str:
    """ "gelu" or "gelu_tanh", if a module or function computes it, else ""."""
    if activation is F.gelu:
        return "gelu"
    if not isinstance(activation, torch.nn.Module) or has_hooks(activation):
        return ""
    name = type(activation).__name__
    if type(activation) is torch.nn.GELU:
        return "gelu" if activation.approximate == "none" else "gelu_tanh"
    if name == "GELUActivation" and getattr(activation, "act", None) is F.gelu:
        return "gelu"
    return "gelu_tanh" if name in _TANH and type(activation).__module__ == "transformers.activations" else ""
