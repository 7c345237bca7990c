"""The Hopper kernel for dK and dV in the simulator."""

import math
import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("the interpreter replaces what is simulated", allow_module_level=True)

from tests import gluon_sim
from tests.gluon_sim.attention import Problem, simulated_gradients
from tests.ops.attention_oracle import as_exact

CAUSAL = {"causal": True}
SHIFTED = {"causal": True, "bottom_right": True}
BOTH = {"left": 70, "right": 9, "bottom_right": True}
RULES = {
    "full": {},
    "causal": CAUSAL,
    "shifted": SHIFTED,
    "window": BOTH,
    "left": {"left": 3},
    "softcap": {"softcap": 2.0},
    "all": SHIFTED | {"left": 60, "softcap": 5.0},
}
# The first rows run always, all of them with --slow.
QUICK = {
    "causal": Problem(200, 200, 64, rules=CAUSAL),
    "full": Problem(130, 150, 64),
    "whole tiles": Problem(128, 128, 64, heads=1),
    "shifted, softcap": Problem(200, 70, 64, heads=4, kv_heads=2, rules=SHIFTED | {"softcap": 3.0}),
    "window": Problem(300, 310, 64, heads=1, rules=BOTH),
    "packed causal": Problem(head_dim=64, lengths=[(70, 70), (1, 1), (0, 0), (140, 140)], spare=150, rules=CAUSAL),
    "packed uneven": Problem(head_dim=64, lengths=[(5, 200), (140, 0), (0, 9), (130, 3)], spare=3, rules=SHIFTED),
}
SLOW = {
    f"{str(dtype)[6:]} {name} {q_len}x{k_len} {layout}": Problem(
        q_len, k_len, 64, dtype=dtype, rules=rules, layout=layout, batch=2, heads=2 * kv_heads, kv_heads=kv_heads
    )
    for dtype in (torch.float16, torch.bfloat16)
    for layout, kv_heads in (("plain", 1), ("fused", 2))
    for q_len, k_len in ((1, 1), (1, 239), (239, 1), (113, 203), (128, 128), (399, 3), (257, 300))
    for name, rules in RULES.items()
}


def draw(problem, seed=0):
    inputs = list(problem.draw(seed))
    grad_out = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(9)).to(problem.dtype)
    return inputs, grad_out


def check(problem, monkeypatch):
    ours, stock, exact = simulated_gradients(problem, *draw(problem), monkeypatch)
    for name, *values in zip(("dK", "dV"), ours, stock, exact, strict=True):
        as_exact(*values, name)


@pytest.mark.parametrize("name", QUICK)
def test_numbers(name, monkeypatch):
    check(QUICK[name], monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_every_shape(name, monkeypatch):
    check(SLOW[name], monkeypatch)


def interleavings(problem, monkeypatch, seeds):
    first, *_ = simulated_gradients(problem, *draw(problem), monkeypatch)
    for seed in seeds:
        again, *_ = simulated_gradients(problem, *draw(problem), monkeypatch, seed)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


def test_interleavings_do_not_matter(monkeypatch):
    interleavings(Problem(330, 100, 64), monkeypatch, range(1, 9))


@pytest.mark.slow
@pytest.mark.parametrize("rules", [{}, CAUSAL, BOTH], ids=["full", "causal", "window"])
def test_two_hundred_interleavings(rules, monkeypatch):
    interleavings(Problem(330, 100, 64, rules=rules), monkeypatch, range(1, 201))


@pytest.mark.parametrize("rules", [{}, CAUSAL], ids=["full", "causal"])
def test_a_neighbour_does_not_leak(rules, monkeypatch):
    """The last tile of a sequence's queries reaches into the next, which is NaN."""
    problem = Problem(head_dim=64, lengths=[(90, 90), (60, 60)], heads=2, rules=rules)
    inputs, grad_out = draw(problem)
    clean, *_ = simulated_gradients(problem, inputs, grad_out, monkeypatch)
    for x in (*inputs, grad_out):
        x[90:] = math.nan
    dirty, *_ = simulated_gradients(problem, inputs, grad_out, monkeypatch)
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a[:90], b[:90])
        assert b[90:].isnan().all()


PLANTED = {
    "tiles are not released": ("Deadlock", "    mbarrier.arrive(empty.index(stage), count=1)\n", ""),
    "tiles are not waited for": ("Unlanded", "    mbarrier.wait(full.index(stage), (step // STAGES) & 1)\n", ""),
    "keys are not waited for": ("Unlanded", "    mbarrier.wait(kv_full.index(0), 0)\n", ""),
    "the gradient is not waited for": ("Unwaited", "dp = warpgroup_mma_wait(1,", "dp = warpgroup_mma_wait(2,"),
    "the producer does not wait": (
        "Unreleased WrongPhase",
        "mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)",
        "pass",
    ),
    "consumers do not meet": (
        "Unreleased Unlanded Unfenced",
        "        mbarrier.arrive(meet.index(0), count=1)\n        mbarrier.wait(meet.index(0), met & 1)\n",
        "",
    ),
    "no fence after clearing": ("Unfenced", "        fence_async_shared()\n", ""),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_caught(name, monkeypatch):
    faults, old, new = PLANTED[name]
    problem = Problem(330, 100, 64)
    inputs, grad_out = draw(problem)

    def edit(source):
        assert source.count(old) == 1, f"stands {source.count(old)} times in the source: {old!r}"
        return source.replace(old, new)

    for seed in range(3):
        with pytest.raises(tuple(getattr(gluon_sim, fault) for fault in faults.split())):
            simulated_gradients(problem, inputs, grad_out, monkeypatch, seed, edit)
