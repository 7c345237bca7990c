"""Forward and backward of `fastformer.ops.encoder_layer`: which kernels run, in which order, and what is kept.

The residual stream has the hidden states' dtype; products may have a lower one. Then

- one launch rounds the input and the parameters to the products' dtype,
- norms read the branch in that dtype and the residual in its own, and write their result in both,
- gradients of parameters are summed in fp32 and stored in the parameters' dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastformer.ops.attention.kernel import make_call
from fastformer.ops.operator import kernels, on_its_device
from fastformer.ops.random import drop_numbers

# Products that fill the device so often are formed one by one: PyTorch's then use it as well, and faster.
MOST_WAVES = 8.0
# Elements of the feed-forward part's activations up to which all is kept for backward. Beyond, memory counts and a few
# launches no longer do: activations are made again from what went in (four widths of a token's 16), and so are the sum
# and the norm after attention (two), by attention's output product, a twelfth of forward's.
MOST_KEPT = 1 << 23


class LayerParameters(NamedTuple):
    """Weights (out, in) and biases of a layer of width D with feed-forward width F.

    query, key and value: (D, D) each, side by side in memory, their biases likewise. norms' biases may be None.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    query_bias: Tensor
    key_bias: Tensor
    value_bias: Tensor
    out: Tensor
    out_bias: Tensor
    norm: Tensor
    norm_bias: Tensor | None
    up: Tensor
    up_bias: Tensor
    down: Tensor
    down_bias: Tensor
    last_norm: Tensor
    last_norm_bias: Tensor | None


@dataclass(frozen=True)
class LayerSettings:
    """What a layer is beside its parameters.

    Attributes:
        heads: attention heads.
        attention_dropout, dropout, last_dropout: probabilities, of attention's weights and of the two branches.
        eps, last_eps: of the norms.
        activation: "gelu" or "gelu_tanh".
    """

    heads: int
    attention_dropout: float
    dropout: float
    last_dropout: float
    eps: float
    last_eps: float
    activation: str = "gelu"


class LayerTokens(NamedTuple):
    """Which tokens of (B, S, D) attend to each other: those of a sequence of a packed row (1, T, D) or of a padded one.

    cu_seqlens: int32 (sequences + 1,) and max_seqlen of a packed row, else None and 0.
    mask: bool (B, S), True at real keys of a padded batch, or None.
    """

    cu_seqlens: Tensor | None = None
    max_seqlen: int = 0
    mask: Tensor | None = None


class LayerCall(NamedTuple):
    """One call of a layer, beside the tensors that take gradients.

    dropout: the three probabilities, 0 where it is off. seeds: theirs, None where the probability is 0.
    dtype: of the products.
    """

    settings: LayerSettings
    tokens: LayerTokens
    dropout: tuple[float, float, float]
    seeds: Sequence[Tensor | None]
    dtype: torch.dtype


class Factors(NamedTuple):
    """What goes into the products, in their dtype: the layer's input (T, D), weights and biases, those of query, key
    and value as one."""

    x: Tensor
    qkv: Tensor
    qkv_bias: Tensor
    out: Tensor
    out_bias: Tensor
    up: Tensor
    down: Tensor
    down_bias: Tensor


class Kept(NamedTuple):
    """What backward needs of forward: results in the order they are made. lower: `Factors` that were rounded."""

    qkv: Tensor
    mixed: Tensor
    lse: Tensor
    z: Tensor | None
    stats: Tensor | None
    y: Tensor | None
    wide: Tensor
    active: Tensor | None
    last_z: Tensor
    last_stats: Tensor
    lower: Sequence[Tensor | None]


def _joined(first: Tensor, count: int) -> Tensor:
    """Tensors that lie side by side, from the first of them, as one."""
    return first.detach().as_strided((count * first.shape[0], *first.shape[1:]), first.stride())


def _factors(x: Tensor, p: LayerParameters) -> Factors:
    return Factors(
        x, _joined(p.query, 3), _joined(p.query_bias, 3), p.out, p.out_bias, p.up, p.down, p.down_bias
    )  # fmt: skip


def _split(qkv: Tensor, heads: int, tokens: LayerTokens) -> tuple[Tensor, Tensor, Tensor]:
    """Views of (B, S, 3 D) as attention's kernels take them: (T, H, head_dim) of a packed row, else (B, H, S, ...)."""
    parts = qkv.unflatten(-1, (3, heads, -1))
    q, k, v = parts.squeeze(0).unbind(1) if tokens.cu_seqlens is not None else parts.transpose(1, 3).unbind(2)
    return q, k, v


def _attention_call(qkv: Tensor, call: LayerCall) -> Any:
    tokens = call.tokens
    q, k, v = _split(qkv, call.settings.heads, tokens)
    mask = None if tokens.mask is None else tokens.mask[:, None, None, :]
    lengths, longest = tokens.cu_seqlens, tokens.max_seqlen
    numbers = (longest, longest, call.dropout[0], False, q.shape[-1] ** -0.5, False, -1, -1, 0.0)
    return make_call((q, k, v, lengths, lengths, mask, None, None, call.seeds[0]), numbers)


def _rows(mixed: Tensor, x: Tensor, tokens: LayerTokens) -> Tensor:
    """Attention's output as rows like x's; tokens lie outside heads in memory, so nothing is copied."""
    return (mixed if tokens.cu_seqlens is not None else mixed.transpose(1, 2)).reshape(x.shape)


def _activated(wide: Tensor, bias: Tensor, kind: str) -> Tensor:
    return kernels("activation").activation_forward(wide, None, bias, None, None, 0, 1.0, kind, wide.dtype)


@on_its_device
def forward(
    hidden: Tensor, parameters: LayerParameters, call: LayerCall, keep: bool = False
) -> tuple[Tensor, Kept | None]:
    """The output, and what backward needs if `keep`."""
    p, settings, norm = parameters, call.settings, kernels("norm").norm_forward
    x = hidden.reshape(-1, hidden.shape[-1])
    stream, dtype = x.dtype, call.dtype
    f = _factors(x, p)
    if dtype != stream:
        f = Factors(*kernels("casting").cast(f, dtype))
    qkv = torch.addmm(f.qkv_bias, f.x, f.qkv.t())
    mixed, lse = kernels("attention.forward").attention_forward(_attention_call(qkv.view(*hidden.shape[:2], -1), call))
    branch = torch.addmm(f.out_bias, _rows(mixed, x, call.tokens), f.out.t())
    numbers = (0.0, False, stream, stream, keep)
    lower = None if dtype == stream else torch.empty_like(branch)
    drop = (call.seeds[1], *drop_numbers(call.dropout[1]))
    y, z, stats = norm(branch, x, p.norm, p.norm_bias, None, *drop, settings.eps, *numbers, lower)
    entry = y if lower is None else lower
    wide = torch.mm(entry, f.up.t())
    active = _activated(wide, p.up_bias, settings.activation)
    branch = torch.addmm(f.down_bias, active, f.down.t())
    drop = (call.seeds[2], *drop_numbers(call.dropout[2]))
    out, last_z, last_stats = norm(branch, y, p.last_norm, p.last_norm_bias, None, *drop, settings.last_eps, *numbers)
    out = out.view(hidden.shape)
    if not keep:
        return out, None
    small = wide.numel() <= MOST_KEPT
    # The input can be rounded again, too; biases take no part in backward.
    rounded = () if dtype == stream else (f.x if small else None, f.qkv, f.out, f.up, f.down)
    kept = Kept(qkv, mixed, lse, z, stats, entry, wide, active, last_z, last_stats, rounded)
    return out, kept if small else kept._replace(z=None, stats=None, y=None, active=None)


def _attended(hidden: Tensor, p: LayerParameters, call: LayerCall, kept: Kept, w_out: Tensor) -> Kept:
    """`kept` with the sum and the norm after attention, made as forward made them."""
    x, bias = hidden.reshape(-1, hidden.shape[-1]), p.out_bias.to(call.dtype)
    branch = torch.addmm(bias, _rows(kept.mixed, x, call.tokens), w_out.t())
    lower = None if call.dtype == x.dtype else torch.empty_like(branch)
    drop = (call.seeds[1], *drop_numbers(call.dropout[1]))
    y, z, stats = kernels("norm").norm_forward(
        branch, x, p.norm, p.norm_bias, None, *drop, call.settings.eps, 0.0, False, x.dtype, x.dtype, True, lower
    )
    return kept._replace(z=z, stats=stats, y=y if lower is None else lower)


def backward(
    grad: Tensor,
    hidden: Tensor,
    parameters: LayerParameters,
    call: LayerCall,
    kept: Kept,
    needs_hidden: bool,
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of the input and of the parameters, None where none is needed."""
    p, settings, tokens = parameters, call.settings, call.tokens
    needs: Any = LayerParameters(*needed)  # type: ignore[arg-type]
    x = hidden.reshape(-1, hidden.shape[-1])
    stream, dtype, norm = x.dtype, call.dtype, kernels("norm_backward").norm_backward_rows
    lower, y, wide, active = dtype != stream, kept.y, kept.wide, kept.active
    weights: tuple[Any, ...] = (_joined(p.query, 3), p.out, p.up, p.down)
    if lower:
        x, *weights = kept.lower  # type: ignore[assignment]
    w_qkv, w_out, w_up, w_down = weights
    if kept.y is None:
        kept = _attended(hidden, p, call, kept, w_out)
        y = kept.y
    assert y is not None
    assert kept.z is not None

    def kinds(weight: Tensor, bias: Tensor | None, wants_weight: Any, wants_bias: Any) -> tuple[Any, ...]:
        return weight.dtype if wants_weight else None, bias.dtype if bias is not None and wants_bias else None

    # Two tensors of a norm's gradient, though without dropout they may be alike: one becomes a sum in place.
    numbers = (0.0, False, dtype, stream)
    last_kinds = kinds(p.last_norm, p.last_norm_bias, needs.last_norm, needs.last_norm_bias)
    drop = (call.seeds[2], *drop_numbers(call.dropout[2]))
    (d_down, d_y), last_partial = norm(
        grad.reshape(-1, grad.shape[-1]), None, kept.last_z, kept.last_stats, p.last_norm, None, *drop,
        *numbers, *last_kinds,
    )  # fmt: skip
    d_active = torch.mm(d_down, w_down)
    (d_up,) = kernels("activation").activation_backward(
        d_active, wide, None, p.up_bias, None, 0, 1.0, settings.activation, dtype, None, None
    )
    more = torch.mm(d_up, w_up) if lower else None
    if more is None:
        d_y.addmm_(d_up, w_up)
    norm_kinds = kinds(p.norm, p.norm_bias, needs.norm, needs.norm_bias)
    drop = (call.seeds[1], *drop_numbers(call.dropout[1]))
    (d_out, d_x), partial = norm(
        d_y, None, kept.z, kept.stats, p.norm, None, *drop, *numbers, *norm_kinds, dy_more=more
    )
    d_qkv = torch.empty_like(kept.qkv)
    if needs_hidden or any(needs[:6]):
        shape = (*hidden.shape[:2], -1)
        d_mixed = torch.mm(d_out, w_out).view(*shape[:2], settings.heads, -1)
        d_mixed = d_mixed.squeeze(0) if tokens.cu_seqlens is not None else d_mixed.transpose(1, 2)
        into = _split(d_qkv.view(shape), settings.heads, tokens)
        kernels("attention.backward").attention_backward(
            _attention_call(kept.qkv.view(shape), call), kept.mixed, kept.lse, d_mixed, None, into
        )
        if needs_hidden and lower:
            d_x += torch.mm(d_qkv, w_qkv)
        elif needs_hidden:
            d_x.addmm_(d_qkv, w_qkv)
    if active is None and needs.down:
        active = _activated(wide, p.up_bias, settings.activation)
    if x is None and any(needs[:3]):
        x = hidden.reshape(-1, hidden.shape[-1]).to(dtype)
    linears = (
        (d_qkv, x, any(needs[:3]), any(needs[3:6])),
        (d_out, _rows(kept.mixed, y, tokens), needs.out, needs.out_bias),
        (d_up, y, needs.up, needs.up_bias),
        (d_down, active, needs.down, needs.down_bias),
    )
    (qkv_grads, out_grads, up_grads, down_grads), (norm_grads, last_grads) = _of_parameters(
        linears, ((partial, norm_kinds), (last_partial, last_kinds)), p.query.dtype
    )
    thirds, bias_thirds = (
        [None] * 3 if found is None else [part if n else None for part, n in zip(found.chunk(3), which, strict=True)]
        for found, which in zip(qkv_grads, (needs[:3], needs[3:6]), strict=True)
    )
    return [
        d_x.view(hidden.shape) if needs_hidden else None,
        *thirds, *bias_thirds, *out_grads, *norm_grads, *up_grads, *down_grads, *last_grads,
    ]  # fmt: skip


def _of_parameters(
    linears: Sequence[tuple[Tensor, Any, Any, Any]],
    norms: Sequence[tuple[Tensor | None, tuple[torch.dtype | None, torch.dtype | None]]],
    dtype: torch.dtype,
) -> tuple[list[list[Tensor | None]], list[list[Tensor | None]]]:
    """(weight's, bias's) gradients of linear layers and of norms, None where none is wanted.

    Args:
        linears: (dY, X, whether weight's is wanted, whether bias's).
        norms: (partial rows, dtypes wanted).
        dtype: of the linear layers' gradients.
    """
    gradients, rows = kernels("gradients"), kernels("rows")
    source = linears[0][0]
    sizes = [(dy.shape[1], x.shape[1]) for dy, x, wanted, _ in linears if wanted]
    joined = source.dtype != torch.float32 and gradients.waves(source.device, sizes) <= MOST_WAVES
    of_linears: list[list[Tensor | None]] = []
    of_norms: list[list[Tensor | None]] = []
    products, sums, partials = [], [], []
    for dy, x, wants_weight, wants_bias in linears:
        weight = bias = None
        if wants_weight and joined:
            weight = dy.new_empty((dy.shape[1], x.shape[1]), dtype=dtype)
            products.append((dy, x, weight))
        elif wants_weight:
            weight = torch.mm(dy.t(), x)
        if wants_bias:
            bias = dy.new_empty(dy.shape[1], dtype=dtype)
            sums.append((dy, bias))
        of_linears.append([weight, bias])
    alone = [i for i, (weight, _) in enumerate(of_linears) if weight is not None and weight.dtype != dtype]
    if alone:
        casts = kernels("casting").cast([of_linears[i][0] for i in alone], dtype)
        for i, weight in zip(alone, casts, strict=True):
            of_linears[i][0] = weight
    for partial, dtypes in norms:
        wanted = [d for d in dtypes if d is not None]
        if partial is None:
            found = []
        elif len(wanted) == 2 and len({*wanted, *norms[0][1]}) == 1:
            found = [torch.empty(partial.shape[1], dtype=d, device=source.device) for d in wanted]
            partials.append((partial, *found))
        else:
            add = rows.sum_partials(rows.target(partial), partial.device, *partial.shape, tuple(wanted))
            found = add(partial)
        each = iter(found)
        of_norms.append([None if d is None else next(each) for d in dtypes])
    gradients.parameter_gradients(products, sums, partials)
    return of_linears, of_norms
