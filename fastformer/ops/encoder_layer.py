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
- Under autocast one launch rounds the fp32 parameters and the input; autocast itself rounds each by a launch of its
  own, and each gradient back. The residual stream and norms stay fp32, as in a stock layer.

What runs stands in `fastformer.ops.encoder_passes`.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from fastformer.ops.activation import bias_gelu
from fastformer.ops.attention.dense import scaled_dot_product_attention
from fastformer.ops.attention.varlen import attention_varlen
from fastformer.ops.backend import autocast_off, autocasts, backend_for
from fastformer.ops.encoder_passes import (
    Kept,
    LayerCall,
    LayerParameters,
    LayerSettings,
    LayerTokens,
    backward,
    forward,
)
from fastformer.ops.norm import add_layer_norm
from fastformer.ops.operator import differentiate, is_plain
from fastformer.ops.random import draw_seed
from fastformer.ops.validate import FLOATS


def why_not(hidden: Tensor, parameters: LayerParameters) -> str:
    """Why a layer must run as separate operators, or ""."""
    if torch.compiler.is_compiling() or not is_plain((hidden, *parameters)) or forward_ad._current_level >= 0:
        return "torch.compile, torch.func or tensors of another class"
    if backend_for(hidden.device) == "torch":
        return "no Triton kernels on this device"
    if hidden.dtype not in FLOATS or not hidden.numel():
        return "a dtype without kernels, or no tokens"
    p = parameters
    weights = (p.query, p.key, p.value, p.out, p.up, p.down)
    if any(w.dtype != hidden.dtype or not w.is_contiguous() or w.device != hidden.device for w in weights):
        return "parameters of another dtype, layout or device than the input's"
    if autocasts(hidden.device) and hidden.dtype != torch.float32:
        return "autocast of what is not float32"
    biases = (p.query_bias, p.key_bias, p.value_bias, p.out_bias, p.up_bias, p.down_bias)
    if any(b.dtype != hidden.dtype or not b.is_contiguous() for b in biases):
        return "biases of another dtype than the weights', or strided"
    return ""


def encoder_layer(
    hidden: Tensor, parameters: LayerParameters, settings: LayerSettings, tokens: LayerTokens, training: bool
) -> Tensor:
    """The layer's output for (B, S, D), the same shape and dtype; `why_not` must have had nothing against it.

    Draws one dropout seed for each of the three dropouts that are on, in the order of the module's docstring. Under
    autocast products are formed in its dtype.
    """
    device = hidden.device
    on = (settings.attention_dropout, settings.dropout, settings.last_dropout) if training else (0.0, 0.0, 0.0)
    seeds = tuple(draw_seed(device) if p else None for p in on)
    dtype = torch.get_autocast_dtype(device.type) if autocasts(device) else hidden.dtype
    call = LayerCall(settings, tokens, on, seeds, dtype)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, *parameters)):
        return _Layer.apply(hidden, call, *parameters)
    return forward(hidden, parameters, call)[0]


def separate(hidden: Tensor, parameters: LayerParameters, call: LayerCall) -> Tensor:
    """The layer from separate operators, each of which has a second derivative."""
    settings, tokens, dropout, seeds, _ = call
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
    kind = "tanh" if settings.activation == "gelu_tanh" else "none"
    branch = F.linear(bias_gelu(F.linear(y, p.up), p.up_bias, approximate=kind), p.down, p.down_bias)
    out: Any = add_layer_norm(
        branch, y, p.last_norm, p.last_norm_bias, settings.last_eps, dropout[2], training=True, dropout_seed=seeds[2]
    )
    return out


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, call: LayerCall, *parameters: Any) -> Tensor:
        out, kept = forward(hidden, LayerParameters(*parameters), call, True)
        assert kept is not None
        (settings, tokens, dropout, seeds, dtype), (*others, lower) = call, kept
        ctx.save_for_backward(hidden, tokens.cu_seqlens, tokens.mask, *seeds, *parameters, *others, *lower)
        ctx.facts = settings, tokens.max_seqlen, dropout, dtype
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, cu_seqlens, mask, *rest = ctx.saved_tensors
        settings, longest, dropout, dtype = ctx.facts
        call = LayerCall(settings, LayerTokens(cu_seqlens, longest, mask), dropout, rest[:3], dtype)
        parameters, kept = LayerParameters(*rest[3:19]), Kept._make((*rest[19:29], rest[29:]))
        device, lower = hidden.device.type, dtype != hidden.dtype
        if torch.is_grad_enabled():

            def reference(hidden: Tensor, *parameters: Any) -> Tensor:
                return separate(hidden, LayerParameters(*parameters), call)

            with torch.autocast(device, dtype if lower else None, enabled=lower):
                first, *others = differentiate("encoder_layer", reference, (hidden, *parameters), (grad,))
        else:
            needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[2:])
            # Around a call of backward it would round factors that are not to be rounded.
            with autocast_off(device) if autocasts(hidden.device) else contextlib.nullcontext():
                first, *others = backward(grad, hidden, parameters, call, kept, *needs)
        return first, None, *others
