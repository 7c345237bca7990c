"""The Hopper attention kernels, forced. Once these tests pass on a GPU, its name and the version of Triton may enter
`HOPPER_PROVEN` in kernels/targets.py. A rehearsal runs them through the simulator (tests/gluon_sim)."""

import math

import pytest
import torch

from fastformer.kernels.attention import backward, forward, hopper
from fastformer.kernels.attention.call import forget
from tests.gluon_sim import kernel
from tests.gluon_sim.attention import Problem
from tests.ops.attention_oracle import as_exact

CAUSAL = {"causal": True}
SHIFTED = {"causal": True, "bottom_right": True}
RULES = {
    "full": {},
    "causal": CAUSAL,
    "shifted": SHIFTED,
    "window": {"left": 70, "right": 9, "bottom_right": True},
    "softcap": {"softcap": 2.0},
    "all": SHIFTED | {"left": 60, "softcap": 5.0},
}


@pytest.fixture
def launches(monkeypatch, device, tiny):
    """Makes calls take the Hopper kernels, and counts their launches."""
    counted = []

    class Counting(hopper.Aligned):
        __slots__ = ()

        def __call__(self, *tensors):
            counted.append(self.grid)
            missed = super().__call__(*tensors)
            self.launch = self  # not the short way, which counts nothing
            return missed

    if not tiny and torch.cuda.get_device_capability(device) != (9, 0):
        pytest.skip("no Hopper GPU")
    if not tiny:
        monkeypatch.setenv("FASTFORMER_BACKEND", "hopper")
    for pass_ in ("forward", "backward_query", "backward_key") if tiny else ():
        simulated = kernel(f"fastformer.kernels.attention.hopper_{pass_}", f"{pass_}_kernel")
        monkeypatch.setattr(hopper, f"{pass_}_kernel", simulated)
        portable = pass_.split("_")[0]
        monkeypatch.setattr(f"fastformer.kernels.attention.{portable}.hopper_chosen", lambda device: True)
    # Launches are kept from call to call: those made before count nothing, those made here would go on counting.
    forget()
    monkeypatch.setattr(hopper, "Aligned", Counting)
    yield counted
    forget()


def attend(problem, device, launches, seed=0):
    """(output and LSE, inputs) of one call."""
    before = len(launches)
    inputs = [x.to(device) for x in problem.draw(seed)]
    call = problem.call(*inputs)
    results = forward.attention_forward(call)
    assert len(launches) == before + 1
    return results, inputs


def check(problem, device, launches):
    (out, lse), inputs = attend(problem, device, launches)
    exact, exact_lse = problem.expected(*(x.double() for x in inputs))
    stock, stock_lse = problem.expected(*inputs)
    seen = exact_lse != -math.inf
    assert torch.equal(lse != -math.inf, seen)
    as_exact(out, stock, exact, "output")
    as_exact(*(torch.where(seen, x, 0.0) for x in (lse, stock_lse, exact_lse)), "lse")


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("lengths", [(1, 1), (1, 239), (239, 1), (113, 203), (128, 128), (799, 3), (1024, 2048)])
def test_shapes(lengths, head_dim, rules, device, launches, tiny, working_dtype):
    if tiny and (head_dim != 64 or sum(lengths) > 320):
        pytest.skip("too long for a rehearsal")
    problem = Problem(
        *lengths, head_dim, heads=4, kv_heads=2, batch=1 if tiny else 3, rules=RULES[rules], dtype=working_dtype
    )
    check(problem, device, launches)


@pytest.mark.parametrize("rules", ["full", "causal", "all"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_packed(head_dim, rules, device, launches, tiny, working_dtype):
    lengths = [(70, 70), (0, 0), (1, 1), (140, 140)] + ([] if tiny else [(n, n) for n in range(100, 900, 61)])
    if tiny and head_dim > 64:
        pytest.skip("too long for a rehearsal")
    problem = Problem(head_dim=head_dim, lengths=lengths, spare=150, rules=RULES[rules], dtype=working_dtype)
    check(problem, device, launches)


def gradients(problem, device, launches):
    """(dQ, dK, dV) by the Hopper kernels from their own output and LSE; inputs; grad_out."""
    (out, lse), inputs = attend(problem, device, launches)
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(device, out.dtype)
    before = len(launches)
    ours = backward.attention_backward(problem.call(*inputs), out, lse, grad_out, None)
    assert len(launches) == before + 2
    return ours[:3], inputs, grad_out


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_gradients(head_dim, packed, rules, device, launches, tiny, working_dtype):
    if tiny and (head_dim > 64 or rules not in ("causal", "all")):
        pytest.skip("too long for a rehearsal; tests/gluon_sim has it")
    sizes = {"lengths": [(70, 70), (0, 0), (1, 1), (140, 140)], "spare": 9} if packed else {"q_len": 150, "k_len": 170}
    if not tiny:
        sizes = {"lengths": [(n, n) for n in range(100, 900, 61)]} if packed else {"q_len": 1100, "k_len": 1234}
    problem = Problem(head_dim=head_dim, heads=4, kv_heads=2, dtype=working_dtype, rules=RULES[rules], **sizes)
    ours, inputs, grad_out = gradients(problem, device, launches)
    measured = []
    for dtype in (working_dtype, torch.float64):
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        measured.append(torch.autograd.grad(problem.expected(*leaves)[0], leaves, grad_out.to(dtype)))
    for name, *values in zip(("dQ", "dK", "dV"), ours, *measured, strict=True):
        as_exact(*values, name)


@pytest.mark.parametrize("rules", ["full", "causal"])
def test_a_neighbour_does_not_leak(rules, device, launches, working_dtype):
    """The last tile of a sequence reaches into the next, whose values are NaN."""
    problem = Problem(head_dim=64, lengths=[(90, 90), (60, 60)], heads=1, rules=RULES[rules], dtype=working_dtype)
    inputs = [x.to(device) for x in problem.draw()]
    clean = forward.attention_forward(problem.call(*inputs))
    inputs[2][90:] = math.nan
    inputs[1][90:] = math.nan
    dirty = forward.attention_forward(problem.call(*inputs))
    assert torch.equal(clean[0][:90], dirty[0][:90])
    assert torch.equal(clean[1][:, :90], dirty[1][:, :90])
    assert dirty[0][90:].isnan().all()
    assert len(launches) == 2


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_repeats_are_equal_bit_for_bit(head_dim, rules, device, launches, tiny, working_dtype):
    """A race between the producer and its consumers would show as a difference."""
    if tiny and head_dim > 64:
        pytest.skip("too long for a rehearsal")
    length = 200 if tiny else 4096
    problem = Problem(length, length, head_dim, heads=2 if tiny else 16, rules=RULES[rules], dtype=working_dtype)
    inputs = [x.to(device) for x in problem.draw()]
    first = forward.attention_forward(problem.call(*inputs))
    for _ in range(2 if tiny else 100):
        again = forward.attention_forward(problem.call(*inputs))
        assert torch.equal(again[0], first[0])
        assert torch.equal(again[1], first[1])


@pytest.mark.parametrize("rules", ["full", "causal"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_repeated_gradients_are_equal_bit_for_bit(head_dim, rules, device, launches, tiny, working_dtype):
    if tiny:
        pytest.skip("the simulator's interleavings say more")
    problem = Problem(2048, 2048, head_dim, heads=16, kv_heads=4, rules=RULES[rules], dtype=working_dtype)
    first, *_ = gradients(problem, device, launches)
    for _ in range(50):
        again, *_ = gradients(problem, device, launches)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


def test_what_they_do_not_take_runs_anyway(device, launches, working_dtype):
    """Head dimensions, masks and so on that only the portable kernels have."""
    problem = Problem(20, 30, 32, dtype=working_dtype)
    inputs = [x.to(device) for x in problem.draw()]
    out, _ = forward.attention_forward(problem.call(*inputs))
    assert not launches
    as_exact(out, problem.expected(*inputs)[0], problem.expected(*(x.double() for x in inputs))[0], "output")
