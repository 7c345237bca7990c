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
    for registers in requested.group(1).split(", "):
        if not re.search(rf"setmaxnreg\.\w+\.sync\.aligned\.u32\s+{registers};", ptx):
            found.append(f"no partition gets the {registers} registers asked for")
    return tuple(found)
