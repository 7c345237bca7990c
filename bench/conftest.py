"""The benchmarks' machine and ceilings go into pytest-benchmark's JSON, for `fastformer bench report`."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    from bench.gpu.machine import this_machine
    from bench.operators import ceilings

    output_json["fastformer"] = {"machine": this_machine().as_dict(), "ceilings": ceilings()}
