"""Attention maps, recomputed from the LSE: one program a tile of the map, heads one after the other where they are
averaged, so that nothing per head is held unless it was asked for."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastformer.kernels.attention.call import Call
from fastformer.kernels.attention.config import chunked_constants, map_config
from fastformer.kernels.attention.score import CHANGING, LOG2E, kept_rows, product, score_tile, sequence, slope_of
from fastformer.kernels.launch import launcher
from fastformer.kernels.rows import cdiv
from fastformer.kernels.targets import target_of


@launcher
@triton.jit(do_not_specialize=(*CHANGING, "heads"))
def _weights(
    Q, K, LSE, ROWS, OUT, MASK, SLOPES, SEED, CU_Q, CU_K,
    q_sb, q_sh, q_st, k_sb, k_sh, k_st, l_sb, l_sh, mask_b, mask_h, mask_q, mask_k, slope_b,
    tiles_m, tiles_n, heads, q_len, k_len, count, width, batches, scale_in, scale_out, left, right, threshold,
    keep_scale, share, head_dim,
    AVERAGE: tl.constexpr, GROUP: tl.constexpr, BOTTOM_RIGHT: tl.constexpr, CAUSAL: tl.constexpr, LEFT: tl.constexpr,
    RIGHT: tl.constexpr, BOOL_MASK: tl.constexpr, MASK_UNIT: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows and BLOCK_N columns of one head's map, or of the average of all.

    count, width: rows and columns of the map. share: 1 / heads for the average, else 1.
    """
    program = tl.program_id(0)
    tile_n = program % tiles_n
    tile_m = program // tiles_n % tiles_m
    plane = program // tiles_n // tiles_m
    batch = plane
    first_head = 0
    last_head = heads
    if not AVERAGE:
        batch = plane // heads
        first_head = plane % heads
        last_head = first_head + 1
    q_start, q_len = sequence(batch, CU_Q, q_len, 0, batches)
    k_start, k_len = sequence(batch, CU_K, k_len, 0, batches)
    far = batch.to(tl.int64)
    if CU_Q is not None:
        far = far * 0
    place = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    row = place
    if ROWS is not None:
        row = tl.load(ROWS + place, mask=place < count, other=-1).to(tl.int32)
    column_start = tile_n * BLOCK_N
    column = column_start + tl.arange(0, BLOCK_N)
    there = column < k_len
    valid = (place < count) & (row >= 0) & (row < q_len)
    wide_row = q_start + row.to(tl.int64)
    wide_column = k_start + column.to(tl.int64)
    offset = 0
    if BOTTOM_RIGHT:
        offset = k_len - q_len
    seed = 0
    if DROPOUT:
        seed = tl.load(SEED)
    ALIBI: tl.constexpr = SLOPES is not None
    mask_q *= MASK_UNIT
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for head in tl.range(first_head, last_head, num_stages=1):
        wide_head = far * 0 + head
        lse = tl.load(LSE + far * l_sb + wide_head * l_sh + wide_row, mask=valid, other=float("-inf"))
        inside = lse != float("-inf")  # the other rows have nothing to attend to, or do not exist
        lse = tl.where(inside, lse * LOG2E, float("inf"))
        qk = product(
            Q + far * q_sb + wide_head * q_sh + wide_row * q_st, inside,
            K + far * k_sb + wide_head // GROUP * k_sh + wide_column * k_st, there, head_dim,
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
        weights = tl.where(seen, tl.exp2(scores - lse[:, None]), 0.0)
        if DROPOUT:
            kept = kept_rows(seed, threshold, batch * heads + head, row, column_start, BLOCK_N)
            weights = tl.where(kept, weights * keep_scale, 0.0)
        total += weights
    tl.store(
        OUT + (plane.to(tl.int64) * count + place)[:, None] * width + column[None, :],
        total * share,
        mask=(place < count)[:, None] & (column < width)[None, :],
    )


def attention_weights(call: Call, lse: Tensor, rows: Tensor | None, average: bool) -> Tensor:
    """Probabilities of a call, dropped ones as 0.

    Args:
        call: as in forward; its value is not read. lse: (B, H, Sq), or packed (H, T), contiguous fp32.
        rows: int64 (R,) contiguous, the query rows wanted, or None for all.
        average: over the heads.

    Returns:
        fp32 (B, R, Sk), or (B, H, R, Sk) without average; packed: R and Sk are the longest lengths, 0 behind each
        sequence's end.
    """
    target = target_of(call.query.device)
    config, chunk = map_config(target, call)
    count = call.q_len if rows is None else rows.shape[0]
    shape = (call.batch, count, call.k_len) if average else (call.batch, call.heads, count, call.k_len)
    out = torch.empty(shape, dtype=torch.float32, device=call.query.device)
    if out.numel() == 0:
        return out
    tiles_m, tiles_n = cdiv(count, config.block_m), cdiv(call.k_len, config.block_n)
    tokens = call.query.shape[0] if call.packed else 0
    l_sb, l_sh = (0, tokens) if call.packed else (call.heads * call.q_len, call.q_len)
    constants = {k: v for k, v in chunked_constants(call).items() if k != "KEY_MASK"}
    planes = call.batch if average else call.batch * call.heads
    _weights[(planes * tiles_m * tiles_n,)](
        call.query, call.key, lse, rows, out, call.mask, call.slopes, call.seed, call.cu_q, call.cu_k,
        *call.strides(call.query), *call.strides(call.key), l_sb, l_sh, *call.mask_strides, call.slope_stride,
        tiles_m, tiles_n, call.heads, call.q_len, call.k_len, count, call.k_len, call.batch, *call.scales,
        call.left, call.right, call.threshold, call.keep_scale, 1.0 / call.heads if average else 1.0, call.head_dim,
        AVERAGE=average, **constants, CHUNK=chunk, **config.options(target),
    )  # fmt: skip
    return out
