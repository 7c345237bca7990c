"""What a compiled kernel uses of its device, read from the compiler's own reports.

- NVIDIA: the log of `ptxas -v`, which Triton runs anyway.
- AMD: the code object's metadata at the end of the assembly (LLVM AMDGPU usage guide, "Code Object V5 Metadata").
- Both: Triton's metadata for shared memory, which neither compiler limits (an oversized kernel compiles, and fails at
  its first launch).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from fastformer.kernels.targets import Target

# Columns of tensor memory on Blackwell (PTX ISA, "Tensor Memory").
TENSOR_MEMORY = 512


@dataclass(frozen=True)
class Resources:
    """Resources of one kernel.

    Attributes:
        kernel: its name.
        registers: 32-bit registers a thread (VGPRs on AMD).
        spill: bytes of spill stores plus spill loads a thread, or on AMD the number of spilled registers.
        scratch: bytes of stack frame (private segment) a thread.
        shared: bytes of shared memory a block.
        tensor_memory: columns of tensor memory a block; 0 where there is none.
        warps, stages: the configuration it was compiled with.
        warnings: performance warnings of the compiler, and matrix products off the matrix units.
    """

    kernel: str
    registers: int
    spill: int
    scratch: int
    shared: int
    tensor_memory: int
    warps: int
    stages: int
    warnings: tuple[str, ...]

    def faults(self, target: Target) -> list[str]:
        """Why this kernel must not ship for `target`; empty if it may."""
        found = []
        if self.spill:
            unit = "registers" if target.backend == "hip" else "bytes"
            found.append(f"spills {self.spill} {unit}")
        if self.scratch:
            found.append(f"uses {self.scratch} bytes of scratch memory a thread")
        if self.shared > target.shared_memory:
            found.append(f"needs {self.shared} bytes of shared memory of {target.shared_memory}")
        if self.tensor_memory > TENSOR_MEMORY:
            found.append(f"needs {self.tensor_memory} columns of tensor memory of {TENSOR_MEMORY}")
        return found + list(self.warnings)

    def __str__(self) -> str:
        return (
            f"{self.kernel}: {self.registers} regs, {self.spill} spill, {self.shared} smem, "
            f"{self.warps} warps, {self.stages} stages"
        )


def from_ptxas(log: str) -> dict:
    """registers, spill, scratch and warnings out of a `ptxas -v` log.

    Raises:
        ValueError: the log lacks one of the figures (its format changed).
    """
    frame = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    registers = re.findall(r"Used (\d+) registers", log)
    if not frame or not registers:
        raise ValueError(f"no resource figures in the log of ptxas:\n{log}")
    # Serialised wgmma is warning C7510 to C7515 and so on by cause; the wording is what they share.
    warnings = [line.strip() for line in log.splitlines() if re.search(r"serializ|C75\d\d", line)]
    return {
        "registers": max(map(int, registers)),
        "spill": sum(int(stores) + int(loads) for _, stores, loads in frame),
        "scratch": sum(int(stack) for stack, _, _ in frame),
        "warnings": tuple(warnings),
    }


def lost_matrix_units(ttgir: str, target: Target, warps: int) -> tuple[str, ...]:
    """Warnings for 16-bit products that Hopper's or Blackwell's matrix units would take, but that run on the old ones.

    Args:
        ttgir: Triton's GPU IR of the kernel; there `tt.dot` is what became neither wgmma nor tcgen05.
        target: sm_90 and sm_100 have such units.
        warps: of the kernel; the units need four of them and 64 rows.
    """
    if target.name not in ("sm_90", "sm_100") or warps < 4:
        return ()
    shapes = re.findall(r"= tt\.dot .*-> tensor<(\d+)x(\d+)xf\d+", ttgir)
    operands = re.findall(r"= tt\.dot .*: tensor<\d+x\d+x(\w+)", ttgir)
    lost = [
        f"{rows}x{columns}"
        for (rows, columns), kind in zip(shapes, operands, strict=True)
        if int(rows) >= 64 and kind in ("f16", "bf16")
    ]
    return (
        (f"{len(lost)} products miss the {target.name} matrix units: {', '.join(sorted(set(lost)))}",) if lost else ()
    )


def from_amdgcn(assembly: str) -> dict:
    """registers, spill, scratch and warnings out of an AMDGPU assembly listing.

    Raises:
        ValueError: the metadata lacks one of the figures (its format changed).
    """

    def figure(name: str) -> int:
        values = re.findall(rf"^\s*\.{name}:\s*(\d+)\s*$", assembly, re.MULTILINE)
        if not values:
            raise ValueError(f"no .{name} in the AMDGPU metadata")
        return sum(map(int, values))

    return {
        "registers": figure("vgpr_count"),
        # Scalar registers spill into lanes of a vector register; where they reach memory, the scratch size says so.
        "spill": figure("vgpr_spill_count"),
        "scratch": figure("private_segment_fixed_size"),
        "warnings": (),
    }
