"""Cross-entropy over rows of logits.

With x the logits (after the soft cap c * tanh(x / c), if any), t the target, w the class weights (1 without), s the
label smoothing, V the classes and z the z-loss factor, a row's loss is

    (1 - s) w_t (lse - x_t) + s / V * sum_c w_c (lse - x_c) + z w_t lse^2          lse = log(sum_c exp(x_c))

- Forward reads the logits once (online softmax, Milakov, Gimelshein 2018); backward reads them once more and writes
  their gradient, over themselves where the caller owns them.
- A row whose target is `ignore_index` has loss, weight and gradient 0; a target out of range makes them NaN.
- z-loss: Chowdhery et al. 2022, "PaLM"; label smoothing and class weights as in torch.nn.functional.cross_entropy.
"""

import functools
import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastformer.kernels.launch import Bound, launcher
from fastformer.kernels.rows import as_rows, cdiv, power_of_two, room, room_beside, row_stride, shape_of_program
from fastformer.kernels.targets import Target, target_of

BLOCK_COLUMNS = 4096


@triton.jit
def _load_logits(X, row, x_stride, column, valid, outside, cap, CAPPED: tl.constexpr):
    """Capped logits of one row in fp32, `outside` beyond the row, and the cap's slope."""
    x = tl.load(X + row * x_stride + column, mask=valid, other=outside).to(tl.float32)
    slope = tl.full(x.shape, 1.0, tl.float32)
    if CAPPED:
        # tanh(u) and 1 - tanh(u)^2 out of exp(-2 |u|), which keeps the slope's digits where the cap is reached.
        decay = tl.exp(tl.abs(x) * (-2.0 / cap))
        bent = (1.0 - decay) / (1.0 + decay)
        slope = 4.0 * decay / ((1.0 + decay) * (1.0 + decay))
        x = tl.where(valid, tl.where(x < 0.0, -bent, bent) * cap, outside)
    return x, slope


@launcher
@triton.jit(do_not_specialize=["ignore"])
def _loss_forward(
    X, TARGET, W, LOSS, WEIGHT, LSE, x_stride, ignore, smoothing, z_loss, cap,
    V: tl.constexpr, SMOOTH: tl.constexpr, CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row a program."""
    row = tl.program_id(0).to(tl.int64)
    goal = tl.load(TARGET + row)
    top = float("-inf")
    total = 0.0
    # sum of w_c x_c and of w_c, for label smoothing
    weighted = 0.0
    weights = 0.0
    for first in range(0, V, BLOCK):
        column = first + tl.arange(0, BLOCK)
        valid = column < V
        x, _ = _load_logits(X, row, x_stride, column, valid, float("-inf"), cap, CAPPED)
        new = tl.maximum(top, tl.max(x, 0))
        # A block of -inf alone must not make NaN of -inf - -inf.
        shift = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(x - shift), 0)
        top = new
        if SMOOTH:
            if W is None:
                weighted += tl.sum(tl.where(valid, x, 0.0), 0)
            else:
                w = tl.load(W + column, mask=valid, other=0.0).to(tl.float32)
                weighted += tl.sum(tl.where(valid, w * x, 0.0), 0)
                weights += tl.sum(w, 0)
    # lse = top + tail, kept apart: near a probability of 1 the sum would cost the digits that matter.
    tail = tl.log(total)
    lse = top + tail
    known = (goal >= 0) & (goal < V)
    x_goal, _ = _load_logits(X, row, x_stride, goal + tl.arange(0, 1), known, float("nan"), cap, CAPPED)
    weight = tl.full([1], 1.0, tl.float32)
    if W is not None:
        weight = tl.load(W + goal + tl.arange(0, 1), mask=known, other=float("nan")).to(tl.float32)
    else:
        weight = tl.where(known, weight, float("nan"))
    loss = (1.0 - smoothing) * weight * (tail + (top - x_goal))
    if SMOOTH:
        if W is None:
            weights = V * 1.0
        loss += smoothing / V * (weights * lse - weighted)
    loss += z_loss * weight * lse * lse
    ignored = goal == ignore
    tl.store(LOSS + row + tl.arange(0, 1), tl.where(ignored, 0.0, loss))
    tl.store(WEIGHT + row + tl.arange(0, 1), tl.where(ignored, 0.0, weight))
    tl.store(LSE + row * 2, top)
    tl.store(LSE + row * 2 + 1, tail)


@launcher
@triton.jit(do_not_specialize=["rows"])
def _reduce(LOSS, WEIGHT, OUT, TOTAL, rows, MEAN: tl.constexpr, BLOCK: tl.constexpr):
    """One program: the sum of rows' losses, divided by the sum of their weights for the mean."""
    loss = tl.zeros([BLOCK], tl.float32)
    weight = tl.zeros([BLOCK], tl.float32)
    for first in range(0, rows, BLOCK):
        row = first + tl.arange(0, BLOCK)
        loss += tl.load(LOSS + row, mask=row < rows, other=0.0)
        if MEAN:
            weight += tl.load(WEIGHT + row, mask=row < rows, other=0.0)
    found = tl.sum(loss, 0)
    if MEAN:
        total = tl.sum(weight, 0)
        tl.store(TOTAL, total)
        found /= total
    tl.store(OUT, found.to(OUT.dtype.element_ty))


@launcher
@triton.jit(do_not_specialize=["ignore"])
def _loss_backward(
    DLOSS, TOTAL, X, TARGET, W, WEIGHTS, WEIGHT, LSE, DX, x_stride, dx_stride, dloss_stride, ignore, smoothing, z_loss,
    cap, V: tl.constexpr, SMOOTH: tl.constexpr, CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of columns (grid axis 1) of one row (axis 0) a program; DX may be X."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = column < V
    goal = tl.load(TARGET + row)
    weight = tl.load(WEIGHT + row)
    top = tl.load(LSE + row * 2)
    tail = tl.load(LSE + row * 2 + 1)
    lse = top + tail
    dloss = tl.load(DLOSS + row * dloss_stride).to(tl.float32)
    if TOTAL is not None:
        dloss /= tl.load(TOTAL)
    x, slope = _load_logits(X, row, x_stride, column, valid, float("-inf"), cap, CAPPED)
    p = tl.exp((x - top) - tail)
    dx = (1.0 - smoothing + 2.0 * z_loss * lse) * weight * p
    dx -= tl.where(column == goal, (1.0 - smoothing) * weight, 0.0)
    if SMOOTH:
        if W is None:
            dx += smoothing * p - smoothing / V
        else:
            w = tl.load(W + column, mask=valid, other=0.0).to(tl.float32)
            dx += smoothing / V * (tl.load(WEIGHTS) * p - w)
    dx = tl.where(goal == ignore, 0.0, dx * slope * dloss)
    tl.store(DX + row * dx_stride + column, dx, mask=valid)


def cross_entropy_forward(
    logits: Tensor,
    goal: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the forward kernel.

    Args:
        logits: (..., V), V > 0, of R rows; goal: R int64, contiguous; weight: (V,) or None, contiguous.
        softcap: 0 for none.

    Returns:
        loss and weight of the target (0 for an ignored row) of every row, (R,) fp32, and (R, 2) fp32: the row's largest
        logit and the log of the sum of exponentials beyond it.
    """
    logits = as_rows(logits)[0]
    options = (ignore_index, label_smoothing, z_loss, softcap)
    run = bind_forward(logits, goal, weight, *options)
    assert run is not None
    return run(logits, goal, weight)


def bind_forward(
    logits: Tensor, goal: Tensor, weight: Tensor | None, *options: float
) -> Callable[..., tuple[Tensor, Tensor, Tensor]] | None:
    """`cross_entropy_forward` of tensors laid out like these, as a function of the tensors alone; None where it
    copies."""
    stride, dtypes = row_stride(logits), (logits.dtype, None if weight is None else weight.dtype)
    if stride is None:
        return None
    return _forward_of(target_of(logits.device), logits.device, logits.shape, stride, dtypes, *options)


# What a call is made of beside its tensors is derived once for each kind. Keys are typed: 1 is not 1.0 to Triton.
@functools.lru_cache(maxsize=1024, typed=True)
def _forward_of(
    aim: Target,
    device: torch.device,
    shape: torch.Size,
    stride: int,
    dtypes: tuple[torch.dtype | None, ...],
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    rows, v = math.prod(shape[:-1]), shape[-1]
    block = min(max(power_of_two(v), 16), BLOCK_COLUMNS)
    numbers = (stride, ignore_index, label_smoothing, z_loss, softcap, v, label_smoothing > 0, softcap > 0, block)
    bound = Bound(_loss_forward, (rows,), numbers, shape_of_program(aim, block, 16, 128))

    new_row, new_lse = (room(shape, torch.float32, device) for shape in ((rows,), (rows, 2)))

    def run(logits: Tensor, goal: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        loss, weights, lse = new_row(), new_row(), new_lse()
        if rows:
            bound.launch(logits, goal, weight, loss, weights, lse)
        return loss, weights, lse

    return run


def reduce_losses(loss: Tensor, weights: Tensor, mean: bool, out_dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Launch the reduction.

    Args:
        loss, weights: fp32 (R,), contiguous, as the forward kernel leaves them.

    Returns:
        the sum or mean of loss, () in out_dtype, and for the mean the fp32 () sum of weights.
    """
    return bind_reduction(loss, mean, out_dtype)(loss, weights)


def bind_reduction(loss: Tensor, mean: bool, out_dtype: torch.dtype) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """`reduce_losses` of as many rows, as a function of the tensors alone."""
    return _reduction_of(loss.device, loss.shape[0], mean, out_dtype)


@functools.lru_cache(maxsize=1024)
def _reduction_of(
    device: torch.device, rows: int, mean: bool, out_dtype: torch.dtype
) -> Callable[..., tuple[Tensor, Tensor | None]]:
    bound = Bound(_reduce, (1,), (rows, mean, 1024), {"num_warps": 4})

    new_out, new_total = (room((), dtype, device) for dtype in (out_dtype, torch.float32))

    def run(loss: Tensor, weights: Tensor) -> tuple[Tensor, Tensor | None]:
        out, total = new_out(), new_total() if mean else None
        bound.launch(loss, weights, out, total)
        return out, total

    return run


def cross_entropy_backward(
    dloss: Tensor,
    logits: Tensor,
    goal: Tensor,
    weight: Tensor | None,
    row_weight: Tensor,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    in_place: bool,
    total: Tensor | None = None,
) -> Tensor:
    """Launch the backward kernel.

    Args:
        dloss: (R,) gradient of every row's loss, any stride, or a scalar, which is every row's; row_weight, lse: from
            forward; others as in forward.
        in_place: write the gradient over logits, which then must have unit stride in the last dimension.
        total: fp32 () that the gradient is divided by, or None.

    Returns:
        (..., V) gradient of logits in their dtype.
    """
    logits = as_rows(logits)[0]
    options = (ignore_index, label_smoothing, z_loss, softcap)
    run = bind_backward(dloss, logits, goal, weight, total is not None, *options, in_place)
    assert run is not None
    return run(dloss, logits, goal, weight, row_weight, lse, total)


def bind_backward(
    dloss: Tensor, logits: Tensor, goal: Tensor, weight: Tensor | None, mean: bool, *options: float
) -> Callable[..., Tensor] | None:
    """`cross_entropy_backward`, for a `mean` with its total, of tensors laid out like these, as a function of them;
    None where it copies."""
    strides = dloss.stride(0) if dloss.ndim else 0, row_stride(logits)
    if strides[1] is None:
        return None
    dtypes = logits.dtype, dloss.dtype, None if weight is None else weight.dtype
    return _backward_of(target_of(logits.device), logits.device, logits.shape, strides, *dtypes, mean, *options)


@functools.lru_cache(maxsize=1024, typed=True)
def _backward_of(
    aim: Target,
    device: torch.device,
    shape: torch.Size,
    strides: tuple[int, int],
    dtype: torch.dtype,
    dloss_dtype: torch.dtype,
    weight_dtype: torch.dtype | None,
    mean: bool,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    in_place: bool,
) -> Callable[..., Tensor]:
    rows, v = math.prod(shape[:-1]), shape[-1]
    dloss_stride, stride = strides
    new_dx = room_beside(shape, dtype, device, stride, dtype)
    block = min(max(power_of_two(v), 16), BLOCK_COLUMNS)
    smooth = label_smoothing > 0
    numbers = (stride, stride if in_place else v, dloss_stride, ignore_index, label_smoothing, z_loss, softcap)
    constants = (v, smooth, softcap > 0, block)
    grid = rows, cdiv(v, block)
    bound = Bound(_loss_backward, grid, (*numbers, *constants), shape_of_program(aim, block, 8, 64))

    def run(
        dloss: Tensor,
        logits: Tensor,
        goal: Tensor,
        weight: Tensor | None,
        row_weight: Tensor,
        lse: Tensor,
        total: Tensor | None = None,
    ) -> Tensor:
        dx = logits if in_place else new_dx(logits)
        if rows:
            weights = weight.float().sum() if weight is not None and smooth else None
            bound.launch(dloss, total, logits, goal, weight, weights, row_weight, lse, dx)
        return dx

    return run
