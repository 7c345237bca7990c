"""What row-wise kernels share: how a tensor is seen as rows, how many programs walk over them, how partial sums end.

A gradient that sums over rows (a weight's, a bias's) goes through a bounded number of fp32 partial rows, one a
program, which `sum_partials` adds up in a fixed order: the result is the same on every run.
"""

import functools
import itertools
import operator
from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastformer.kernels.launch import Bound, launcher
from fastformer.kernels.targets import Target, target_of

TL_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def power_of_two(n: int) -> int:
    """Smallest power of two that is at least n (triton.next_power_of_2 costs a launcher ten times as much)."""
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def as_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """A tensor with unit stride in its last dimension, and the distance between its rows in elements.

    Strided rows are used where they lie; only a layout no row stride can describe is copied.
    """
    distance = row_stride(tensor)
    return (tensor, distance) if distance is not None else (tensor.contiguous(), tensor.shape[-1])


def row_stride(tensor: Tensor) -> int | None:
    """The one distance between neighbouring rows, in elements; None where there is none or a row has gaps."""
    n = tensor.shape[-1]
    if tensor.is_contiguous():
        return n
    strides = tensor.stride()
    if n > 1 and strides[-1] != 1:
        return None
    distance, rows = None, 1
    for size, stride in zip(tensor.shape[-2::-1], strides[-2::-1], strict=True):
        if size == 1:
            continue
        if distance is None:
            distance = stride
        elif stride != distance * rows:
            return None
        rows *= size
    return n if distance is None else distance


def in_rows(tensor: Tensor | None) -> Tensor | None:
    """`as_rows` without the distance, of what may be None."""
    return None if tensor is None else as_rows(tensor)[0]


def dense_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a contiguous tensor."""
    return tuple(itertools.accumulate(shape[:0:-1], operator.mul, initial=1))[::-1] if shape else ()


def room(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Callable[[], Tensor]:
    """What allocates a contiguous tensor."""
    return functools.partial(torch.empty_strided, tuple(shape), dense_strides(shape), dtype=dtype, device=device)


def room_beside(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, distance: int, other: torch.dtype | None
) -> Callable[[Tensor], Tensor]:
    """What allocates a contiguous tensor, given one of dtype `other` whose rows lie `distance` elements apart: where
    that is the same, at two thirds of the cost."""
    if distance == shape[-1] and other == dtype:
        return torch.empty_like
    new = room(shape, dtype, device)
    return lambda _: new()


def walkers(target: Target, tiles: int) -> int:
    """Programs that walk over `tiles` row tiles and keep one partial row each: at most two a multiprocessor."""
    return min(tiles, 2 * target.multiprocessors)


@functools.cache
def shape_of_program(target: Target, elements: int, each: int, registers: int) -> dict[str, int]:
    """Launch options of a program that holds `elements` of every tensor, about `each` of them a thread.

    Args:
        registers: most a thread may use. Left alone, ptxas now and then aims at an occupancy of its own and spills a
            register or two to reach it.
    """
    wanted = power_of_two(elements // (each * target.warp_size))
    options = {"num_warps": min(wanted, 512 // target.warp_size)}
    if target.backend == "cuda":
        options["maxnreg"] = registers
    return options


@launcher
@triton.jit(do_not_specialize=["count"])
def _sum_partials(PARTIAL, FIRST, SECOND, count, N, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    """FIRST[n] = sum_p PARTIAL[p, n], SECOND likewise from the rows after by the programs of grid axis 1."""
    group = tl.program_id(1)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    for start in range(0, count, BLOCK_P):
        row = start + tl.arange(0, BLOCK_P)
        place = (group * count + row).to(tl.int64)[:, None] * N + column[None, :]
        total += tl.load(PARTIAL + place, mask=(row < count)[:, None] & (column < N)[None, :], other=0.0)
    result = tl.sum(total, 0)
    if group == 0:
        tl.store(FIRST + column, result, mask=column < N)
    else:
        tl.store(SECOND + column, result, mask=column < N)


@functools.lru_cache(maxsize=1024)
def sum_partials(
    aim: Target, device: torch.device, rows: int, n: int, dtypes: tuple[torch.dtype, ...]
) -> Callable[[Tensor], list[Tensor]]:
    """What sums fp32 partial rows.

    Args:
        rows, n: shape of the partial rows, contiguous: those of the first sum, then as many of the second.
        dtypes: one or two, of the results.

    Returns:
        a function from the partial rows to one (N,) tensor for each dtype.
    """
    count = len(dtypes)
    bound = Bound(_sum_partials, (cdiv(n, 32), count), (rows // count, n, 64, 32), shape_of_program(aim, 2048, 16, 128))

    new_first, new_second = (room((n,), dtype, device) for dtype in (dtypes[0], dtypes[-1]))

    def run(partial: Tensor) -> list[Tensor]:
        first = new_first()
        if count == 1:
            bound.launch(partial, first, first)
            return [first]
        second = new_second()
        bound.launch(partial, first, second)
        return [first, second]

    return run


def target(tensor: Tensor) -> Target:
    """Target of a tensor's device."""
    return target_of(tensor.device)
