"""Attention over a key and value cache: append and rotate, attend in splits of the keys, combine.

- The query heads that share a key head are the rows of one tile, for all new tokens of a sequence: row r is head
  r % GROUP of the group at query r // GROUP. Tiles are padded to 16 rows, what the matrix units need. Of heads so wide
  that several tokens' edges leave no registers, each token has tiles of its own, as a single one has: whatever such a
  tile reads, all its rows see.
- The keys of a sequence are divided over `splits` programs (Dao et al. 2023, "Flash-Decoding"). How many there are
  follows from shapes alone, how long each is from the sequence's length on the device: nothing is read by the host,
  and a CUDA graph of the call holds for every length. `combine` merges what each leaves.
- Queries stand at the end of their sequence: query i of Sq is at position length - Sq + i.
- The rules of a score are those of `score`. What no row of a tile sees is not read, so that NaN and Inf in unused
  places of the cache, or behind a window, reach nothing.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastformer.kernels.attention.combine import bind_combine, count_splits
from fastformer.kernels.attention.config import decode_config, widest_of_several
from fastformer.kernels.attention.score import LN2, LOG2E, key_range, score_tile, sound_rows
from fastformer.kernels.launch import Bound, launcher
from fastformer.kernels.rows import cdiv, power_of_two
from fastformer.kernels.targets import Target, target_of

_LOG2E = 1.4426950408889634


@triton.jit
def _turned(x, place, inside, position, COS, SIN, cos_p, sin_p, positions, R: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Rows x [M, BLOCK_D] in memory at `place`, turned by the angles of their position [M]; see `kernels.rotary`."""
    d = tl.arange(0, x.shape[1])
    if INTERLEAVED:
        angle = d // 2
        first = d % 2 == 0
        other = tl.where(first, d + 1, d - 1)
    else:
        angle = d % (R // 2)
        first = d < R // 2
        other = tl.where(first, d + R // 2, d - R // 2)
    turns = inside & (d < R)[None, :]
    # A position the table does not have gives NaN, not what lies behind the table.
    known = turns & ((position >= 0) & (position < positions))[:, None]
    row = position.to(tl.int64)[:, None]
    cos = tl.load(COS + row * cos_p + angle[None, :], mask=known, other=float("nan")).to(tl.float32)
    sin = tl.load(SIN + row * sin_p + angle[None, :], mask=known, other=float("nan")).to(tl.float32)
    y = tl.load(place + other[None, :], mask=turns, other=0.0).to(tl.float32)
    turned = x.to(tl.float32) * cos + tl.where(first[None, :], -y, y) * sin
    return tl.where((d < R)[None, :], turned.to(x.dtype), x)


@triton.jit
def _place_in(TABLE, position, inside, stride_b, stride_t, PAGE: tl.constexpr):
    """Offsets of tokens in a cache [..., int64]: TABLE is the sequence's row of pages, without pages None."""
    if TABLE is None:
        return position.to(tl.int64) * stride_t
    else:
        page = tl.load(TABLE + position // PAGE, mask=inside, other=0).to(tl.int64)
        return page * stride_b + (position % PAGE).to(tl.int64) * stride_t


@launcher
@triton.jit(do_not_specialize=["new", "heads", "capacity", "positions", "table_sb"])
def _append(
    K_NEW, V_NEW, K, V, SEQLENS, TABLE, COS, SIN,
    kn_sb, kn_st, kn_sh, vn_sb, vn_st, vn_sh, k_sb, k_st, k_sh, v_sb, v_st, v_sh, table_sb, cos_p, sin_p,
    new, heads, capacity, positions,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, PAGE: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """BLOCK_H heads of one new token: K turned, both written behind the sequence."""
    batch = (tl.program_id(0) // new).to(tl.int64)
    token = tl.program_id(0) % new
    position = tl.load(SEQLENS + batch) + token
    held = (position >= 0) & (position < capacity)
    if TABLE is None:
        K += batch * k_sb
        V += batch * v_sb
    else:
        TABLE += batch * table_sb
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    wide = h.to(tl.int64)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    dv = tl.arange(0, BLOCK_V)[None, :]
    inside = (h < heads)[:, None] & (d < HEAD_DIM) & held  # [BLOCK_H, BLOCK_D]
    inside_v = (h < heads)[:, None] & (dv < VALUE_DIM) & held
    source = K_NEW + batch * kn_sb + token.to(tl.int64) * kn_st + wide * kn_sh
    k = tl.load(source + d, mask=inside, other=0.0)
    if COS is not None:
        at = position + tl.zeros([BLOCK_H], tl.int32)
        k = _turned(k, source, inside, at, COS, SIN, cos_p, sin_p, positions, R, INTERLEAVED)
    v = tl.load(V_NEW + batch * vn_sb + token.to(tl.int64) * vn_st + wide * vn_sh + dv, mask=inside_v, other=0.0)
    tl.store(K + _place_in(TABLE, position, held, k_sb, k_st, PAGE) + wide * k_sh + d, k, mask=inside)
    tl.store(V + _place_in(TABLE, position, held, v_sb, v_st, PAGE) + wide * v_sh + dv, v, mask=inside_v)


@triton.jit
def _walk_cache(
    acc, peak, total, q, K, V, TABLE, begin, end, lowest, bound, row, valid, offset, k_sb, k_st, v_sb, v_st, slope,
    scale_in, scale_out, left, right,
    CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, ALIBI: tl.constexpr,
    CHECK: tl.constexpr, SCAN: tl.constexpr, PAGE: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Keys begin … end in steps of BLOCK_N; those outside lowest … bound are seen by no row and stay unread."""
    # The few tiles at the edges are not worth a pipeline's registers and shared memory.
    STAGES: tl.constexpr = 1 if CHECK else None
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_V)
    n = tl.arange(0, BLOCK_N)
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        column = start + n
        inside = (column >= lowest) & (column < bound)
        k_place = K + _place_in(TABLE, column, inside, k_sb, k_st, PAGE)[:, None] + d[None, :]
        v_place = V + _place_in(TABLE, column, inside, v_sb, v_st, PAGE)[:, None] + dv[None, :]
        k_mask = (d < HEAD_DIM)[None, :]
        v_mask = (dv < VALUE_DIM)[None, :]
        if CHECK:
            k_mask = k_mask & inside[:, None]
            v_mask = v_mask & inside[:, None]
        k = tl.load(k_place, mask=k_mask, other=0.0)  # [BLOCK_N, BLOCK_D]
        # Transposed here, as in `forward`: the same product in the same order.
        qk = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        if SCAN:
            # Keys that only some rows see: their NaN and Inf must not meet the zero weights of the others.
            sound = sound_rows(v_place, v_mask)
            qk = tl.where(sound[None, :], qk, float("nan"))
            v_mask = v_mask & sound[:, None]
        v = tl.load(v_place, mask=v_mask, other=0.0)  # [BLOCK_N, BLOCK_V]
        scores, seen, _ = score_tile(
            qk, row[:, None], column[None, :], valid[:, None], inside[None, :], 0.0, offset, None, 0, 0, slope,
            scale_in, scale_out, left, right, CAUSAL, LEFT, RIGHT, False, False, SOFTCAP, ALIBI, CHECK,
        )  # fmt: skip
        if CHECK:
            scores = tl.where(seen, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp2(scores - base[:, None])
        fade = tl.exp2(peak - base)
        total = total * fade + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
        peak = new_peak
    return acc, peak, total


@launcher
@triton.jit(
    do_not_specialize=["tiles", "q_len", "new", "capacity", "positions", "splits", "left", "right", "table_sb"]
)  # fmt: skip
def _attend(
    Q, K, V, OUT, LSE, SEQLENS, TABLE, SLOPES, SINKS, COS, SIN,
    q_sb, q_st, q_sh, k_sb, k_st, k_sh, v_sb, v_st, v_sh, table_sb, slope_b, cos_p, sin_p,
    tiles, kv_heads, q_len, new, capacity, positions, splits, scale_in, scale_out, left, right,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
    SINGLE: tl.constexpr, FINAL: tl.constexpr, PAGE: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of rows over one split of its keys; SINGLE: all of one query.

    FINAL (a single split): OUT (B, Sq, H, Dv), LSE (B, H, Sq). Otherwise what `combine` takes, by row and split:
    OUT (B, Sq, H, splits, Dv), not yet divided by the sum of weights; LSE (B, Sq, H, splits, 2): the largest score in
    base 2, and that sum.
    """
    program = tl.program_id(0)
    split = program % splits
    tile = program // splits % tiles
    kv_head = program // splits // tiles % kv_heads
    batch = program // splits // tiles // kv_heads
    far = batch.to(tl.int64)
    k_len = tl.minimum(tl.maximum(tl.load(SEQLENS + batch) + new, 0), capacity)
    offset = k_len - q_len

    # row: the query's number; valid: not padding; first, last: queries of the tile.
    if SINGLE:
        first = tile // tl.cdiv(GROUP, BLOCK_M)
        last = first
        r = tile % tl.cdiv(GROUP, BLOCK_M) * BLOCK_M + tl.arange(0, BLOCK_M)
        valid = r < GROUP
        row = tl.zeros([BLOCK_M], tl.int32) + first
        head = kv_head * GROUP + r
    else:
        first = tile * BLOCK_M // GROUP
        last = (tl.minimum(tile * BLOCK_M + BLOCK_M, q_len * GROUP) - 1) // GROUP
        r = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        valid = r < q_len * GROUP
        row = r // GROUP
        head = kv_head * GROUP + r % GROUP
    # Within the range of a single query there is nothing to hide, and a key is seen by all rows or by none.
    CUT: tl.constexpr = CAUSAL and not SINGLE
    CUT_LEFT: tl.constexpr = LEFT and not SINGLE
    CUT_RIGHT: tl.constexpr = RIGHT and not SINGLE
    SCAN: tl.constexpr = CUT or CUT_LEFT or CUT_RIGHT
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_V)
    place = Q + far * q_sb + (row.to(tl.int64) * q_st + head.to(tl.int64) * q_sh)[:, None]
    inside = valid[:, None] & (d < HEAD_DIM)[None, :]
    q = tl.load(place + d[None, :], mask=inside, other=0.0)  # [BLOCK_M, BLOCK_D]
    if COS is not None:
        q = _turned(q, place, inside, row + offset, COS, SIN, cos_p, sin_p, positions, R, INTERLEAVED)
    slope = tl.zeros([BLOCK_M, 1], tl.float32)
    ALIBI: tl.constexpr = SLOPES is not None
    if ALIBI:
        slope = tl.load(SLOPES + far * slope_b + head, mask=valid, other=0.0).to(tl.float32)[:, None] * LOG2E
    K += kv_head.to(tl.int64) * k_sh
    V += kv_head.to(tl.int64) * v_sh
    if TABLE is None:
        K += far * k_sb
        V += far * v_sb
    else:
        TABLE += far * table_sb

    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if FINAL and SINKS is not None:
        peak = tl.load(SINKS + head, mask=valid, other=float("-inf")).to(tl.float32) * LOG2E
        total = tl.where(peak == float("-inf"), 0.0, 1.0)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    lowest, full_begin, full_end, bound = key_range(first, last, offset, k_len, left, right, CAUSAL, LEFT, RIGHT)
    # Whole tiles that every row sees lie between full_begin and full_end.
    begin = lowest // BLOCK_N * BLOCK_N
    full_begin = tl.minimum(tl.cdiv(full_begin, BLOCK_N) * BLOCK_N, bound)
    full_end = tl.maximum(full_end // BLOCK_N * BLOCK_N, full_begin)
    # This split's share of the tiles.
    share = tl.cdiv(tl.cdiv(tl.maximum(bound - begin, 0), BLOCK_N), splits) * BLOCK_N
    begin += split * share
    end = tl.minimum(begin + share, bound)
    if LEFT:
        acc, peak, total = _walk_cache(
            acc, peak, total, q, K, V, TABLE, begin, tl.minimum(end, full_begin), lowest, bound, row, valid, offset,
            k_sb, k_st, v_sb, v_st, slope, scale_in, scale_out, left, right,
            CUT, CUT_LEFT, CUT_RIGHT, SOFTCAP, ALIBI, True, SCAN, PAGE, HEAD_DIM, VALUE_DIM, BLOCK_N, BLOCK_D,
            BLOCK_V, PRECISION,
        )  # fmt: skip
    acc, peak, total = _walk_cache(
        acc, peak, total, q, K, V, TABLE, tl.maximum(begin, full_begin), tl.minimum(end, full_end), lowest, bound, row,
        valid, offset, k_sb, k_st, v_sb, v_st, slope, scale_in, scale_out, left, right,
        False, False, False, SOFTCAP, ALIBI, False, False, PAGE, HEAD_DIM, VALUE_DIM, BLOCK_N, BLOCK_D, BLOCK_V,
        PRECISION,
    )  # fmt: skip
    acc, peak, total = _walk_cache(
        acc, peak, total, q, K, V, TABLE, tl.maximum(begin, full_end), end, lowest, bound, row,
        valid, offset, k_sb, k_st, v_sb, v_st, slope, scale_in, scale_out, left, right,
        CUT, CUT_LEFT, CUT_RIGHT, SOFTCAP, ALIBI, True, SCAN, PAGE, HEAD_DIM, VALUE_DIM, BLOCK_N, BLOCK_D, BLOCK_V,
        PRECISION,
    )  # fmt: skip

    heads = kv_heads * GROUP
    result = (far * q_len + row) * heads + head  # [BLOCK_M]
    if FINAL:
        empty = total == 0.0
        total = tl.where(empty, 1.0, total)
        acc = acc / total[:, None]
        lse = tl.where(empty, float("-inf"), peak * LN2 + tl.log(total))
        tl.store(LSE + (far * heads + head) * q_len + row, lse, mask=valid)
    else:
        result = result * splits + split
        tl.store(LSE + result * 2, peak, mask=valid)
        tl.store(LSE + result * 2 + 1, total, mask=valid)
    tl.store(
        OUT + result[:, None] * VALUE_DIM + dv[None, :],
        acc.to(OUT.dtype.element_ty),
        mask=valid[:, None] & (dv < VALUE_DIM)[None, :],
    )


class Rules(NamedTuple):
    """The numbers of a call: as `fastformer.ops.attention.options.Options`, with the layout of rotary pairs."""

    causal: bool
    scale: float
    left: int
    right: int
    softcap: float
    interleaved: bool


Decode = Callable[..., tuple[Tensor, Tensor]]
_KEPT = 256
_bound: dict[Any, Decode] = {}


def forget() -> None:
    """Choose and prepare anew from now on, as after a change of the tiles."""
    _bound.clear()


def attention_decode(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seqlens: Tensor,
    table: Tensor | None,
    k: Tensor | None,
    v: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    slopes: Tensor | None,
    sinks: Tensor | None,
    rules: Rules,
) -> tuple[Tensor, Tensor]:
    """Append k and v to the cache, attend to all of it.

    Args:
        query: (B, Sq, H, D). k_cache, v_cache: (B, S, Hk, D or Dv), or with table (P, page, Hk, D or Dv).
        seqlens: int32 (B,), tokens cached before this call. table: int32 (B, N). k, v: (B, Sn, Hk, D or Dv) or None.
        cos, sin: (positions, R / 2), or None; they turn query and k. All of the above have a last stride of 1.
        slopes: (H,) or (B, H), contiguous; sinks: (H,), contiguous; or None.

    Returns:
        output (B, Sq, H, Dv), LSE (B, H, Sq) fp32, contiguous.
    """
    tensors = (query, k_cache, v_cache, seqlens, table, k, v, cos, sin, slopes, sinks)
    return bind_decode(*tensors, rules)(*tensors)


def bind_decode(*arguments: Any) -> Decode:
    """`attention_decode` of calls whose tensors are laid out like these, as a function of the tensors alone.

    Args:
        arguments: as `attention_decode` takes them.
    """
    *tensors, rules = arguments
    target = target_of(tensors[0].device)
    signature = (
        target,
        tensors[0].device,
        rules,
        *[None if x is None else (x.shape, x.stride(), x.dtype) for x in tensors],
    )  # fmt: skip
    found = _bound.get(signature)
    if found is None:
        if len(_bound) >= _KEPT:
            _bound.clear()
        found = _bound[signature] = _bind(target, *arguments)
    return found


def _bind(
    target: Target,
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seqlens: Tensor,
    table: Tensor | None,
    k: Tensor | None,
    v: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    slopes: Tensor | None,
    sinks: Tensor | None,
    rules: Rules,
) -> Decode:
    batch, q_len, heads, head_dim = query.shape
    kv_heads, value_dim = k_cache.shape[2], v_cache.shape[3]
    page = 0 if table is None else k_cache.shape[1]
    capacity = k_cache.shape[1] if table is None else page * table.shape[1]
    new = 0 if k is None else k.shape[1]
    group = heads // max(1, kv_heads)
    block_d, block_v = (max(16, power_of_two(n)) for n in (head_dim, value_dim))
    # A side as long as the sequences bounds nothing; left in, it would overflow the kernels' 32-bit positions.
    left, right = (-1 if side >= max(q_len, capacity) else side for side in (rules.left, rules.right))
    causal = rules.causal and q_len > 1  # the last token sees everything
    width = max(block_d, block_v)
    single = q_len == 1 or width > widest_of_several(target, query.dtype)
    rows, alike = (group, q_len) if single else (q_len * group, 1)
    config = decode_config(target, width, query.dtype, single, rows, capacity)
    tiles = max(1, cdiv(rows, config.block_m) * alike)
    keys = capacity
    if left >= 0 and (rules.causal or right >= 0):
        keys = min(capacity, left + q_len + max(right, 0))
    splits = count_splits(target, batch * kv_heads * tiles, keys, config.block_n)
    table_stride = 0 if table is None else table.stride(0)
    angles = (0, 0, 0) if cos is None or sin is None else (cos.stride(0), sin.stride(0), cos.shape[0])
    rotary = {"R": 0 if cos is None else 2 * cos.shape[1], "INTERLEAVED": rules.interleaved}
    sizes = {"PAGE": page, "HEAD_DIM": head_dim, "VALUE_DIM": value_dim, "BLOCK_D": block_d, "BLOCK_V": block_v}
    caches = (*k_cache.stride()[:3], *v_cache.stride()[:3])
    append: Bound | None = None
    if k is not None and v is not None and k.numel():
        block_h = min(power_of_two(kv_heads), max(1, 2048 // max(block_d, block_v)))
        append_others = (
            *k.stride()[:3], *v.stride()[:3], *caches, table_stride, *angles[:2], new, kv_heads, capacity, angles[2],
        )  # fmt: skip
        grid = (batch * new, cdiv(kv_heads, block_h))
        append = Bound(_append, grid, append_others, {**sizes, **rotary, "BLOCK_H": block_h, "num_warps": 4})
    scales = (rules.scale / rules.softcap, rules.softcap * _LOG2E) if rules.softcap else (rules.scale * _LOG2E, 1.0)
    others = (
        *query.stride()[:3], *caches, table_stride, slopes.shape[-1] if slopes is not None and slopes.ndim == 2 else 0,
        *angles[:2], tiles, kv_heads, q_len, new, capacity, angles[2], splits, *scales, left, right,
    )  # fmt: skip
    constants = {
        "GROUP": group,
        "CAUSAL": causal,
        "LEFT": left >= 0,
        "RIGHT": right >= 0,
        "SOFTCAP": rules.softcap != 0.0,
        "SINGLE": single,
        "FINAL": splits == 1,
        "PRECISION": "ieee",  # fp32 is fp32: no TF32 rounding of the inputs
        **sizes,
        **rotary,
        **config.options(target),
    }
    attend = Bound(_attend, (splits * tiles * kv_heads * batch,), others, constants)
    combine = bind_combine(batch * q_len, heads, q_len, splits, value_dim)
    device, dtype = query.device, query.dtype
    out_shape, lse_shape = (batch, q_len, heads, value_dim), (batch, heads, q_len)
    part_shape, stats_shape = (batch, q_len, heads, splits, value_dim), (batch, q_len, heads, splits, 2)
    empty = math.prod(lse_shape) == 0

    def run(
        query: Tensor, k_cache: Tensor, v_cache: Tensor, seqlens: Tensor, table: Tensor | None, k: Tensor | None,
        v: Tensor | None, cos: Tensor | None, sin: Tensor | None, slopes: Tensor | None, sinks: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        out = torch.empty(out_shape, dtype=dtype, device=device)
        lse = torch.empty(lse_shape, dtype=torch.float32, device=device)
        if append is not None:
            append.launch(k, v, k_cache, v_cache, seqlens, table, cos, sin)
        if empty:
            return out, lse
        if splits == 1:
            attend.launch(query, k_cache, v_cache, out, lse, seqlens, table, slopes, sinks, cos, sin)
            return out, lse
        part = torch.empty(part_shape, dtype=torch.float32, device=device)
        stats = torch.empty(stats_shape, dtype=torch.float32, device=device)
        attend.launch(query, k_cache, v_cache, part, stats, seqlens, table, slopes, sinks, cos, sin)
        combine.launch(part, stats, out, lse, sinks)
        return out, lse

    return run
