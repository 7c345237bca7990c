"""Fixtures of the whole suite.

The operator tests (tests/ops) run in three ways from the same files:
- on the CPU through PyTorch's operators (the default);
- on the CPU through Triton's interpreter: TRITON_INTERPRET=1 FASTFORMER_BACKEND=triton, in a process of its own;
- on a GPU through the compiled kernels: FASTFORMER_TEST_DEVICE=cuda.
"""

import os
from pathlib import Path

import pytest
import torch

# Tests are small: a second thread of PyTorch's costs more than it gives, and spins while others work.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device(os.environ.get("FASTFORMER_TEST_DEVICE", "cpu"))


@pytest.fixture(scope="session")
def interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data named by FASTFORMER_DATA; the test is skipped where it is unset."""
    folder = os.environ.get("FASTFORMER_DATA")
    if not folder:
        pytest.skip("FASTFORMER_DATA is unset: no real data to test on")
    path = Path(folder)
    if not path.is_dir():
        pytest.fail(f"FASTFORMER_DATA names {folder}, which is no folder")
    return path
