"""Several tensors rounded to another dtype in one launch, as a layer's parameters are under autocast: a cast of each by
itself takes longer to launch than to run."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastformer.kernels.gradients import chosen
from fastformer.kernels.launch import Prepared, launcher
from fastformer.kernels.rows import cdiv, shape_of_program
from fastformer.kernels.targets import Target, target_of

MOST = 8  # tensors in a launch
_BLOCK = 4096


@triton.jit
def _one_of(index, first, second, third, fourth, fifth, sixth, seventh, eighth):
    """One of eight numbers or pointers of one type, which keeps what all of them are divisible by."""
    lower = chosen(index, first, second, third, fourth)
    return tl.where(index < 4, lower, chosen(index - 4, fifth, sixth, seventh, eighth))


# Boundaries of runs of programs: whatever they are divisible by, nothing is aligned by them.
@launcher
@triton.jit(do_not_specialize=[f"end_{i}" for i in range(MOST - 1)])
def _cast(
    X_0, X_1, X_2, X_3, X_4, X_5, X_6, X_7, Y_0, Y_1, Y_2, Y_3, Y_4, Y_5, Y_6, Y_7,
    end_0, end_1, end_2, end_3, end_4, end_5, end_6, n_0, n_1, n_2, n_3, n_4, n_5, n_6, n_7, BLOCK: tl.constexpr,
):  # fmt: skip
    """Programs: BLOCK elements each of the first tensor, then of the second, …"""
    program = tl.program_id(0)
    index = (program >= end_0).to(tl.int32) + (program >= end_1).to(tl.int32) + (program >= end_2).to(tl.int32)
    index += (program >= end_3).to(tl.int32) + (program >= end_4).to(tl.int32) + (program >= end_5).to(tl.int32)
    index += (program >= end_6).to(tl.int32)
    first = _one_of(index, 0, end_0, end_1, end_2, end_3, end_4, end_5, end_6)
    n = _one_of(index, n_0, n_1, n_2, n_3, n_4, n_5, n_6, n_7)
    start = (program - first).to(tl.int64) * BLOCK
    place, inside = tl.arange(0, BLOCK), start + tl.arange(0, BLOCK) < n
    x = tl.load(_one_of(index, X_0, X_1, X_2, X_3, X_4, X_5, X_6, X_7) + start + place, mask=inside)
    y = _one_of(index, Y_0, Y_1, Y_2, Y_3, Y_4, Y_5, Y_6, Y_7)
    tl.store(y + start + place, x.to(y.dtype.element_ty), mask=inside)


def cast(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Contiguous copies of up to `MOST` contiguous tensors of one dtype, in another; one launch."""
    copies = [torch.empty(t.shape, dtype=dtype, device=t.device) for t in tensors]
    launch = _launch(target_of(tensors[0].device), tuple(t.numel() for t in tensors))
    # The last tensor stands in for those there are not.
    missing = MOST - len(tensors)
    launch(*tensors, *[tensors[-1]] * missing, *copies, *[copies[-1]] * missing)
    return copies


@functools.lru_cache(maxsize=1024)
def _launch(aim: Target, sizes: tuple[int, ...]) -> Any:
    ends = list(itertools.accumulate(cdiv(n, _BLOCK) for n in sizes))
    if not ends[-1]:
        return lambda *tensors: None
    missing = MOST - len(sizes)
    # Programs of an empty tensor's run there are none, also behind the last one.
    ends += ends[-1:] * missing
    sizes += sizes[-1:] * missing
    return Prepared(_cast, (ends[-1],), (*ends[:-1], *sizes, _BLOCK), shape_of_program(aim, _BLOCK, 16, 64))
