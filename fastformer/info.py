"""What runs on this machine, and why."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import asdict, dataclass

import torch

from fastformer.ops.backend import backend_for, forced_backend, triton_status
from fastformer.version import __version__


@dataclass(frozen=True)
class Info:
    """Versions, devices and the backend chosen for each device.

    Attributes:
        versions: of fastformer, Python, torch, triton, transformers; "not installed" where missing.
        devices: (device, backend, why).
        tokenizer: which tokenizer engine is there.
    """

    versions: dict[str, str]
    devices: list[tuple[str, str, str]]
    tokenizer: str

    def as_dict(self) -> dict[str, object]:
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{name:<14}{version}" for name, version in self.versions.items()]
        lines += [f"{device:<14}{backend}: {why}" for device, backend, why in self.devices]
        lines.append(f"{'tokenizer':<14}{self.tokenizer}")
        return "\n".join(lines)


def info() -> Info:
    """Backends chosen on this machine, and why (also: `fastformer info`)."""
    versions = {"fastformer": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "transformers"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    devices = [("cpu", *_choice(torch.device("cpu")))]
    for index in range(torch.cuda.device_count()):
        backend, why = _choice(torch.device("cuda", index))
        devices.append((f"cuda:{index}", backend, f"{why}; {torch.cuda.get_device_name(index)}"))
    return Info(versions, devices, _tokenizer())


def _choice(device: torch.device) -> tuple[str, str]:
    forced = forced_backend()
    try:
        backend = backend_for(device)
    except RuntimeError as error:
        return "none", str(error)
    if forced != "auto":
        return backend, f"FASTFORMER_BACKEND={forced}"
    if device.type != "cuda":
        return backend, "PyTorch's own operators serve devices without Triton"
    return backend, triton_status()[1]


def _tokenizer() -> str:
    try:
        from fastformer.tokenizer import _bpe  # noqa: F401
    except ImportError as error:
        return f"C++ engine not built ({error})"
    return "C++ engine"
