"""How the keys of a sequence are divided over programs, and the kernel that merges what each of them leaves."""

import triton
import triton.language as tl

from fastformer.kernels.attention.score import LN2, LOG2E
from fastformer.kernels.launch import Bound, launcher
from fastformer.kernels.rows import cdiv, power_of_two
from fastformer.kernels.targets import Target

# Most programs that share a sequence's keys, and the fewest tiles of keys that are worth a program.
MOST_SPLITS = 64
TILES_A_SPLIT = 4


def count_splits(target: Target, programs: int, keys: int, block_n: int) -> int:
    """Into how many parts the keys of a sequence are divided: about two programs a multiprocessor, none too short.

    Args:
        programs: of the launch without splits.
        keys: most that a row may see.
        block_n: keys in a tile.
    """
    return max(1, min(2 * target.multiprocessors // max(programs, 1), cdiv(keys, TILES_A_SPLIT * block_n), MOST_SPLITS))


@launcher
@triton.jit(do_not_specialize=["heads", "q_len", "splits"])
def _combine(
    PART, STATS, OUT, LSE, SINKS, heads, q_len, splits,
    VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_S: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One row: with (m_s, t_s) the largest score and the sum of weights of split s, and m the largest of all,
    out = sum_s 2^(m_s - m) part_s / sum_s 2^(m_s - m) t_s. What a split that saw nothing left stays unread.

    PART (B, Sq, H, splits, Dv), STATS (B, Sq, H, splits, 2), OUT (B, Sq, H, Dv), LSE (B, H, Sq).
    """
    row = tl.program_id(0).to(tl.int64)  # (batch * q_len + query) * heads + head
    head = row % heads
    s = tl.arange(0, BLOCK_S)
    peaks = tl.load(STATS + (row * splits + s) * 2, mask=s < splits, other=float("-inf"))
    totals = tl.load(STATS + (row * splits + s) * 2 + 1, mask=s < splits, other=0.0)
    peak = tl.max(peaks, 0)
    if SINKS is not None:
        sink = tl.load(SINKS + head).to(tl.float32) * LOG2E
        peak = tl.maximum(peak, sink)
    peak = tl.where(peak == float("-inf"), 0.0, peak)
    total = tl.sum(tl.exp2(peaks - peak) * totals, 0)
    if SINKS is not None:
        total += tl.exp2(sink - peak)
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    dv = tl.arange(0, BLOCK_V)
    acc = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, splits, CHUNK):
        c = start + tl.arange(0, CHUNK)
        weight = tl.exp2(tl.load(STATS + (row * splits + c) * 2, mask=c < splits, other=float("-inf")) - peak)
        some = tl.load(STATS + (row * splits + c) * 2 + 1, mask=c < splits, other=0.0) != 0.0  # NaN is something
        part = tl.load(
            PART + (row * splits + c)[:, None] * VALUE_DIM + dv[None, :],
            mask=some[:, None] & (dv < VALUE_DIM)[None, :],
            other=0.0,
        )  # [CHUNK, BLOCK_V]
        acc += tl.sum(weight[:, None] * part, 0)
    query = row // heads % q_len
    batch = row // heads // q_len
    lse = tl.where(empty, float("-inf"), peak * LN2 + tl.log(total))
    tl.store(LSE + (batch * heads + head) * q_len + query, lse)
    tl.store(OUT + row * VALUE_DIM + dv, (acc / total).to(OUT.dtype.element_ty), mask=dv < VALUE_DIM)


def bind_combine(tokens: int, heads: int, q_len: int, splits: int, value_dim: int) -> Bound:
    """The launch over `tokens` queries of all sequences, on (part, stats, out, lse, sinks)."""
    block_v = max(16, power_of_two(value_dim))
    constants = {
        "VALUE_DIM": value_dim,
        "BLOCK_V": block_v,
        "BLOCK_S": power_of_two(splits),
        "CHUNK": max(1, min(16, 4096 // block_v)),
        "num_warps": 4,
    }
    return Bound(_combine, (tokens * heads,), (heads, q_len, splits), constants)
