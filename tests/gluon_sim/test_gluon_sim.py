"""The simulator: a sound kernel gives the right numbers under any interleaving, and a planted fault of each kind is
caught for what it is."""

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("the interpreter replaces what is simulated", allow_module_level=True)

from triton.experimental.gluon.language import NVMMASharedLayout
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tests import gluon_sim
from tests.gluon_sim import kernel

TILES = 5
SEEDS = range(12)


def run(seed, edit=None, programs=1):
    """Largest error of `multiply` under one interleaving."""
    torch.manual_seed(0)
    x, factor = torch.randn(TILES * 64, 32).half(), torch.randn(32, 32).half() / 6
    out = torch.full((TILES * 64, 32), torch.nan)
    multiply = kernel("tests.gluon_sim.planted", "multiply", edit)
    multiply.seed = seed
    tiles = TensorDescriptor(x, list(x.shape), [32, 1], [64, 32], NVMMASharedLayout(64, 16, 2))
    multiply[(programs,)](tiles, factor, out, TILES)
    return float((out.double() - 2 * x.double() @ factor.double() @ factor.double()).abs().max())


@pytest.mark.parametrize("seed", SEEDS)
def test_a_sound_kernel_runs(seed):
    assert run(seed) < 5e-3


WAIT_EMPTY = "        mbarrier.wait(empty.index(stage), ((i // STAGES) & 1) ^ 1)\n"
WAIT_FULL = "        mbarrier.wait(full.index(stage), (i // STAGES) & 1)\n"
ARRIVE = "        mbarrier.arrive(empty.index(stage), count=1)\n"
EXPECT = "        mbarrier.expect(full.index(stage), M * N * 2)\n"
FIRST_WAIT = "        acc = warpgroup_mma_wait(0, deps=[acc])\n"
OVERWRITE = "        factor.store(gl.zeros([N, N], gl.float16))\n"
DROPPED = "twice = warpgroup_mma_wait(0, deps=[twice])"

# What is planted: (faults, what the source says, what it says instead). Every interleaving must show one of the faults,
# and some interleaving the first.
PLANTED = {
    "never released": ("Deadlock", ARRIVE, ""),
    "waits for too many bytes": ("Deadlock", "M * N * 2)", "M * N * 2 + 16)"),
    "phase of the empty buffer": ("Deadlock", "& 1) ^ 1)", "& 1))"),
    "phase of the full buffer never turns": (
        "WrongPhase Deadlock",
        "(i // STAGES) & 1)\n        acc",
        "0)\n        acc",
    ),
    "two arrivals of one": ("WrongPhase", ARRIVE, ARRIVE.replace("count=1", "count=2")),
    "read before the copy": ("Unlanded", WAIT_FULL, ""),
    "phase of the full buffer": ("Unlanded Deadlock", WAIT_FULL, WAIT_FULL.replace("& 1)", "& 1 ^ 1)")),
    "read of what nobody wrote": (
        "Unlanded",
        "    factor.store(gl.load(FACTOR + (k[:, None] * N + n[None, :])))\n",
        "",
    ),
    "written before the release": ("Unreleased WrongPhase", WAIT_EMPTY, ""),
    "released before the product": ("Unreleased", FIRST_WAIT + ARRIVE, ARRIVE + FIRST_WAIT),
    "threads write the product's operand": ("Unreleased", FIRST_WAIT, OVERWRITE + FIRST_WAIT),
    "no fence": ("Unfenced", "    fence_async_shared()\n", ""),
    "accumulator before its wait": ("Unwaited", FIRST_WAIT, ""),
    "wait leaves it outstanding": ("Unwaited", "mma_wait(0, deps=[acc])", "mma_wait(1, deps=[acc])"),
    "register operand not kept": ("Unwaited", "twice, left = warpgroup_mma_wait(0, deps=[twice, left])", DROPPED),
    "tile past the end": ("OutOfBounds", "[i * M, 0]", "[(i + 1) * M, 0]"),
    "tile before the start": ("OutOfBounds", "[i * M, 0]", "[i * M - 1, 0]"),
    "column outside": ("OutOfBounds", "[i * M, 0]", "[i * M, 8]"),
    "buffer of the ring": ("OutOfBounds", "ring.index(stage))", "ring.index(i))"),
    "pointer outside": ("OutOfBounds", "(i * M + m)", "(i * M + m + 1)"),
    "32-bit operand": ("Misused", "(acc * 2.0).to(gl.float16)", "(acc * 2.0)"),
    "shapes that do not fit": ("Misused", "factor, acc, is_async", "factor.slice(0, 16), acc, is_async"),
    "more shared memory than there is": ("Misused", "[STAGES, M, N]", "[64 * STAGES, M, N]"),
}


def plant(name):
    _, old, new = PLANTED[name]

    def edit(source):
        assert source.count(old) == 1, f"{name}: {old!r} stands {source.count(old)} times in the source"
        return source.replace(old, new)

    return edit


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_caught(name):
    faults = tuple(getattr(gluon_sim, fault) for fault in PLANTED[name][0].split())
    found = []
    for seed in SEEDS:
        with pytest.raises(faults) as caught:
            run(seed, plant(name))
        found.append(caught.type)
    assert faults[0] in found


def test_two_programs_on_one_element_are_caught():
    with pytest.raises(gluon_sim.Contended):
        run(0, programs=2)


def test_wrong_numbers_are_numbers():
    """What breaks no rule of the machine shows in the result."""
    assert run(0, lambda source: source.replace("acc * 2.0", "acc * 2.25")) > 0.1
