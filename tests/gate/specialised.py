"""Whether a warp-specialised Hopper kernel became what it was written for."""

from __future__ import annotations

import re
import subprocess
import tempfile

from triton import knobs


def machine_code(cubin: bytes) -> str:
    """Disassembly of a kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def lost_specialisation(ttgir: str, ptx: str, sass: str) -> tuple[str, ...]:
    """Warnings for a kernel with producer and consumer warps that misses one of its means.

    Args:
        ttgir: Triton's GPU IR; `requestedRegisters` names what each worker partition is to have.
        ptx: there `setmaxnreg` moves registers between partitions.
        sass: its disassembly; there HGMMA is a wgmma, UTMALDG a TMA load, and a DEPBAR with a bound above 0 a wait that
            leaves a product under way.
    """
    requested = re.search(r"requestedRegisters = array<i32: ([\d, ]+)>", ttgir)
    if requested is None:
        return ()
    found = []
    for name, pattern in (
        ("wgmma", r"\bHGMMA\."),
        ("TMA load", r"\bUTMALDG\."),
        ("overlap", r"DEPBAR\.LE gsb0, 0x[1-9]"),
    ):
        if not re.search(pattern, sass):
            found.append(f"no {name} in the machine code")
    if lonely_arrivals(ptx):
        found.append(f"{lonely_arrivals(ptx)} arrivals at an mbarrier without a barrier of the partition before them")
    for registers in requested.group(1).split(", "):
        if not re.search(rf"setmaxnreg\.\w+\.sync\.aligned\.u32\s+{registers};", ptx):
            found.append(f"no partition gets the {registers} registers asked for")
    return tuple(found)


def lonely_arrivals(ptx: str) -> int:
    """How many arrivals of one thread stand for a partition whose other warps may not be there yet.

    One elected thread arrives for all four warps, so a `bar.sync` of the partition has to come first, and between the
    two nothing may touch memory: Triton puts it there, and the kernels rely on it.
    """
    alone, synchronised = 0, False
    for line in ptx.splitlines():
        if re.search(r"\bbar(rier)?\.sync\b", line):
            synchronised = True
        elif re.search(r"\bmbarrier\.arrive\.(?!expect_tx)", line):
            alone += not synchronised
        elif re.search(r"\b(ld|st|red|atom|stmatrix|ldmatrix|wgmma|cp)\.", line) or re.match(r"\$\w+:", line):
            synchronised = False
    return alone
