"""Host time of one eager call of every public operator, kernels excluded; see `bench.host`."""

from __future__ import annotations

import functools
from collections.abc import Callable

from bench.gpu.place import device, rehearsing
from bench.gpu.results import Row
from bench.host import ROUNDS, measure
from bench.subjects import NAMES


def cases() -> list[tuple[str, Callable[[], Row]]]:
    names = ("layer_norm", "pool_packed") if rehearsing() else NAMES
    return [("floor", floor), *((name, functools.partial(operator, name)) for name in names)]


def floor() -> Row:
    """An operator that does nothing: what autograd's own bookkeeping costs."""
    costs = _measure([])["floor"]
    return {"host_us": costs, "line": _line(costs)}


def operator(name: str) -> Row:
    costs = _measure([name])[name]
    return {"host_us": costs, "line": _line(costs)}


def _measure(names: list[str]) -> dict[str, dict[str, float]]:
    return measure(names, rounds=2 if rehearsing() else ROUNDS, device=device())


def _line(costs: dict[str, float]) -> str:
    return ", ".join(f"{kind} {value:.1f}" for kind, value in costs.items()) + " us"
