"""The rules of a score, written once and shared by every attention kernel.

Scores are kept in base 2 (times log2 e), so that exp2 needs no multiplication. `row` and `column` are positions within
the sequence, shaped so that they broadcast to the tile, in either orientation: [BLOCK_M, 1] with [1, BLOCK_N], or
[1, BLOCK_M] with [BLOCK_N, 1]. The rules themselves stand in `fastformer.ops.attention.options`.
"""

import triton
import triton.language as tl

from fastformer.kernels.random import keep_columns

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
# Arguments that follow from lengths or are never worth it: kernels are not compiled anew for what these are divisible
# by. Strides of queries, keys and values are aligned whatever the lengths; those of a mask come with MASK_UNIT.
CHANGING = (
    "tiles", "q_len", "k_len", "tokens", "tokens_q", "tokens_k", "batches", "left", "right", "threshold",
    "l_sb", "l_sh", "dl_sb", "dl_sh", "dl_st", "mask_b", "mask_h", "mask_q",
    "tiles_m", "tiles_n", "count", "width", "share",
    "owned", "own_heads", "own_rows", "own_columns", "loop_heads", "loop_rows", "loop_columns", "loops",
    "g_s", "g_b", "g_h", "g_q",
)  # fmt: skip


@triton.jit
def tanh(x):
    """tanh to about one fp32 ulp: the exponential form cancels near 0, so a polynomial stands in there."""
    square = x * x
    near = x * (1.0 + square * (-1.0 / 3 + square * (2.0 / 15 + square * (-17.0 / 315 + square * (62.0 / 2835)))))
    far = 1.0 - 2.0 / (tl.exp2(x * (2 * LOG2E)) + 1.0)
    return tl.where(square < 0.0625, near, far)


@triton.jit
def visible_keys(
    MASK, column, k_len, mask_k, BOOL_MASK: tl.constexpr, KEY_MASK: tl.constexpr, CHECK: tl.constexpr
):  # fmt: skip
    """(keys of a tile that exist and that a mask over keys alone lets through,
    what such a float mask adds in base 2)."""
    inside = column < k_len
    bias = 0.0
    if CHECK and KEY_MASK:
        if BOOL_MASK:
            inside = inside & (tl.load(MASK + column.to(tl.int64) * mask_k, mask=inside, other=0) != 0)
        else:
            added = tl.load(MASK + column.to(tl.int64) * mask_k, mask=inside, other=0.0).to(tl.float32)
            inside = inside & (added != float("-inf"))
            bias = base2(added)
    return inside, bias


@triton.jit
def product(
    A, a_inside, B, b_inside, width, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Products of rows of two matrices in memory, CHUNK of their `width` columns at a time: whatever the width, no more
    of a row is held in registers.

    Args:
        A, B: pointers to the rows' first elements, [BLOCK_M] and [BLOCK_N]; a_inside, b_inside: which rows exist, the
            others count as zeros.

    Returns:
        fp32 [BLOCK_M, BLOCK_N].
    """
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in tl.range(0, width, CHUNK, num_stages=1):
        d = first + tl.arange(0, CHUNK)
        a = tl.load(A[:, None] + d[None, :], mask=a_inside[:, None] & (d < width)[None, :], other=0.0)
        b = tl.load(B[:, None] + d[None, :], mask=b_inside[:, None] & (d < width)[None, :], other=0.0)
        total = tl.dot(a, tl.trans(b), total, input_precision=PRECISION)
    return total


@triton.jit
def sound_in_chunks(PLACE, inside, width, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """`sound_rows` of rows of any width: PLACE points to their first elements, [BLOCK]."""
    sound = tl.full([BLOCK], 1, tl.int1)
    for first in tl.range(0, width, CHUNK, num_stages=1):
        d = first + tl.arange(0, CHUNK)
        sound = sound & sound_rows(PLACE[:, None] + d[None, :], inside[:, None] & (d < width)[None, :])
    return sound


@triton.jit
def sound_rows(place, mask):
    """Which rows of a tile in memory are free of NaN and Inf."""
    x = tl.load(place, mask=mask, other=0.0)
    return tl.min((tl.abs(x) < float("inf")).to(tl.int32), 1) != 0


@triton.jit
def base2(bias):
    """A float mask in base 2. The lowest finite numbers stay finite: such a row averages its values, as stock does."""
    bias *= LOG2E
    return tl.where(bias < -3.0e38, -3.0e38, bias)


@triton.jit
def score_tile(
    qk, row, column, row_inside, column_inside, key_bias, offset, MASK, mask_q, mask_k, slope, scale_in, scale_out,
    left, right, CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, BOOL_MASK: tl.constexpr,
    KEY_MASK: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """Scores of a tile, and which of them count.

    Args:
        qk: fp32 tile of dot products.
        row, column, row_inside, column_inside, key_bias: positions, what `visible_keys` says, broadcasting to the tile.
        offset: what is added to a row to compare it with a column.
        MASK: pointer to element (0, 0) of the head's attn_mask, or None; mask_q, mask_k: its strides.
        slope: ALiBi slope times log2 e.
        scale_in, scale_out: without softcap, scale_in = scale * log2 e; with it, scale_in = scale / softcap and
            scale_out = softcap * log2 e.
        CHECK: whether any place of the tile may be hidden or outside the sequences.

    Returns:
        (scores in base 2, places that count or True, derivative of the softcap or 1.0).
    """
    scores = qk * scale_in
    slack = 1.0
    if SOFTCAP:
        bent = tanh(scores)
        slack = 1.0 - bent * bent
        scores = bent * scale_out
    seen = True
    if CHECK:
        seen = row_inside & column_inside
        if CAUSAL:
            seen = seen & (column <= row + offset)
        if LEFT:
            seen = seen & (column >= row + offset - left)
        if RIGHT:
            seen = seen & (column <= row + offset + right)
        if KEY_MASK:
            if not BOOL_MASK:
                scores += key_bias
        elif MASK is not None:
            place = MASK + row.to(tl.int64) * mask_q + column.to(tl.int64) * mask_k
            if BOOL_MASK:
                seen = seen & (tl.load(place, mask=row_inside & column_inside, other=0) != 0)
            else:
                bias = tl.load(place, mask=row_inside & column_inside, other=0.0).to(tl.float32)
                seen = seen & (bias != float("-inf"))
                scores += base2(bias)
    if ALIBI:
        scores -= slope * tl.abs(row + offset - column).to(tl.float32)
    return scores, seen, slack


@triton.jit
def key_range(first, last, offset, k_len, left, right, CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """Keys that rows first … last may see: (begin, end), and (full begin, full end) that all of them see."""
    begin = 0
    full_begin = 0
    end = k_len
    full_end = k_len
    if LEFT:
        begin = tl.minimum(tl.maximum(first + offset - left, 0), k_len)
        full_begin = tl.minimum(tl.maximum(last + offset - left, 0), k_len)
    if CAUSAL:
        end = tl.minimum(end, last + offset + 1)
        full_end = tl.minimum(full_end, first + offset + 1)
    if RIGHT:
        end = tl.minimum(end, last + offset + right + 1)
        full_end = tl.minimum(full_end, first + offset + right + 1)
    return begin, full_begin, tl.maximum(full_end, 0), tl.maximum(end, 0)


@triton.jit
def row_range(first, last, offset, q_len, left, right, CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """Rows that may see keys first … last: (begin, end), and (full begin, full end) that see all of them."""
    begin = 0
    full_begin = 0
    end = q_len
    full_end = q_len
    if CAUSAL:
        begin = tl.maximum(first - offset, 0)
        full_begin = tl.maximum(last - offset, 0)
    if RIGHT:
        begin = tl.maximum(begin, first - offset - right)
        full_begin = tl.maximum(full_begin, last - offset - right)
    if LEFT:
        end = tl.minimum(end, last - offset + left + 1)
        full_end = tl.minimum(full_end, first - offset + left + 1)
    return begin, full_begin, tl.maximum(full_end, 0), tl.maximum(end, 0)


@triton.jit
def slope_of(SLOPES, batch, head, stride_b):
    """ALiBi slope of a head in base 2, 0.0 without slopes."""
    if SLOPES is None:
        return 0.0
    else:
        return tl.load(SLOPES + batch.to(tl.int64) * stride_b + head).to(tl.float32) * LOG2E


@triton.jit
def start_of_row(SINKS, head, BLOCK_M: tl.constexpr):
    """Running maximum (base 2) and sum of a row before its first key."""
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if SINKS is not None:
        sink = tl.load(SINKS + head).to(tl.float32) * LOG2E
        peak = tl.zeros([BLOCK_M], tl.float32) + sink  # a NaN stays one
        total += tl.where(sink == float("-inf"), 0.0, 1.0)
    return peak, total


@triton.jit
def sequence(batch, CU, length, tokens, batches):
    """(first token, length) of a sequence. Packed tokens after the last boundary count as sequence number `batches`."""
    if CU is None:
        return batch.to(tl.int64) * 0, length
    else:
        start = tl.load(CU + batch).to(tl.int64)
        end = tl.load(CU + batch + 1, mask=batch < batches, other=0).to(tl.int64)
        end = tl.where(batch < batches, end, tokens)
        return start, (end - start).to(tl.int32)


@triton.jit
def kept_tile(seed, threshold, plane, row_start, column_start, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Dropout's keep mask of a tile, bool [BLOCK_M, BLOCK_N]."""
    return kept_rows(seed, threshold, plane, row_start + tl.arange(0, BLOCK_M), column_start, BLOCK_N)


@triton.jit
def kept_rows(seed, threshold, plane, row, column_start, BLOCK_N: tl.constexpr):
    """The same of any rows, [BLOCK_M]."""
    return keep_columns(seed, column_start, row, plane, threshold, BLOCK_N)


@triton.jit
def blank(OUT, stride, start, tile, tiles, length, width, BLOCK: tl.constexpr, BLOCK_WIDTH: tl.constexpr):
    """Zeros for packed tokens after the last boundary."""
    column = tl.arange(0, BLOCK_WIDTH)
    for first in range(tile * BLOCK, length, tiles * BLOCK):
        row = first + tl.arange(0, BLOCK)
        tl.store(
            OUT + (start + row)[:, None] * stride + column[None, :],
            tl.zeros([BLOCK, BLOCK_WIDTH], OUT.dtype.element_ty),
            mask=(row < length)[:, None] & (column < width)[None, :],
        )


@triton.jit
def blank_rows(LSE, start, tile, tiles, length, BLOCK: tl.constexpr):
    """LSE of packed tokens after the last boundary: nothing to attend to."""
    for first in range(tile * BLOCK, length, tiles * BLOCK):
        row = first + tl.arange(0, BLOCK)
        tl.store(LSE + start + row, tl.full([BLOCK], float("-inf"), tl.float32), mask=row < length)
