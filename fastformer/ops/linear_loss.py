"""Cross-entropy of a linear layer's output without ever holding all of its logits.

It walks over blocks of rows: logits of a block, their loss, their gradient over themselves, and that into the gradients
of input, weight and bias, all in forward; backward scales them. So one block's logits are the most there is at any time
(the idea of Liger, Hsu et al. 2024).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastformer.ops.backend import autocasts, backend_for
from fastformer.ops.loss import DTYPES, checked, cross_entropy
from fastformer.ops.loss_rows import LossOptions, compose, row_weights
from fastformer.ops.operator import Operator, differentiate, kernels
from fastformer.ops.validate import check_tensor

# Bytes of logits a block may hold, unless a twentieth of all logits is more: enough rows for the matrix products of a
# GPU; a CPU's need fewer, and its caches keep a small block.
BLOCK_BYTES = 2**28
BLOCK_BYTES_ON_CPU = 2**25
# What the logits' gradient is multiplied by in fp16: p - 1 stays far below 65504, p of a rare class above 6e-8.
HALF_UNIT = 256.0


def linear_cross_entropy(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """cross_entropy(linear(input, weight, bias), target) in the memory of a block of rows' logits.

    Args:
        input: (..., H).
        weight: (V, H); its gradient is summed over blocks in float32.
        bias: (V,) or None.
        class_weight: (V,), `weight` of `cross_entropy`.
        target and the rest: as in `cross_entropy`. "none" recomputes the logits in backward.

    Returns:
        as `cross_entropy`, of logits in the dtype `linear` would give them, which autocast decides.

    Raises:
        TypeError, ValueError: an argument of another type, dtype, shape, device or value.
    """
    options = checked(class_weight, ignore_index, reduction, label_smoothing, z_loss, softcap, "input", input, target)
    device = input.device
    check_tensor("weight", weight, dtypes=DTYPES, shape=(None, input.shape[-1]), device=device)
    classes = (weight.shape[0],)
    if classes == (0,):
        raise ValueError(f"weight must have at least one row, a class, got shape {tuple(weight.shape)}")
    if bias is not None:
        check_tensor("bias", bias, dtypes=DTYPES, shape=classes, device=device)
    if class_weight is not None:
        check_tensor("class_weight", class_weight, dtypes=DTYPES, shape=classes, device=device)
    out_dtype = input.dtype
    if autocasts(device) and input.dtype != torch.float64:
        out_dtype, dtype = torch.float32, torch.get_autocast_dtype(device.type)
        input, weight = input.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    elif weight.dtype != input.dtype or (bias is not None and bias.dtype != input.dtype):
        raise TypeError(f"weight and bias must be {input.dtype} like input, got {weight.dtype}")
    rows, goal = input.reshape(-1, input.shape[-1]), target.reshape(-1).contiguous()
    if reduction == "none":
        losses = [
            checkpoint(_block_losses, part, weight, bias, labels, class_weight, options, use_reentrant=False)
            for part, labels in _blocks(rows, goal, weight) or [(rows, goal)]
        ]
        return torch.cat(losses).reshape(target.shape).to(out_dtype)
    class_weight = None if class_weight is None else class_weight.contiguous()
    needed = tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in (input, weight, bias))
    loss, *_ = _linear_op(rows, weight, bias, goal, class_weight, reduction == "mean", *options, *needed)
    return loss.to(out_dtype)


def _blocks(rows: Tensor, goal: Tensor, weight: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Blocks of rows whose logits fit `BLOCK_BYTES`, or a twentieth of all logits if that is more."""
    count, row_bytes = rows.shape[0], weight.shape[0] * rows.element_size()
    most = min(BLOCK_BYTES, BLOCK_BYTES_ON_CPU) if rows.device.type == "cpu" else BLOCK_BYTES
    size = max(most // max(row_bytes, 1), count // 20, 1)
    if size > 128:
        size = size // 128 * 128
    return list(zip(rows.split(size), goal.split(size), strict=True)) if count else []


def _block_losses(
    rows: Tensor, weight: Tensor, bias: Tensor | None, goal: Tensor, class_weight: Tensor | None, options: LossOptions
) -> Tensor:
    ignore_index, smoothing, z_loss, softcap = options
    return cross_entropy(
        F.linear(rows, weight, bias), goal, class_weight, ignore_index, "none", smoothing,
        z_loss=z_loss, softcap=softcap or None,
    )  # fmt: skip


# The linear layer and its loss: an operator whose forward computes the gradients.


def _linear_forward(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    goal: Tensor,
    class_weight: Tensor | None,
    mean: bool,
    ignore_index: int,
    smoothing: float,
    z_loss: float,
    cap: float,
    needs_rows: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, gradients of rows, weight and bias, their factor for a unit gradient of the loss).

    Unneeded gradients are empty. In fp16 the gradients stand in fp32 and without 1 / rows: p / rows of a large
    vocabulary is below the least fp16 number, and the loss scale that should save it comes with backward only.
    """
    options = LossOptions(ignore_index, smoothing, z_loss, cap)
    wide = torch.promote_types(rows.dtype, torch.float32)
    loss = torch.zeros((), dtype=wide, device=rows.device)
    scale = torch.ones((), dtype=wide, device=rows.device)
    if mean:
        scale = 1.0 / row_weights(goal, class_weight, ignore_index).sum().to(wide)
    kept, inside, factor = rows.dtype, scale, torch.ones_like(scale)
    if rows.dtype == torch.float16:
        kept, inside, factor = wide, torch.full_like(scale, HALF_UNIT), scale / HALF_UNIT
    drows = rows.new_empty(rows.shape if needs_rows else 0, dtype=kept)
    dweight = torch.zeros(weight.shape if needs_weight else 0, dtype=wide, device=rows.device)
    dbias = torch.zeros(weight.shape[:1] if needs_bias else 0, dtype=wide, device=rows.device)
    start = 0
    for part, labels in _blocks(rows, goal, weight):
        logits = F.linear(part, weight, bias)
        losses, gradient = _block_gradient(
            logits, labels, class_weight, inside, options, needs_rows or needs_weight or needs_bias
        )
        loss += losses.sum()
        if needs_rows:
            _product(gradient, weight, drows[start : start + len(part)])
        if needs_weight:
            _accumulate(dweight, gradient.t(), part)
        if needs_bias:
            dbias += gradient.sum(0, dtype=wide)
        start += len(part)
    return loss * scale, drows, dweight.to(kept), dbias.to(kept), factor


def _block_gradient(
    logits: Tensor, goal: Tensor, class_weight: Tensor | None, scale: Tensor, options: LossOptions, needed: bool
) -> tuple[Tensor, Tensor]:
    """Losses of a block's rows, and the gradient of logits times `scale`, which may lie over logits."""
    if backend_for(logits.device) == "triton" and logits.dtype != torch.float64:
        launchers = kernels("loss")
        losses, row_weight, lse = launchers.cross_entropy_forward(logits, goal, class_weight, *options)
        if needed:
            dloss = scale.expand(len(logits))
            logits = launchers.cross_entropy_backward(
                dloss, logits, goal, class_weight, row_weight, lse, *options, True
            )
        return losses, logits
    return loss_reference(logits, goal, class_weight, scale, options, needed)


def loss_reference(
    logits: Tensor, goal: Tensor, class_weight: Tensor | None, scale: Tensor, options: LossOptions, needed: bool
) -> tuple[Tensor, Tensor]:
    """The kernels' formula in PyTorch: losses of rows, and the gradient of logits times `scale` if `needed`. Logits may
    be written over.

    Spelled out rather than differentiated, since a registered operator runs below autograd.
    """
    ignore_index, smoothing, z_loss, cap = options
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    classes, kept = x.shape[-1], goal != ignore_index
    if cap:
        bent = torch.tanh(x / cap)
        x = bent * cap
    place = goal.where(kept, 0).unsqueeze(-1)
    row_weight = row_weights(goal, class_weight, ignore_index).to(x.dtype).unsqueeze(-1)
    each = x.new_ones(classes) if class_weight is None else class_weight.to(x.dtype)
    top, picked = x.amax(-1, keepdim=True), x.gather(-1, place)
    top = top.where(top.isfinite(), 0.0)
    below = (each * (top - x)).sum(-1, keepdim=True) if smoothing else None
    # From here on x becomes exp(x - top), and that its own gradient: nothing else as large is made without smoothing
    # or softcap.
    gradient = x.sub_(top).exp_()
    total = gradient.sum(-1, keepdim=True)
    lse = top + total.log()
    losses = (1 - smoothing) * row_weight * (top - picked + total.log()) + z_loss * row_weight * lse.square()
    if below is not None:
        losses += smoothing / classes * (below + each.sum() * total.log())
    losses = losses.squeeze(-1).where(kept, 0.0)
    if not needed:
        return losses, logits
    row_weight = row_weight * scale
    share = (1 - smoothing + 2 * z_loss * lse) * row_weight
    if smoothing:
        spread = smoothing / classes * scale * each
        gradient.mul_((share + spread.sum()) / total).sub_(spread)
    else:
        gradient.mul_(share / total)
    gradient.scatter_add_(-1, place, (smoothing - 1) * row_weight)
    if cap:
        gradient.mul_(1 - bent.square())
    return losses, gradient.masked_fill_(~kept.unsqueeze(-1), 0.0).to(logits.dtype)


def _accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in total's precision."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a.to(total.dtype) @ b.to(total.dtype)


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b, in out's precision."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif out.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def _linear_fake(rows, weight, bias, goal, class_weight, mean, i, s, z, c, needs_rows, needs_weight, needs_bias):
    wide = torch.promote_types(rows.dtype, torch.float32)
    kept = wide if rows.dtype == torch.float16 else rows.dtype
    return (
        rows.new_empty((), dtype=wide),
        rows.new_empty(rows.shape if needs_rows else 0, dtype=kept),
        weight.new_empty(weight.shape if needs_weight else 0, dtype=kept),
        weight.new_empty(weight.shape[:1] if needs_bias else 0, dtype=kept),
        rows.new_empty((), dtype=wide),
    )


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    # The inputs are for a second derivative alone.
    ctx.save_for_backward(*output[1:], *inputs[:5])
    ctx.numbers = "mean" if inputs[5] else "sum", LossOptions(*inputs[6:10])


def _linear_backward(ctx: Any, dloss: Tensor | None, *_: None) -> tuple[Any, ...]:
    if dloss is None:
        return None, None, None, *_NOTHING
    *gradients, factor, rows, _, _, _, _ = ctx.saved_tensors
    found = (
        (gradient * (dloss * factor)).to(rows.dtype) if need else None
        for gradient, need in zip(gradients, ctx.needs_input_grad[:3], strict=True)
    )
    return *found, *_NOTHING


_NOTHING = (None,) * 10


def _linear_second(ctx: Any, dloss: Tensor | None, *_: None) -> tuple[Any, ...]:
    *operands, goal, class_weight = ctx.saved_tensors[4:]
    reduction, options = ctx.numbers

    def reference(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        logits = F.linear(rows, weight, bias)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return compose(wide, goal, class_weight, reduction, options, goal.shape)

    return *differentiate("linear_cross_entropy", reference, operands, (dloss,)), *_NOTHING


_linear_op = Operator(
    "linear_cross_entropy", _linear_forward, _linear_fake, _linear_setup, _linear_backward, _linear_second
)
