"""The gate itself: planted faults are caught on every target, sound kernels pass."""

import os
from types import SimpleNamespace

import pytest

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from fastformer.kernels.targets import TARGETS  # noqa: E402
from tests.gate import planted, running  # noqa: E402
from tests.gate.compiling import REPORT, compile_only  # noqa: E402
from tests.gate.resources import Resources, from_amdgcn, from_ptxas, lost_matrix_units  # noqa: E402
from tests.gate.running import TARGETS as GATED  # noqa: E402
from tests.gate.specialised import lonely_arrivals, lost_specialisation  # noqa: E402


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
    (report,) = tmp_path.glob(f"*/{REPORT}")
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


def test_products_off_the_matrix_units_are_noticed():
    operands = (
        "tensor<128x64xf16, #ttg.dot_op<{opIdx = 0, parent = #mma}>> * tensor<64x32xf16, #ttg.dot_op<{opIdx = 1}>>"
    )
    ttgir = f"%9 = ttng.warp_group_dot %a, %b, %c : x\n%10 = tt.dot %a, %b, %c : {operands} -> tensor<128x32xf32, #mma>"
    (warning,) = lost_matrix_units(ttgir, TARGETS["sm_90"], 4)
    assert "128x32" in warning
    # Two warps cannot form the group that the units need: the configuration chose that.
    assert lost_matrix_units(ttgir, TARGETS["sm_90"], 2) == ()
    assert lost_matrix_units(ttgir, TARGETS["sm_80"], 4) == ()
    assert lost_matrix_units(ttgir.replace("xf16", "xf32"), TARGETS["sm_90"], 4) == ()


def test_lost_specialisation_is_seen():
    ttgir = "ttg.warp_specialize(%a) attributes {requestedRegisters = array<i32: 240, 232>}"
    ptx = "setmaxnreg.inc.sync.aligned.u32 \t240;\nsetmaxnreg.inc.sync.aligned.u32 232;"
    sass = "HGMMA.64x128x16.F32.BF16 R24 ;\nUTMALDG.2D [UR8] ;\nWARPGROUP.DEPBAR.LE gsb0, 0x1 ;"
    assert lost_specialisation(ttgir, ptx, sass) == ()
    assert lost_specialisation("no partitions", "", "") == ()
    (warning,) = lost_specialisation(ttgir, ptx.replace("232", "240"), sass)
    assert "232 registers" in warning
    for part, name in (("HGMMA", "wgmma"), ("UTMALDG", "TMA load"), ("0x1", "overlap")):
        (warning,) = lost_specialisation(ttgir, ptx, sass.replace(part, "0x0"))
        assert name in warning


def test_an_arrival_ahead_of_its_warps_is_seen():
    arrive = "@%p1 mbarrier.arrive.shared::cta.b64 _, [%r1];"
    expect = "@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], 64;"
    assert lonely_arrivals(f"bar.sync 2, 128;\nadd.s32 %r1, %r2, 8;\n{arrive}\n{expect}") == 0
    assert lonely_arrivals(f"bar.sync 2, 128;\nst.shared.b32 [%r2], %r3;\n{arrive}") == 1
    assert lonely_arrivals(f"bar.sync 2, 128;\n$L__BB0_3:\n{arrive}") == 1


@pytest.mark.parametrize("share", [2, 3, 5])
def test_a_share_reaches_every_case(share, monkeypatch):
    names = [f"case {i}" for i in range(7)]
    module = SimpleNamespace(cases=lambda: [(name, lambda: None) for name in names])
    monkeypatch.setattr(running, "modules", lambda: ["cases_x"])
    monkeypatch.setattr(running.importlib, "import_module", lambda name: module)
    chosen = running.collect(list(GATED), "", share)
    assert len(chosen) < len(running.collect(list(GATED), ""))
    assert {name for _, _, name in chosen} == set(names)
    assert {target for _, target, _ in chosen} == set(GATED)


@pytest.mark.parametrize("read", [from_ptxas, from_amdgcn])
def test_unreadable_report_is_an_error(read):
    with pytest.raises(ValueError, match="no"):
        read("nothing of use")
