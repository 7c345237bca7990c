"""Sequences whose keys fit one tile: who takes those kernels, and that they say what the general ones say."""

import math

import pytest
import torch

pytest.importorskip("triton")

from fastformer.kernels.attention import call as calls
from fastformer.kernels.attention.backward import attention_backward
from fastformer.kernels.attention.call import Call
from fastformer.kernels.attention.config import takes_short_backward
from fastformer.kernels.attention.forward import attention_forward
from fastformer.kernels.targets import TARGETS
from fastformer.ops.random import dropout_threshold


def make(query, key, value, bounds=(None, None), longest=(0, 0), **changes):
    rules = dict.fromkeys(("mask", "slopes", "sinks", "seed"))
    rules |= {"dropout_p": 0.0, "causal": False, "scale": 0.3, "bottom_right": False, "left": -1, "right": -1}
    rules |= {"softcap": 0.0, **changes}
    return Call(query, key, value, *bounds, *longest, threshold=dropout_threshold(rules["dropout_p"]), **rules)


@pytest.mark.parametrize(
    ("shape", "kv_heads", "dtype", "rules", "expected"),
    [
        ((2, 4, 128, 64), 4, torch.bfloat16, {}, (True, True)),
        ((2, 4, 128, 64), 4, torch.float16, {"dropout_p": 0.1}, (True, True)),
        ((2, 4, 128, 64), 4, torch.float16, {"causal": True, "dropout_p": 0.1}, (True, True)),
        ((2, 4, 64, 64), 4, torch.float16, {"causal": True, "dropout_p": 0.1}, (True, True)),
        ((2, 4, 129, 64), 4, torch.bfloat16, {}, (False, False)),
        ((2, 4, 128, 64), 2, torch.bfloat16, {}, (True, False)),
        ((2, 4, 128, 64), 4, torch.bfloat16, {"softcap": 5.0}, (True, False)),
        ((2, 4, 128, 64), 4, torch.bfloat16, {"left": 9}, (True, False)),
        ((2, 4, 128, 80), 4, torch.bfloat16, {}, (True, False)),
        ((2, 4, 64, 128), 4, torch.bfloat16, {}, (True, True)),
        ((2, 4, 64, 129), 4, torch.bfloat16, {}, (False, False)),
        ((2, 4, 64, 64), 4, torch.float32, {}, (False, False)),
    ],
)
def test_who_takes_the_kernels_of_one_tile(shape, kv_heads, dtype, rules, expected, interpreting):
    if interpreting:
        pytest.skip("the interpreter has bounds of its own")
    query = torch.empty(shape, dtype=dtype, device="meta")
    key = torch.empty(shape[0], kv_heads, *shape[2:], dtype=dtype, device="meta")
    found = make(query, key, key, **rules)
    assert (found.short, found.short_backward) == expected


@pytest.mark.parametrize(
    ("name", "length", "expected"), [("sm_80", 64, True), ("sm_80", 65, False), ("sm_90", 65, True)]
)
def test_devices_without_room_take_two_kernels(name, length, expected, interpreting):
    if interpreting:
        pytest.skip("the interpreter has bounds of its own")
    query = torch.empty(2, 4, length, 64, dtype=torch.bfloat16, device="meta")
    assert takes_short_backward(TARGETS[name], make(query, query, query)) is expected


def passes(call, grad_out, grad_lse):
    out, lse = attention_forward(call)
    return [out, lse, *attention_backward(call, out, lse, grad_out, grad_lse)]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rules", [{}, {"causal": True, "bottom_right": True, "dropout_p": 0.3}, {"padded": True}])
def test_one_tile_says_what_many_say(packed, rules, device, interpreting, poisoned, monkeypatch):
    """With keys and values of NaN where nobody may look, and tokens after the last boundary."""
    if not interpreting and device.type != "cuda":
        pytest.skip("the kernels do not run here")
    g = torch.Generator().manual_seed(0)
    dtype = torch.float32 if interpreting else torch.float16
    rules = dict(rules)
    if packed:
        lengths = [17, 0, 3, 20]
        bounds = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
        shape, given = (47, 3, 24), {"bounds": (bounds, bounds), "longest": (20, 20)}
    else:
        shape, given = (2, 3, 18, 24), {}
    query, key, value, grad_out = (torch.randn(shape, generator=g).to(device, dtype) for _ in range(4))
    grad_lse = torch.randn(shape[:2][::-1] if packed else shape[:3], generator=g).to(device)
    if rules.pop("padded", False):
        sizes = (4, 1, 1, 20) if packed else (2, 1, 1, 18)
        mask = torch.ones(sizes, dtype=torch.bool, device=device)
        mask[..., 5] = False
        rules["mask"] = mask.expand(sizes[0], 3, 20 if packed else 18, sizes[3])
        for x in (key, value):
            (x[5] if packed else x[:, :, 5]).fill_(math.nan)
    if rules.get("dropout_p"):
        rules["seed"] = torch.tensor([7], device=device)
    calls.forget()
    call = make(query, key, value, **given, **rules)
    assert (call.short, call.short_backward) == (True, True)
    ours = passes(call, grad_out, grad_lse)
    call.short = call.short_backward = False
    theirs = passes(call, grad_out, grad_lse)
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv", "delta"), ours, theirs, strict=True):
        if name == "delta" and packed:
            a, b = a[:, :40], b[:, :40]  # of tokens, not of what lies behind them
        tolerance = 2e-5 if interpreting else 4e-3
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}")
    again = passes(make(query, key, value, **given, **rules), grad_out, grad_lse)
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(ours, again, strict=True))
