"""Where this run happens: on the GPU, or on the CPU as a rehearsal."""

from __future__ import annotations

import os

import torch


def rehearsing() -> bool:
    """Whether this is a rehearsal: on the CPU, with tiny shapes."""
    return os.environ.get("FASTFORMER_REHEARSE") == "1"


def on_gpu() -> bool:
    return not rehearsing()


def device() -> torch.device:
    """Where tensors go.

    Raises:
        SystemExit: there is no CUDA GPU, and this is no rehearsal.
    """
    if rehearsing():
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise SystemExit("make gpu needs a CUDA GPU that PyTorch sees; make gpu-rehearsal runs the stages without one")
    return torch.device("cuda", 0)


def synchronize() -> None:
    if on_gpu():
        torch.cuda.synchronize()
