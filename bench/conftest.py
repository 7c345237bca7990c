"""The benchmarks' machine and ceilings go into pytest-benchmark's JSON, for `fastformer bench report`."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """On a CPU the process's own time: other work on the machine moves it less than the clock's."""
    if not torch.cuda.is_available():
        for item in items:
            item.add_marker(pytest.mark.benchmark(timer=time.process_time))


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    from bench.gpu.machine import this_machine
    from bench.operators import ceilings

    output_json["fastformer"] = {"machine": this_machine().as_dict(), "ceilings": ceilings()}
