"""A whole post-norm encoder layer (Vaswani et al. 2017) as one operation of autograd's, for training steps whose
kernels take longer to launch than to run.

    q, k, v = x Wqkv^T + bqkv
    y   = norm(x + dropout(attention(q, k, v) Wo^T + bo))
    out = norm(y + dropout(gelu(y Wi^T + bi) Wf^T + bf))

The arithmetic is that of the separate operators (`separate`, which is also its second derivative). What knowing the
whole layer saves is launches between them:

- The gradients of queries, keys and values are written side by side, as one factor of their projection's products.
- The two gradients that meet at a residual are added by the product that makes the second one.
- Biases lie in epilogues. The gradients of all parameters, sums over rows included, come from one launch
  (`fastformer.kernels.gradients`) where products are too small to fill the device one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from fastformer.ops.activation import bias_gelu
from fastformer.ops.attention.dense import scaled_dot_product_attention
from fastformer.ops.attention.kernel import make_call
from fastformer.ops.attention.varlen import attention_varlen
from fastformer.ops.backend import autocasts, backend_for
from fastformer.ops.norm import add_layer_norm
from fastformer.ops.operator import differentiate, is_plain, kernels, on_its_device
from fastformer.ops.random import draw_seed, drop_numbers
from fastformer.ops.validate import FLOATS

# Products that fill the device so often are formed one by one: PyTorch's then use it as well, and faster.
MOST_WAVES = 8.0
# Elements of the feed-forward part's activations that are kept for backward. More are made again from what went in:
# their memory counts (a quarter of a layer's), and one more launch no longer does.
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
    """

    heads: int
    attention_dropout: float
    dropout: float
    last_dropout: float
    eps: float
    last_eps: float


class LayerTokens(NamedTuple):
    """Which tokens of (B, S, D) attend to each other: those of a sequence of a packed row (1, T, D) or of a padded one.

    cu_seqlens: int32 (sequences + 1,) and max_seqlen of a packed row, else None and 0.
    mask: bool (B, S), True at real keys of a padded batch, or None.
    """

    cu_seqlens: Tensor | None = None
    max_seqlen: int = 0
    mask: Tensor | None = None


def why_not(hidden: Tensor, parameters: LayerParameters) -> str:
    """Why a layer must run as separate operators, or ""."""
    if torch.compiler.is_compiling() or not is_plain((hidden, *parameters)) or forward_ad._current_level >= 0:
        return "torch.compile, torch.func or tensors of another class"
    if backend_for(hidden.device) == "torch":
        return "no Triton kernels on this device"
    if autocasts(hidden.device):
        return "autocast"
    if hidden.dtype not in FLOATS or not hidden.numel():
        return "a dtype without kernels, or no tokens"
    p = parameters
    weights = (p.query, p.key, p.value, p.out, p.up, p.down)
    if any(w.dtype != hidden.dtype or not w.is_contiguous() or w.device != hidden.device for w in weights):
        return "parameters of another dtype, layout or device than the input's"
    return ""


def encoder_layer(
    hidden: Tensor, parameters: LayerParameters, settings: LayerSettings, tokens: LayerTokens, training: bool
) -> Tensor:
    """The layer's output for (B, S, D), the same shape and dtype; `why_not` must have had nothing against it.

    Draws one dropout seed for each of the three dropouts that are on, in the order of the module's docstring.
    """
    on = (settings.attention_dropout, settings.dropout, settings.last_dropout) if training else (0.0, 0.0, 0.0)
    seeds = tuple(draw_seed(hidden.device) if p else None for p in on)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, *parameters)):
        return _Layer.apply(hidden, settings, tokens, on, seeds, *parameters)
    return _forward(hidden, parameters, settings, tokens, on, seeds)[0]


def separate(
    hidden: Tensor,
    parameters: LayerParameters,
    settings: LayerSettings,
    tokens: LayerTokens,
    dropout: Sequence[float],
    seeds: Sequence[Tensor | None],
) -> Tensor:
    """The layer from separate operators, each of which has a second derivative.

    Args:
        dropout: the three probabilities. seeds: theirs, None where the probability is 0.
    """
    p, shape = parameters, (settings.heads, -1)
    linears = ((p.query, p.query_bias), (p.key, p.key_bias), (p.value, p.value_bias))
    q, k, v = (F.linear(hidden, weight, bias).unflatten(-1, shape) for weight, bias in linears)
    options: dict[str, Any] = {"dropout_p": dropout[0], "dropout_seed": seeds[0]}
    if tokens.cu_seqlens is not None:
        q, k, v = (x.squeeze(0) for x in (q, k, v))
        lengths, longest = tokens.cu_seqlens, tokens.max_seqlen
        mixed: Any = attention_varlen(q, k, v, lengths, lengths, longest, longest, **options)
        mixed = mixed[None]
    else:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        mask = None if tokens.mask is None else tokens.mask[:, None, None, :]
        mixed = scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)
        mixed = mixed.transpose(1, 2)
    branch = F.linear(mixed.flatten(2), p.out, p.out_bias)
    y: Any = add_layer_norm(
        branch, hidden, p.norm, p.norm_bias, settings.eps, dropout[1], training=True, dropout_seed=seeds[1]
    )
    branch = F.linear(bias_gelu(F.linear(y, p.up), p.up_bias), p.down, p.down_bias)
    out: Any = add_layer_norm(
        branch, y, p.last_norm, p.last_norm_bias, settings.last_eps, dropout[2], training=True, dropout_seed=seeds[2]
    )
    return out


def _joined(first: Tensor, count: int) -> Tensor:
    """Tensors that lie side by side, from the first of them, as one."""
    return first.detach().as_strided((count * first.shape[0], *first.shape[1:]), first.stride())


def _split(qkv: Tensor, heads: int, tokens: LayerTokens) -> tuple[Tensor, Tensor, Tensor]:
    """Views of (B, S, 3 D) as attention's kernels take them: (T, H, head_dim) of a packed row, else (B, H, S, ...)."""
    parts = qkv.unflatten(-1, (3, heads, -1))
    q, k, v = parts.squeeze(0).unbind(1) if tokens.cu_seqlens is not None else parts.transpose(1, 3).unbind(2)
    return q, k, v


def _attention_call(qkv: Tensor, seed: Tensor | None, p: float, heads: int, tokens: LayerTokens) -> Any:
    q, k, v = _split(qkv, heads, tokens)
    mask = None if tokens.mask is None else tokens.mask[:, None, None, :]
    lengths, longest = tokens.cu_seqlens, tokens.max_seqlen
    scale = q.shape[-1] ** -0.5
    return make_call(
        (q, k, v, lengths, lengths, mask, None, None, seed), (longest, longest, p, False, scale, False, -1, -1, 0.0)
    )


def _rows(mixed: Tensor, x: Tensor, tokens: LayerTokens) -> Tensor:
    """Attention's output as rows like x's; tokens lie outside heads in memory, so nothing is copied."""
    return (mixed if tokens.cu_seqlens is not None else mixed.transpose(1, 2)).reshape(x.shape)


@on_its_device
def _forward(
    hidden: Tensor,
    parameters: LayerParameters,
    settings: LayerSettings,
    tokens: LayerTokens,
    dropout: Sequence[float],
    seeds: Sequence[Tensor | None],
    keep: bool = False,
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The output, and what backward needs if `keep`."""
    p, norm = parameters, kernels("norm").norm_forward
    x = hidden.reshape(-1, hidden.shape[-1])
    dtype = x.dtype
    qkv = torch.addmm(_joined(p.query_bias, 3), x, _joined(p.query, 3).t())
    call = _attention_call(qkv.view(*hidden.shape[:2], -1), seeds[0], dropout[0], settings.heads, tokens)
    mixed, lse = kernels("attention.forward").attention_forward(call)
    flat = _rows(mixed, x, tokens)
    branch = torch.addmm(p.out_bias, flat, p.out.t())
    numbers = (0.0, False, dtype, dtype, keep)
    y, z, stats = norm(
        branch, x, p.norm, p.norm_bias, None, seeds[1], *drop_numbers(dropout[1]), settings.eps, *numbers
    )
    wide = torch.mm(y, p.up.t())
    active = _activated(wide, p)
    branch = torch.addmm(p.down_bias, active, p.down.t())
    out, last_z, last_stats = norm(
        branch, y, p.last_norm, p.last_norm_bias, None, seeds[2], *drop_numbers(dropout[2]), settings.last_eps, *numbers
    )
    kept_active = active if wide.numel() <= MOST_KEPT else None
    kept = (x, qkv, mixed, lse, y, z, stats, wide, kept_active, last_z, last_stats) if keep else ()
    return out.view(hidden.shape), kept


def _activated(wide: Tensor, p: LayerParameters) -> Tensor:
    return kernels("activation").activation_forward(wide, None, p.up_bias, None, None, 0, 1.0, "gelu", wide.dtype)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        settings: LayerSettings,
        tokens: LayerTokens,
        dropout: Sequence[float],
        seeds: Sequence[Tensor | None],
        *parameters: Any,
    ) -> Tensor:
        out, kept = _forward(hidden, LayerParameters(*parameters), settings, tokens, dropout, seeds, True)
        ctx.save_for_backward(hidden, tokens.cu_seqlens, tokens.mask, *seeds, *parameters, *kept)
        ctx.facts = settings, tokens.max_seqlen, dropout
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, cu_seqlens, mask, *rest = ctx.saved_tensors
        settings, longest, dropout = ctx.facts
        seeds, parameters, kept = rest[:3], LayerParameters(*rest[3:19]), rest[19:]
        tokens = LayerTokens(cu_seqlens, longest, mask)
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[5:])
        if torch.is_grad_enabled():

            def reference(hidden: Tensor, *parameters: Any) -> Tensor:
                return separate(hidden, LayerParameters(*parameters), settings, tokens, dropout, seeds)

            first, *others = differentiate("encoder_layer", reference, (hidden, *parameters), (grad,))
        else:
            first, *others = _backward(grad, parameters, settings, tokens, dropout, seeds, kept, *needs)
        return first, None, None, None, None, *others


def _backward(
    grad: Tensor,
    parameters: LayerParameters,
    settings: LayerSettings,
    tokens: LayerTokens,
    dropout: Sequence[float],
    seeds: Sequence[Tensor | None],
    kept: Sequence[Any],
    needs_hidden: bool,
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of the input and of the parameters, None where none is needed."""
    x, qkv, mixed, lse, y, z, stats, wide, active, last_z, last_stats = kept
    p = parameters
    needs: Any = LayerParameters(*needed)  # type: ignore[arg-type]
    dtype, norm = x.dtype, kernels("norm_backward").norm_backward_rows

    def kinds(weight: Tensor, bias: Tensor | None, wants_weight: Any, wants_bias: Any) -> tuple[Any, ...]:
        return weight.dtype if wants_weight else None, bias.dtype if bias is not None and wants_bias else None

    # Two tensors of a norm's gradient, though without dropout they are alike: one becomes a sum in place.
    last_kinds = kinds(p.last_norm, p.last_norm_bias, needs.last_norm, needs.last_norm_bias)
    (d_down, d_y), last_partial = norm(
        grad.reshape(x.shape), None, last_z, last_stats, p.last_norm, None, seeds[2], *drop_numbers(dropout[2]),
        0.0, False, dtype, dtype, *last_kinds,
    )  # fmt: skip
    d_active = torch.mm(d_down, p.down)
    (d_up,) = kernels("activation").activation_backward(
        d_active, wide, None, p.up_bias, None, 0, 1.0, "gelu", dtype, None, None
    )
    d_y.addmm_(d_up, p.up)
    norm_kinds = kinds(p.norm, p.norm_bias, needs.norm, needs.norm_bias)
    (d_out, d_x), partial = norm(
        d_y, None, z, stats, p.norm, None, seeds[1], *drop_numbers(dropout[1]), 0.0, False, dtype, dtype, *norm_kinds
    )
    d_qkv = torch.empty_like(qkv)
    if needs_hidden or any(needs[:6]):
        shape = (*grad.shape[:2], -1)
        call = _attention_call(qkv.view(shape), seeds[0], dropout[0], settings.heads, tokens)
        d_mixed = torch.mm(d_out, p.out).view(*grad.shape[:2], settings.heads, -1)
        d_mixed = d_mixed.squeeze(0) if tokens.cu_seqlens is not None else d_mixed.transpose(1, 2)
        into = _split(d_qkv.view(shape), settings.heads, tokens)
        kernels("attention.backward").attention_backward(call, mixed, lse, d_mixed, None, into)
        if needs_hidden:
            d_x.addmm_(d_qkv, _joined(p.query, 3))
    if active is None and needs.down:
        active = _activated(wide, p)
    linears = (
        (d_qkv, x, any(needs[:3]), any(needs[3:6])),
        (d_out, _rows(mixed, x, tokens), needs.out, needs.out_bias),
        (d_up, y, needs.up, needs.up_bias),
        (d_down, wide if active is None else active, needs.down, needs.down_bias),
    )
    (qkv_grads, out_grads, up_grads, down_grads), (norm_grads, last_grads) = _of_parameters(
        linears, ((partial, norm_kinds), (last_partial, last_kinds))
    )
    weights, biases = (
        [None] * 3 if found is None else [part if n else None for part, n in zip(found.chunk(3), which, strict=True)]
        for found, which in zip(qkv_grads, (needs[:3], needs[3:6]), strict=True)
    )
    return [
        d_x.view(grad.shape) if needs_hidden else None,
        *weights, *biases, *out_grads, *norm_grads, *up_grads, *down_grads, *last_grads,
    ]  # fmt: skip


def _of_parameters(
    linears: Sequence[tuple[Tensor, Tensor, Any, Any]],
    norms: Sequence[tuple[Tensor | None, tuple[torch.dtype | None, torch.dtype | None]]],
) -> tuple[list[list[Tensor | None]], list[list[Tensor | None]]]:
    """(weight's, bias's) gradients of linear layers and of norms, None where none is wanted.

    Args:
        linears: (dY, X, whether weight's is wanted, whether bias's).
        norms: (partial rows, dtypes wanted).
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
        if joined:
            if wants_weight:
                weight = dy.new_empty((dy.shape[1], x.shape[1]))
                products.append((dy, x, weight))
            if wants_bias:
                bias = dy.new_empty(dy.shape[1])
                sums.append((dy, bias))
        else:
            weight = torch.mm(dy.t(), x) if wants_weight else None
            bias = dy.sum(0) if wants_bias else None
        of_linears.append([weight, bias])
    for partial, dtypes in norms:
        wanted = [dtype for dtype in dtypes if dtype is not None]
        if partial is None:
            found = []
        elif joined and len(wanted) == 2 and wanted == [d for d in norms[0][1] if d is not None]:
            found = [torch.empty(partial.shape[1], dtype=dtype, device=source.device) for dtype in wanted]
            partials.append((partial, *found))
        else:
            add = rows.sum_partials(rows.target(partial), partial.device, *partial.shape, tuple(wanted))
            found = add(partial)
        each = iter(found)
        of_norms.append([None if dtype is None else next(each) for dtype in dtypes])
    gradients.parameter_gradients(products, sums, partials)
    return of_linears, of_norms
