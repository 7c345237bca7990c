"""Fixtures of the operator tests."""

import math

import pytest
import torch


@pytest.fixture
def poisoned(monkeypatch):
    """torch.empty and its kin hand out NaN (integers: a large value, bools: True), so an element no kernel writes is
    seen."""

    def poison(make):
        def made(*args, **kwargs):
            tensor = make(*args, **kwargs)
            if tensor.device.type == "meta":
                return tensor
            if tensor.dtype == torch.bool:
                return tensor.fill_(True)
            return tensor.fill_(math.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)

        return made

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
