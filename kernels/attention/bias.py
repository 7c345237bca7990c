"""Gradients of what is added to the scores: a float mask of any broadcastable shape, ALiBi slopes.

- One program owns a tile of the gradient and walks over everything that shares it (batches and heads, and queries or
  keys where the gradient has none), so the sums have one order and nothing of size B·H·S² is held.
- Where few tiles share much (a bias over keys alone, slopes), several programs walk a part each; their partial sums are
  added up afterwards, again in one order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastformer.kernels.attention.call import Call
from fastformer.kernels.attention.config import chunked_constants, map_config
from fastformer.kernels.attention.score import (
    CHANGING,
    LOG2E,
    kept_tile,
    key_range,
    product,
    score_tile,
    sequence,
    slope_of,
)
from fastformer.kernels.launch import launcher
from fastformer.kernels.rows import cdiv
from fastformer.kernels.targets import target_of


@launcher
@triton.jit(do_not_specialize=(*CHANGING, "heads"))
def _bias_gradient(
    Q, K, V, DO, LSE, DELTA, GRAD, MASK, SLOPES, SEED, CU_Q, CU_K,
    q_sb, q_sh, q_st, k_sb, k_sh, k_st, v_sb, v_sh, v_st, do_sb, do_sh, do_st, l_sb, l_sh,
    mask_b, mask_h, mask_q, mask_k, slope_b, g_s, g_b, g_h, g_q,
    owned, own_heads, own_rows, own_columns, loop_heads, loop_rows, loop_columns, loops, share,
    heads, q_len, k_len, batches, scale_in, scale_out, left, right, threshold, keep_scale,
    head_dim, value_dim, OF_SLOPES: tl.constexpr, BY_ROW: tl.constexpr, BY_COLUMN: tl.constexpr,
    GROUP: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    BOOL_MASK: tl.constexpr, MASK_UNIT: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The sum of one share of what one tile of the gradient collects.

    BY_ROW, BY_COLUMN: whether the gradient has a row for every query, a column for every key.
    """
    program = tl.program_id(0)
    split = program // owned
    mine = program % owned
    first_column_tile = mine % own_columns
    first_row_tile = mine // own_columns % own_rows
    first_head = mine // own_columns // own_rows % own_heads
    first_batch = mine // own_columns // own_rows // own_heads
    mask_q *= MASK_UNIT
    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    ALIBI: tl.constexpr = SLOPES is not None
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in tl.range(split * share, tl.minimum((split + 1) * share, loops), num_stages=1):
        column_start = (first_column_tile + step % loop_columns) * BLOCK_N
        row_start = (first_row_tile + step // loop_columns % loop_rows) * BLOCK_M
        head = first_head + step // loop_columns // loop_rows % loop_heads
        batch = first_batch + step // loop_columns // loop_rows // loop_heads
        q_start, rows = sequence(batch, CU_Q, q_len, 0, batches)
        k_start, columns = sequence(batch, CU_K, k_len, 0, batches)
        far = batch.to(tl.int64)
        if CU_Q is not None:
            far = far * 0
        offset = 0
        if BOTTOM_RIGHT:
            offset = columns - rows
        last = tl.minimum(row_start + BLOCK_M, rows) - 1
        begin, _from, _to, end = key_range(row_start, last, offset, columns, left, right, CAUSAL, LEFT, RIGHT)
        if (row_start < rows) & (column_start < end) & (column_start + BLOCK_N > begin):
            wide_head = head.to(tl.int64)
            kv_head = wide_head // GROUP
            row = row_start + m
            column = column_start + n
            wide_row = (q_start + row_start) + m.to(tl.int64)
            wide_column = (k_start + column_start) + n.to(tl.int64)
            rows_of_head = far * l_sb + wide_head * l_sh + wide_row
            lse = tl.load(LSE + rows_of_head, mask=row < rows, other=float("-inf"))
            inside = lse != float("-inf")  # the other rows have nothing to attend to, or do not exist
            lse = tl.where(inside, lse * LOG2E, float("inf"))
            delta = tl.load(DELTA + rows_of_head, mask=inside, other=0.0)
            there = column < columns
            qk = product(
                Q + far * q_sb + wide_head * q_sh + wide_row * q_st, inside,
                K + far * k_sb + kv_head * k_sh + wide_column * k_st, there, head_dim,
                BLOCK_M, BLOCK_N, CHUNK, PRECISION,
            )  # fmt: skip
            mask_of = MASK
            if MASK is not None:
                mask_of = MASK + (batch.to(tl.int64) * mask_b + wide_head * mask_h) * MASK_UNIT
            scores, seen, _slack = score_tile(
                qk, row[:, None], column[None, :], inside[:, None], there[None, :], 0.0, offset, mask_of, mask_q,
                mask_k, slope_of(SLOPES, batch, head, slope_b), scale_in, scale_out, left, right, CAUSAL, LEFT, RIGHT,
                BOOL_MASK, False, SOFTCAP, ALIBI, True,
            )  # fmt: skip
            weights = tl.exp2(scores - lse[:, None])
            dp = product(
                DO + far * do_sb + wide_head * do_sh + wide_row * do_st, inside,
                V + far * v_sb + kv_head * v_sh + wide_column * v_st, there, value_dim,
                BLOCK_M, BLOCK_N, CHUNK, PRECISION,
            )  # fmt: skip
            if DROPOUT:
                kept = kept_tile(
                    tl.load(SEED), threshold, batch * heads + head, row_start, column_start, BLOCK_M, BLOCK_N
                )
                dp = tl.where(kept, dp * keep_scale, 0.0)
            # Added behind the softcap: its slope is no part of this derivative.
            ds = weights * (dp - delta[:, None])
            if OF_SLOPES:
                ds *= -tl.abs(row[:, None] + offset - column[None, :]).to(tl.float32)
            total += tl.where(seen, ds, 0.0)
    row = first_row_tile * BLOCK_M + m
    column = first_column_tile * BLOCK_N + n
    GRAD += split.to(tl.int64) * g_s + first_batch.to(tl.int64) * g_b + first_head.to(tl.int64) * g_h
    if BY_ROW and BY_COLUMN:
        place = GRAD + row.to(tl.int64)[:, None] * g_q + column[None, :]
        tl.store(place, total.to(GRAD.dtype.element_ty), mask=(row < q_len)[:, None] & (column < k_len)[None, :])
    elif BY_ROW:
        tl.store(GRAD + row.to(tl.int64) * g_q, tl.sum(total, 1).to(GRAD.dtype.element_ty), mask=row < q_len)
    elif BY_COLUMN:
        tl.store(GRAD + column, tl.sum(total, 0).to(GRAD.dtype.element_ty), mask=column < k_len)
    else:
        tl.store(GRAD, tl.sum(tl.sum(total, 1), 0).to(GRAD.dtype.element_ty))


def attention_bias_gradient(
    call: Call, lse: Tensor, delta: Tensor, grad_out: Tensor, shape: tuple[int, ...], of_slopes: bool
) -> Tensor:
    """Gradient of a call's float mask, or of its slopes.

    Args:
        call: as in forward. lse: what forward returned. delta: what `attention_backward` returned.
        grad_out: like the output, last stride 1.
        shape: of the gradient: (B or 1, H or 1, Sq or 1, Sk or 1) of the mask before it was expanded (packed: the
            longest lengths); (B or 1, H, 1, 1) of the slopes.
        of_slopes: the gradient of the slopes rather than that of the mask.

    Returns:
        a tensor of that shape in the mask's or slopes' dtype.
    """
    source = call.slopes if of_slopes else call.mask
    assert source is not None
    target = target_of(call.query.device)
    config, chunk = map_config(target, call)
    all_rows, all_columns = (cdiv(call.q_len, config.block_m), cdiv(call.k_len, config.block_n))
    full = (call.batch, call.heads, all_rows, all_columns)
    own = [1 if size == 1 else tiles for size, tiles in zip(shape, full, strict=True)]
    loop = [tiles if size == 1 else 1 for size, tiles in zip(shape, full, strict=True)]
    owned, loops = own[0] * own[1] * own[2] * own[3], loop[0] * loop[1] * loop[2] * loop[3]
    if owned * loops == 0:
        return torch.zeros(shape, dtype=source.dtype, device=source.device)
    # Enough programs for the device, of which none goes empty.
    share = cdiv(loops, max(1, min(loops, 4 * target.multiprocessors // owned)))
    splits = cdiv(loops, share)
    grad = torch.empty(
        (splits, *shape), dtype=source.dtype if splits == 1 else torch.float32, device=source.device
    )  # fmt: skip
    tokens = call.query.shape[0] if call.packed else 0
    l_sb, l_sh = (0, tokens) if call.packed else (call.heads * call.q_len, call.q_len)
    constants = {k: v for k, v in chunked_constants(call).items() if k != "KEY_MASK"}
    _bias_gradient[(owned * splits,)](
        call.query, call.key, call.value, grad_out, lse, delta, grad, call.mask, call.slopes, call.seed,
        call.cu_q, call.cu_k, *call.strides(call.query), *call.strides(call.key), *call.strides(call.value),
        *call.strides(grad_out), l_sb, l_sh, *call.mask_strides, call.slope_stride, *grad.stride()[:4],
        owned, own[1], own[2], own[3], loop[1], loop[2], loop[3], loops, share,
        call.heads, call.q_len, call.k_len, call.batch, *call.scales, call.left, call.right, call.threshold,
        call.keep_scale, call.head_dim, call.value_dim, OF_SLOPES=of_slopes, BY_ROW=shape[2] != 1,
        BY_COLUMN=shape[3] != 1, **constants, CHUNK=chunk, **config.options(target),
    )  # fmt: skip
    return grad[0] if splits == 1 else grad.sum(0).to(source.dtype)
