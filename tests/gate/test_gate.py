"""The gate itself: planted faults are caught on every target, sound kernels pass."""

import os

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from fastformer.kernels.targets import TARGETS  # noqa: E402
from tests.gate import planted  # noqa: E402
from tests.gate.compiling import compile_only  # noqa: E402
from tests.gate.resources import Resources, from_amdgcn, from_ptxas  # noqa: E402
from tests.gate.running import TARGETS as GATED  # noqa: E402


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("gate")


def faults_of(case, target, cache):
    with compile_only(TARGETS[target], cache) as launched:
        case()
    assert len(launched) == 1
    return launched[0].faults(TARGETS[target])


@pytest.mark.parametrize("target", GATED)
def test_sound_kernel_passes(target, cache):
    assert faults_of(planted.sound, target, cache) == []


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_spilling_kernel_is_caught(target, cache):
    assert any("spills" in fault for fault in faults_of(planted.spilling, target, cache))


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_oversized_kernel_is_caught(target, cache):
    assert any("shared memory" in fault for fault in faults_of(planted.oversized, target, cache))


def test_cached_result_is_the_same(cache, tmp_path):
    target = TARGETS["sm_80"]
    with compile_only(target, tmp_path) as cold:
        planted.spilling()
    planted.spilling_kernel.device_caches.clear()
    with compile_only(target, tmp_path) as warm:
        planted.spilling()
    assert cold == warm
    # Without its stored resources a cached kernel is compiled again rather than passed unchecked.
    for report in tmp_path.glob("*/resources.json"):
        report.unlink()
    planted.spilling_kernel.device_caches.clear()
    with compile_only(target, tmp_path) as again:
        planted.spilling()
    assert again == cold


def test_grid_of_anything_but_ints_is_refused(cache):
    import torch

    x = torch.empty(8, device="meta")
    with compile_only(TARGETS["sm_80"], cache), pytest.raises(TypeError, match="tuple of ints"):
        planted.sound_kernel[(2.0,)](x, x, 8, BLOCK=8)


def test_driver_and_launches_are_restored(cache):
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    before = driver._active, JITFunction.run
    with pytest.raises(RuntimeError, match="inside"), compile_only(TARGETS["sm_80"], cache):
        raise RuntimeError("inside")
    assert (driver._active, JITFunction.run) == before


def test_ptxas_log_is_read():
    log = """ptxas info    : Function properties for k
    96 bytes stack frame, 100 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 96 bytes cumulative stack size
ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized due to something"""
    figures = from_ptxas(log)
    assert (figures["registers"], figures["spill"], figures["scratch"]) == (255, 124, 96)
    assert len(figures["warnings"]) == 1
    resources = Resources(kernel="k", shared=0, tensor_memory=600, warps=4, stages=2, **figures)
    assert len(resources.faults(TARGETS["sm_90"])) == 4


@pytest.mark.parametrize("read", [from_ptxas, from_amdgcn])
def test_unreadable_report_is_an_error(read):
    with pytest.raises(ValueError, match="no"):
        read("nothing of use")
