"""The machine a result belongs to, and its ceilings: what no kernel on it can beat."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bench.gpu.place import device, rehearsing
from bench.gpu.timing import host_time, median_time

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Machine:
    """Names and versions that every result carries; equal machines have comparable results.

    Attributes:
        device: the GPU's name as its driver gives it, the CPU's where there is none, or "CPU rehearsal".
        driver: version of the GPU's driver, "none" without one.
        torch, triton, transformers, python: versions, "not installed" where missing.
        commit: git commit of this tree, with "+" if it was changed since; COMMIT=... names it where there is no git.
        sources: hash of the library's sources, so that results of another version are never taken for this one's.
    """

    device: str
    driver: str
    torch: str
    triton: str
    transformers: str
    python: str
    commit: str
    sources: str

    def as_dict(self) -> dict[str, str]:
        return asdict(self)

    @property
    def folder(self) -> str:
        """Name of this device's folder under bench/results."""
        return self.device.lower().replace(" ", "-").replace("/", "-")


@functools.cache
def this_machine() -> Machine:
    cuda = torch.cuda.is_available() and not rehearsing()
    return Machine(
        device="CPU rehearsal" if rehearsing() else torch.cuda.get_device_name(0) if cuda else processor(),
        driver=_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
        if cuda
        else "none",
        torch=torch.__version__,
        triton=_version("triton"),
        transformers=_version("transformers"),
        python=platform.python_version(),
        commit=os.environ.get("COMMIT") or _commit(),
        sources=_source_hash(),
    )


def ceilings() -> dict[str, float]:
    """The machine's own limits, measured now.

    Returns:
        matmul_tflops: bf16 matrix product on random data (fp32 on a CPU).
        copy_gbs: device-to-device copy, bytes read plus bytes written.
        launch_us: host time of one eager elementwise launch.
        graph_us: device time of one tiny kernel inside a replayed graph.
    """
    where, tiny = device(), rehearsing()
    size = 256 if tiny else 8192
    dtype = torch.float32 if tiny else torch.bfloat16
    pairs = [tuple(torch.randn(size, size, device=where, dtype=dtype) for _ in range(2)) for _ in range(2)]
    product = median_time([functools.partial(torch.mm, a, b) for a, b in pairs])
    count = 1 << (16 if tiny else 30)
    source, target = (torch.randint(0, 100, (count,), device=where, dtype=torch.int8) for _ in range(2))
    copy = median_time([functools.partial(target.copy_, source), functools.partial(source.copy_, target)])
    small = torch.randn(8, device=where)
    burst = 4 if tiny else 256
    return {
        "matmul_tflops": 2 * size**3 / product.seconds / 1e12,
        "copy_gbs": 2 * count / copy.seconds / 1e9,
        "launch_us": host_time(lambda: small.add_(1.0)) * 1e6,
        "graph_us": median_time([functools.partial(small.add_, 1.0)] * burst).seconds * 1e6,
    }


def processor() -> str:
    """The CPU's name with "CPU" before it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"CPU {re.sub(r'[(](R|TM)[)]', '', name)}"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _commit() -> str:
    head = _output("git", "rev-parse", "--short=12", "HEAD")
    if head == "unknown":
        return head
    return head + ("+" if _output("git", "status", "--porcelain", "--", "kernels", "fastformer") else "")


def _source_hash() -> str:
    digest = hashlib.sha256()
    for folder in ("kernels", "fastformer", "bench/gpu"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
