"""A CPU simulator of the part of Gluon (triton.experimental.gluon, sm_90) that fastformer's kernels use.

A kernel's own source runs, unmodified, on CPU tensors: `kernel(name, function)` executes the module with simulated
`triton` modules in place of the real ones. What is asynchronous on a GPU is asynchronous here: partitions of
`warp_specialize` take turns, TMA copies land, at moments that a seed chooses. A fault of the protocol is an exception:

    Deadlock        every partition waits and no copy is under way
    WrongPhase      a wait that passes on a phase the partition has seen already, or that missed one; too many arrivals
    Unlanded        shared memory read before its copy has landed, or without waiting for whoever wrote it
    Unreleased      shared memory written while it may still be read or written by somebody else
    Unfenced        tensor cores or TMA reading what threads wrote, without the fence between
    Unwaited        an accumulator or a register operand used or dropped before the wgmma that holds it is waited for
    OutOfBounds     a tile, pointer or buffer index outside its tensor
    Contended       an element of memory that two programs write
    Misused         shapes, dtypes or sizes that the hardware does not take

Ordering is checked with vector clocks (Mattern 1989), so that an interleaving that happens to go well hides nothing:
whoever reads or writes must have learnt through barriers that the accesses before are over.

Layouts are those of Triton and cost nothing here; the compiler checks them (tests/gate).
"""

from .faults import (
    Contended,
    Deadlock,
    Fault,
    Misused,
    OutOfBounds,
    Unfenced,
    Unlanded,
    Unreleased,
    Unwaited,
    WrongPhase,
)
from .source import kernel

__all__ = [
    "Contended",
    "Deadlock",
    "Fault",
    "Misused",
    "OutOfBounds",
    "Unfenced",
    "Unlanded",
    "Unreleased",
    "Unwaited",
    "WrongPhase",
    "kernel",
]
