"""The Hopper forward kernel in the simulator: shapes, rules, memory layouts, NaN, interleavings, planted faults."""

import functools
import math
import os
import re

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("the interpreter replaces what is simulated", allow_module_level=True)

from fastformer.kernels.attention import forward, hopper
from fastformer.kernels.targets import TARGETS, assume
from tests import gluon_sim
from tests.gluon_sim.attention import Problem, simulated
from tests.ops.attention_oracle import as_exact
from tests.ops.conftest import poisoned  # noqa: F401

CAUSAL = {"causal": True}
SHIFTED = {"causal": True, "bottom_right": True}
BOTH = {"left": 70, "right": 9, "bottom_right": True}
BF16 = torch.bfloat16

# The first rows run always, all of them with --slow.
QUICK = {
    "D128 causal": Problem(200, 200, 128, rules=CAUSAL),
    "D64 full": Problem(130, 300, 64),
    "D256 causal": Problem(100, 150, 256, heads=1, rules=CAUSAL),
    "whole tiles": Problem(128, 256, 64, heads=1),
    "shifted, softcap": Problem(70, 300, 64, heads=4, kv_heads=2, rules=SHIFTED | {"softcap": 3.0}),
    "window": Problem(300, 310, 64, heads=1, rules=BOTH),
    "packed causal": Problem(
        head_dim=64, lengths=[(70, 70), (1, 1), (0, 0), (140, 140)], spare=150, rules=CAUSAL, heads=2
    ),
    "packed uneven": Problem(head_dim=64, lengths=[(5, 200), (140, 0), (130, 3)], spare=3, rules=SHIFTED),
}
RULES = {
    "full": {},
    "causal": CAUSAL,
    "shifted": SHIFTED,
    "window": BOTH,
    "left": {"left": 3},
    "softcap": {"softcap": 2.0},
    "all": SHIFTED | {"left": 60, "softcap": 5.0},
}
SLOW = {
    f"D{dim} {str(dtype)[6:]} {name} {q_len}x{k_len} {layout}": Problem(
        q_len, k_len, dim, dtype=dtype, rules=rules, layout=layout, batch=2, heads=2 * kv_heads, kv_heads=kv_heads
    )
    for dim in (64, 128, 256)
    for dtype in (torch.float16, BF16)
    for layout, kv_heads in (("plain", 1), ("fused", 2))
    for q_len, k_len in ((1, 1), (1, 239), (239, 1), (113, 203), (128, 128), (399, 3), (257, 600))
    for name, rules in RULES.items()
}


def check(problem, monkeypatch, seed=0):
    inputs = problem.draw()
    out, lse = simulated(problem.call(*inputs), monkeypatch, seed)
    exact, exact_lse = problem.expected(*(x.double() for x in inputs))
    stock, stock_lse = problem.expected(*inputs)
    seen = exact_lse != -math.inf
    assert torch.equal(lse != -math.inf, seen)
    as_exact(out, stock, exact, "output")
    as_exact(*(torch.where(seen, x, 0.0) for x in (lse, stock_lse, exact_lse)), "lse")


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("dtype", [torch.float16, BF16], ids=["fp16", "bf16"])
def test_numbers(name, dtype, monkeypatch):
    if dtype == BF16 and name not in ("D128 causal", "packed causal"):
        pytest.skip("fp16 does; all of both with --slow")
    problem = QUICK[name]
    monkeypatch.setattr(problem, "dtype", dtype)
    check(problem, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_every_shape(name, monkeypatch):
    check(SLOW[name], monkeypatch)


def interleavings(problem, monkeypatch, seeds):
    inputs = problem.draw()
    first, first_lse = simulated(problem.call(*inputs), monkeypatch)
    for seed in seeds:
        out, lse = simulated(problem.call(*inputs), monkeypatch, seed)
        assert torch.equal(out, first)
        assert torch.equal(lse, first_lse)


def test_interleavings_do_not_matter(monkeypatch):
    interleavings(Problem(100, 520, 64, heads=1), monkeypatch, range(1, 12))


@pytest.mark.slow
@pytest.mark.parametrize("rules", [{}, CAUSAL, BOTH], ids=["full", "causal", "window"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_two_hundred_interleavings(head_dim, rules, monkeypatch):
    interleavings(Problem(100, 520, head_dim, heads=1, rules=rules), monkeypatch, range(1, 201))


@pytest.mark.parametrize("rules", [{}, CAUSAL, BOTH], ids=["full", "causal", "window"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_a_row_must_not_see_does_not_leak(rules, bad, monkeypatch):
    problem = Problem(head_dim=64, lengths=[(90, 90), (60, 60)], heads=1, rules=rules)
    query, key, value = problem.draw()
    key[40], value[40], value[41, 0, 5], value[100] = math.nan, bad, bad, bad
    out, lse = simulated(problem.call(query, key, value), monkeypatch)
    _, exact_lse = problem.expected(*(x.double() for x in (query, key, value)))
    hidden = exact_lse.isfinite()[0] & torch.tensor([not _sees(problem, i, (40, 41, 100)) for i in range(150)])
    clean = problem.expected(*(x.double().nan_to_num(0, 0, 0) for x in (query, key, value)))
    assert hidden.any() or rules == {}
    assert torch.allclose(out[hidden].double(), clean[0][hidden], atol=2e-3)
    assert torch.allclose(lse[:, hidden].double(), clean[1][:, hidden], atol=1e-5)
    # And those who do see them show it.
    assert not out[~hidden].isfinite().all(-1).any()


def _sees(problem, row, keys):
    begin, end = (0, 90) if row < 90 else (90, 150)
    right = 0 if problem.rules.get("causal") else problem.rules.get("right", 1000)
    left = problem.rules.get("left", 1000)
    return any(begin <= k < end and row - left <= k <= row + right for k in keys)


def test_the_leak_would_show(monkeypatch):
    """The same without the search for NaN fails: the test above can."""
    problem = Problem(head_dim=64, lengths=[(90, 90), (60, 60)], heads=1)
    query, key, value = problem.draw()
    value[100] = math.nan
    edit = functools.partial(re.sub, r"met = mend\(.*\)", "pass")
    out, _ = simulated(problem.call(query, key, value), monkeypatch, edit=edit)
    assert out[:90].isnan().any()


def test_every_output_is_written(
    poisoned,  # noqa: F811
    monkeypatch,
):
    for problem in (QUICK["packed uneven"], QUICK["window"]):
        inputs = problem.draw()
        out, lse = simulated(problem.call(*inputs), monkeypatch)
        assert out.isfinite().all()
        assert not lse.isnan().any()


WAIT_OUT = "        acc, weights = warpgroup_mma_wait(0, deps=[acc, weights])\n"
FREE_V = "        mbarrier.arrive(v_empty.index(before), count=1)\n"
WAIT_V = "    if not CHECK:\n        mbarrier.wait(v_full.index(stage), phase)\n"
WAIT_K_EMPTY = "mbarrier.wait(k_empty.index(stage), ((step // STAGES) & 1) ^ 1)"
LOADS = "for step in range(tiles + 1):\n        if step < tiles:"

# (faults, what the kernel says, what it says instead)
PLANTED = {
    "keys are not released": ("Deadlock", "    mbarrier.arrive(k_empty.index(stage), count=1)\n", ""),
    "values are released before their product": ("Unreleased", WAIT_OUT + FREE_V, FREE_V + WAIT_OUT),
    "values are not waited for": ("Unlanded", WAIT_V, ""),
    "queries are not waited for": ("Unlanded", "    mbarrier.wait(q_full.index(0), 0)\n", ""),
    "scores are not waited for": ("Unwaited", "qk = warpgroup_mma_wait(1,", "qk = warpgroup_mma_wait(2,"),
    "the producer does not wait": ("Unreleased WrongPhase", WAIT_K_EMPTY, "pass"),
    "one tile too many": ("OutOfBounds Deadlock", LOADS, LOADS.replace("+ 1", "+ 2").replace("tiles:", "tiles + 1:")),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_caught(name, monkeypatch):
    faults, old, new = PLANTED[name]
    problem = Problem(100, 520, 64, heads=1)
    inputs = problem.draw()

    def edit(source):
        assert source.count(old) == 1, f"stands {source.count(old)} times in the source: {old!r}"
        return source.replace(old, new)

    for seed in range(3):
        with pytest.raises(tuple(getattr(gluon_sim, fault) for fault in faults.split())):
            simulated(problem.call(*inputs), monkeypatch, seed, edit)


def test_the_launcher_takes_them(monkeypatch):
    """Through the portable launcher: what the Hopper kernels take goes to them."""
    problem = QUICK["D64 full"]
    inputs = problem.draw()
    expected = simulated(problem.call(*inputs), monkeypatch)
    monkeypatch.setattr(forward, "hopper_chosen", lambda device: True)
    with assume(TARGETS["sm_90"]):
        found = forward.attention_forward(problem.call(*inputs))
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_memory_that_does_not_begin_at_16_bytes_takes_the_portable_kernels(monkeypatch):
    problem = Problem()
    query, key, value = problem.draw()
    row, taken = torch.empty(1, 2, problem.q_len), []

    def portable(*tensors):
        taken.append(tensors)

    monkeypatch.setattr(hopper.Bound, "__call__", lambda *_: None)
    shifted = torch.empty(key.numel() + 1, dtype=key.dtype)[1:].as_strided(key.shape, key.stride())
    for other in (key, shifted):
        call = problem.call(query, other, value)
        hopper.bind_forward(call, portable)(*call.tensors)
        run = hopper.bind_backward(call, portable, query.stride(), query.stride(), None)
        run(*call.tensors, query, row, query, None)
        assert len(taken) == 2 * (other is shifted)
    assert all(tensors[1] is shifted for tensors in taken)


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v: (q.float(), k.float(), v.float()),
        lambda q, k, v: (q[..., :32], k[..., :32], v[..., :32]),
        lambda q, k, v: (q, k, v[..., :32]),
        lambda q, k, v: (q[:, :, :0], k, v),
        lambda q, k, v: (q, k[:, :, :0], v[:, :, :0]),
        lambda q, k, v: (torch.randn(1, 2, 130, 65).half()[..., 1:], k, v),
        lambda q, k, v: (q, k.transpose(2, 3).contiguous().transpose(2, 3), v),
        lambda q, k, v: (q, k[:, :, :1].expand(k.shape), v),
    ],
    ids=["fp32", "D32", "uneven D", "no queries", "no keys", "unaligned", "last stride", "repeated key"],
)
def test_what_they_do_not_take(change):
    problem = Problem()
    assert hopper.bind_forward(problem.call(*change(*problem.draw())), None) is None


def test_rules_they_do_not_take():
    problem = Problem()
    inputs = problem.draw()
    for name, value in (("sinks", torch.zeros(2)), ("slopes", torch.zeros(2)), ("mask", torch.zeros(1, 2, 130, 200))):
        call = problem.call(*inputs)
        setattr(call, name, value)
        assert hopper.bind_forward(call, None) is None
    problem.rules = {"scale": -0.1}
    assert hopper.bind_forward(problem.call(*inputs), None) is None
