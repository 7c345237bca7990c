"""How far an operator's results may be from exact, for tests that hold for all of them (`bench.subjects`)."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_no_worse(ours: list[Tensor], stock: list[Tensor], exact: list[Tensor]) -> None:
    """Every error against `exact` is at most twice stock's plus an ulp of the dtype at the results' largest scale.

    The scale is that of all results together: a gradient that cancels to zero still carries the others' rounding.
    """
    scale = max((e.double().abs().max().item() for e in exact if e.numel()), default=0.0)
    for position, (a, b, e) in enumerate(zip(ours, stock, exact, strict=True)):
        if not e.numel():
            continue
        mine, theirs = ((t.double() - e.double()).abs().max().item() for t in (a, b))
        allowed = 2 * theirs + torch.finfo(a.dtype).eps * scale
        assert mine <= allowed, f"result {position}: error {mine:.3e}, allowed {allowed:.3e}"
