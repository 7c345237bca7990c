"""The Hopper kernels for dQ, and for dK and dV, in the simulator."""

import math
import os
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("the interpreter replaces what is simulated", allow_module_level=True)

from tests import gluon_sim
from tests.gluon_sim.attention import Problem, simulated_gradients
from tests.ops.attention_oracle import as_exact, gradient_terms

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
    "D128 causal": Problem(150, 140, 128, heads=1, rules=CAUSAL),
    "D256 window": Problem(70, 140, 256, heads=2, rules={"left": 50, "right": 9}),
    "D256 all": Problem(140, 70, 256, heads=1, rules=SHIFTED | {"left": 60, "softcap": 5.0}),
}
SLOW = {
    f"D{dim} {str(dtype)[6:]} {name} {q_len}x{k_len} {layout}": Problem(
        q_len, k_len, dim, dtype=dtype, rules=rules, layout=layout, batch=2, heads=2 * kv_heads, kv_heads=kv_heads
    )
    for dim in (64, 128, 256)
    for dtype in (torch.float16, torch.bfloat16)
    for layout, kv_heads in (("plain", 1), ("fused", 2))
    for q_len, k_len in ((1, 1), (1, 239), (239, 1), (113, 203), (128, 128), (399, 3), (257, 300))
    for name, rules in RULES.items()
}


def draw(problem, seed=0):
    inputs = list(problem.draw(seed))
    grad_out = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(9)).to(problem.dtype)
    return inputs, grad_out


def check(problem, monkeypatch, **options):
    inputs, grad_out = draw(problem)
    ours, stock, exact = simulated_gradients(problem, inputs, grad_out, monkeypatch, **options)
    # Rows that see one key have no gradient: fp32's rounding of dP - delta is what is left of it.
    case = SimpleNamespace(tensors=dict(zip(("query", "key", "value"), inputs, strict=True)), options=problem.rules)
    terms = gradient_terms(case, grad_out)
    single = torch.finfo(torch.float32).eps / torch.finfo(problem.dtype).eps
    left = {"dQ": single * terms["query"], "dK": single * terms["key"]}
    for name, *values in zip(("dQ", "dK", "dV", "delta"), ours, stock, exact, strict=True):
        as_exact(*values, name, left.get(name, 0.0))


@pytest.mark.parametrize("name", QUICK)
def test_numbers(name, monkeypatch):
    check(QUICK[name], monkeypatch)


@pytest.mark.parametrize("name", ["causal", "packed uneven"])
def test_gradient_of_the_lse(name, monkeypatch):
    problem = QUICK[name]
    shape = (problem.heads, 278) if problem.lengths else (1, problem.heads, problem.q_len)
    strided = torch.randn((*shape, 2), generator=torch.Generator().manual_seed(5))[..., 0]
    check(problem, monkeypatch, grad_lse=strided)


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
    interleavings(Problem(200, 200, 64, heads=1), monkeypatch, range(1, 7))


@pytest.mark.slow
@pytest.mark.parametrize("rules", [{}, CAUSAL, BOTH], ids=["full", "causal", "window"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_two_hundred_interleavings(head_dim, rules, monkeypatch):
    interleavings(Problem(200, 200, head_dim, heads=1, rules=rules), monkeypatch, range(1, 201))


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
        a, b = (x.t() if x.ndim == 2 else x for x in (a, b))  # delta has its heads first
        assert torch.equal(a[:90], b[:90])
        assert b[90:].isnan().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_key_that_a_row_must_not_see_does_not_leak(bad, monkeypatch):
    """Row 100 is the first that sees key 100. Output and LSE are those without it."""
    problem = Problem(150, 150, 64, heads=1, rules=CAUSAL)
    inputs, grad_out = draw(problem)
    known = [x.clone() for x in inputs]
    clean, *_ = simulated_gradients(problem, inputs, grad_out, monkeypatch)
    inputs[1][:, :, 100], inputs[2][:, :, 100, 3] = bad, bad
    dirty, *_ = simulated_gradients(problem, inputs, grad_out, monkeypatch, known=known)
    assert torch.equal(dirty[0][:, :, :100], clean[0][:, :, :100])
    assert dirty[0][:, :, 100:].isnan().all()
    others = torch.arange(150) != 100
    for a, b in zip(clean[1:3], dirty[1:3], strict=True):
        assert torch.equal(a[:, :, others], b[:, :, others])
    assert dirty[1][:, :, 100].isnan().all()


MEET = (
    "        mbarrier.arrive(meet.index(0), count=1)\n        mbarrier.wait(meet.index(0), met & 1)\n        met += 1\n"
)
WAIT_EMPTY = "mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)"
WAIT_FULL = "    mbarrier.wait(full.index(stage), (step // STAGES) & 1)\n"
WAIT_DP = "dp = warpgroup_mma_wait(1 if WANT_DV else 0,"
WAIT_DQ = "        dq, factor = warpgroup_mma_wait(0, deps=[dq, factor])\n"
FREE_K = "    mbarrier.arrive(empty.index(k_slot), count=1)\n"
WAIT_V = "        if not CHECK and part == 0:\n            mbarrier.wait(full.index(v_slot), v_phase)\n"

# (kernel, faults, what it says, what it says instead)
PLANTED = {
    "tiles are not released": ("key", "Deadlock", "    mbarrier.arrive(empty.index(stage), count=1)\n", ""),
    "tiles are not waited for": ("key", "Unlanded", WAIT_FULL, ""),
    "keys are not waited for": ("key", "Unlanded", "    mbarrier.wait(kv_full.index(0), 0)\n", ""),
    "the gradient is not waited for": ("key", "Unwaited", WAIT_DP, "dp = warpgroup_mma_wait(2,"),
    "the producer does not wait": ("key", "Unreleased WrongPhase", WAIT_EMPTY, "pass"),
    "consumers do not meet": ("key", "Unreleased Unlanded Unfenced", MEET, "        met += 1\n"),
    "no fence after clearing": ("key", "Unfenced", "        fence_async_shared()\n", ""),
    "keys are released before their second product": (
        "query",
        "Unreleased",
        WAIT_DQ + FREE_K,
        "    " + FREE_K + WAIT_DQ,
    ),
    "values are not waited for": ("query", "Unlanded", WAIT_V, ""),
    "queries are not waited for": ("query", "Unlanded", "    mbarrier.wait(q_full.index(0), 0)\n", ""),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_caught(name, monkeypatch):
    where, faults, old, new = PLANTED[name]
    problem = Problem(330, 100, 64, heads=1) if where == "key" else Problem(100, 520, 64, heads=1)
    inputs, grad_out = draw(problem)

    def edit(source):
        if f"def backward_{where}_kernel" not in source:
            return source
        assert source.count(old) == 1, f"stands {source.count(old)} times in the source: {old!r}"
        return source.replace(old, new)

    for seed in range(3):
        with pytest.raises(tuple(getattr(gluon_sim, fault) for fault in faults.split())):
            simulated_gradients(problem, inputs, grad_out, monkeypatch, seed, edit)
