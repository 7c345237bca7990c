"""What needs a GPU to be proved. Without one (`make gpu-rehearsal`) the same tests run small on the CPU, so that the
hour on a GPU is not spent on their mistakes; outside both they are skipped."""

import os
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
DEVICE = os.environ.get("FASTFORMER_TEST_DEVICE", "cpu")
REHEARSING = os.environ.get("FASTFORMER_REHEARSE") == "1"


def pytest_collection_modifyitems(items):
    for item in items:
        if not Path(item.path).is_relative_to(HERE):
            continue
        if DEVICE == "cpu" and not REHEARSING:
            item.add_marker(pytest.mark.skip(reason="needs a GPU (make gpu) or a rehearsal (make gpu-rehearsal)"))
        elif DEVICE == "cpu" and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="nothing of it can be rehearsed without a GPU"))


@pytest.fixture(scope="session")
def tiny() -> bool:
    """Whether to use shapes that a rehearsal can afford."""
    return DEVICE == "cpu"


@pytest.fixture(scope="session")
def working_dtype(tiny) -> torch.dtype:
    # The interpreter's bf16 is not a GPU's.
    return torch.float16 if tiny else torch.bfloat16
