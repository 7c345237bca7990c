"""Repeated launches: each runs the very kernel that Triton itself would choose for its arguments.

Compilation, loading and launching are stand-ins: what is compared is which compiled kernel a launch reaches.
"""

import itertools
import os
import random
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("the interpreter has no launches to keep", allow_module_level=True)

import triton.language as tl  # noqa: E402
from triton.compiler import CompiledKernel  # noqa: E402

from bench.standin import standing_in  # noqa: E402
from fastformer.kernels import launch, targets  # noqa: E402

SLOTS = 64


@triton.jit(do_not_specialize=["rows"])
def plain(X, Y, rows, stride, scale, N: tl.constexpr, FLAG: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(Y + at * stride, tl.load(X + at, mask=at < rows) * scale)


def compiled_by_name(source, target, options, **_):
    """Stands in for the compiler: a kernel that is equal to itself alone and records its launches."""
    kernel = object.__new__(CompiledKernel)
    kernel.src, kernel.metadata, kernel.packed_metadata = source, SimpleNamespace(), object()
    kernel.function = (str(source.signature), str(source.constants), str(source.attrs), str(options), object())
    kernel.name, kernel.module = "plain", object()
    kernel._run = triton.runtime.driver.active.launcher_cls(source, None)
    return kernel


@pytest.fixture
def device():
    with mock.patch("triton.compiler.compile", compiled_by_name), standing_in("sm_90") as found:
        plain.device_caches.clear()
        yield found
    plain.device_caches.clear()


@pytest.fixture
def kernel():
    return launch.launcher(plain)


def tensor(dtype=torch.float32, shift=0):
    """A tensor whose address is `shift` elements behind a multiple of 64 bytes."""
    memory = torch.zeros(SLOTS + 64, dtype=dtype)
    first = -(memory.data_ptr() // memory.element_size()) % (64 // memory.element_size())
    return memory[first + shift : first + shift + SLOTS]


def chosen_by_triton(args, options):
    """The compiled kernel that Triton's own launch of these arguments runs."""
    return plain.run(*args, grid=(1,), warmup=True, **options).function


def test_random_launches_reach_the_kernel_that_triton_chooses(kernel, device):
    draw = random.Random(0)
    tensors = [None] + [tensor(d, s) for d in (torch.float32, torch.float16, torch.bfloat16) for s in (0, 1, 4, 8)]
    numbers = [0, 1, True, False, 1.0, 0.0, 2, 16, 17, 48, -16, 2**31 - 1, 2**31, -(2**31) - 16, 2**40, 2**63, None]
    choices = [tensors, tensors, numbers, numbers, numbers[:5], [16], [1, 2]]
    pool = [[draw.choice(of) for of in choices] for _ in range(20)]
    for _ in range(100):  # neighbours, which differ in one argument
        args, changed = list(draw.choice(pool)), draw.randrange(len(choices))
        args[changed] = draw.choice(choices[changed])
        pool.append(args)
    repeats = 0
    for _ in range(2000):
        args, options = draw.choice(pool), {"num_warps": draw.choice([4, 4, 8])}
        device.device, device.stream = draw.choice([0, 1]), draw.randrange(5)
        before = len(kernel.found)
        kernel[(draw.randrange(1, 9), 2)](*args, **options)
        repeats += len(kernel.found) == before
        function, stream, grid, given = device.launches[-1]
        assert function is chosen_by_triton(args, options), args
        assert stream == device.stream
        assert grid[1:] == (2, 1)
        pointers = [getattr(a, "data_ptr", lambda a=a: a)() for a in given]
        assert list(zip(pointers, map(type, pointers), strict=True)) == [
            (v, type(v)) for v in (a.data_ptr() if isinstance(a, torch.Tensor) else a for a in args)
        ]
    assert len(device.launches) == 2000
    assert repeats > 1000


BASE = {"X": tensor(), "Y": tensor(), "rows": 5, "stride": 32, "scale": 2.0, "N": 16, "FLAG": 1}
CHANGES = [
    {"X": tensor(torch.float16)},
    {"X": tensor(shift=1)},
    {"Y": None},
    {"rows": 2**40},
    {"rows": 5.0},
    {"rows": True},
    {"stride": 1},
    {"stride": 33},
    {"stride": 2**32},
    {"stride": 32.0},
    {"scale": 2},
    {"N": 32},
    {"FLAG": 2},
    {"FLAG": tl.float32},
    {"num_warps": 8},
    {"num_stages": 1},
    {"device": 1},
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: " ".join(f"{k}={type(v).__name__}" for k, v in c.items()))
def test_what_triton_compiles_apart_is_never_mixed_up(kernel, device, change):
    def go(what):
        device.device = what.pop("device", 0)
        options = {name: what.pop(name) for name in ("num_warps", "num_stages") if name in what}
        kernel[(1,)](*what.values(), **options)
        return device.launches[-1][0]

    first = go(dict(BASE))
    other = go({**BASE, **change})
    assert other is not first
    # Both again, now from the table.
    held = len(kernel.found)
    assert go(dict(BASE)) is first
    assert go({**BASE, **change}) is other
    assert len(kernel.found) == held


def test_repeats_do_not_go_through_triton(kernel, device):
    kernel[(1,)](*BASE.values())
    with mock.patch.object(triton.runtime.jit.JITFunction, "run", side_effect=AssertionError("went through Triton")):
        for stream in (7, 8):
            device.stream = stream
            kernel[(3, 4, 5)](*{**BASE, "X": tensor()}.values())
            assert device.launches[-1][1:3] == (stream, (3, 4, 5))


def test_prepared_launches_follow_their_tensors(kernel, device):
    rest = list(BASE.values())[2:]
    prepared = launch.Prepared(kernel, (2, 3), tuple(rest), {"num_warps": 4})
    tensors = [None, tensor(), tensor(shift=1), tensor(torch.float16), tensor(torch.float16, 3)]
    for _, x, y in itertools.product(range(2), tensors, tensors):
        for device.device in (0, 1):
            prepared(x, y)
            assert device.launches[-1][0] is chosen_by_triton([x, y, *rest], {"num_warps": 4})
            assert device.launches[-1][2] == (2, 3, 1)
    assert len(prepared.found) < 2 * len(tensors) ** 2 + 1


def test_bound_launches_follow_addresses_devices_and_switches(kernel, device):
    rest = list(BASE.values())[2:]
    bound = launch.Bound(kernel, (2, 3), tuple(rest), {"num_warps": 4})
    aligned, shifted = [tensor(), tensor()], [tensor(), tensor(shift=1)]
    for debug, number, tensors in itertools.product((False, True), (0, 1), (aligned, aligned, shifted, aligned)):
        device.device, device.stream = number, 5 + number
        with mock.patch.object(triton.knobs.runtime, "debug", debug):
            bound.launch(*tensors)
            function, stream, grid, given = device.launches[-1]
            assert function is chosen_by_triton([*tensors, *rest], {"num_warps": 4})
        assert (stream, grid) == (device.stream, (2, 3, 1))
        assert [getattr(a, "data_ptr", lambda a=a: a)() for a in given[:2]] == [t.data_ptr() for t in tensors]
        assert list(given[2:]) == rest
    hook = mock.Mock()
    triton.knobs.runtime.launch_enter_hook.add(hook)
    try:
        with mock.patch.object(triton.runtime.jit.JITFunction, "run") as run:
            bound.launch(*aligned)
        assert run.called
    finally:
        triton.knobs.runtime.launch_enter_hook.remove(hook)
    with mock.patch.object(triton.runtime.jit.JITFunction, "run", side_effect=AssertionError("went through Triton")):
        bound.launch(*aligned)


class View:
    """In place of a descriptor: something with an address and a dtype that is no tensor."""

    def __init__(self):
        self.known = {}

    def __call__(self, x):
        return SimpleNamespace(data_ptr=x.data_ptr, dtype=x.dtype, made="of a tensor")

    def at(self, pointer):
        made = self.known[pointer] = SimpleNamespace(data_ptr=lambda: pointer, made="of an address")
        return made


@pytest.mark.parametrize("kind", [launch.Prepared, launch.Bound])
def test_viewed_tensors_are_given_as_their_views(kind, kernel, device):
    rest = list(BASE.values())[2:]
    view = View()
    prepared = kind(kernel, (2, 3), tuple(rest), {"num_warps": 4}, (view,))
    first, second = [tensor(), tensor()], [tensor(), tensor()]
    for tensors, made in ((first, "tensor"), (first, "address"), (second, "address"), (first, "address")):
        prepared(*tensors)
        given = device.launches[-1][3]
        assert given[0].made.split()[-1] == made
        assert given[0].data_ptr() == tensors[0].data_ptr()
        assert getattr(given[1], "data_ptr", lambda given=given: given[1])() == tensors[1].data_ptr()
    assert len(view.known) == 2


def test_constants_by_name_count_like_those_by_position(kernel, device):
    *given, n, flag = BASE.values()
    for flag, n, _ in itertools.product((1, 2, 1.5, tl.float16), (16, 32), range(2)):
        kernel[(1,)](*given, FLAG=flag, N=n, num_warps=8)
        assert device.launches[-1][0] is chosen_by_triton([*given, n, flag], {"num_warps": 8})
        assert device.launches[-1][3][-2:] == (n, flag)
        kernel[(1,)](*given, n, FLAG=flag)
        assert device.launches[-1][0] is chosen_by_triton([*given, n, flag], {})
    assert len(kernel.found) == 16
    with pytest.raises(TypeError, match="takes 2 tensors and then 3 other arguments by position"):
        kernel[(1,)](*given[:-1], scale=2.0, N=n, FLAG=flag)


def test_a_full_table_is_emptied(kernel, device):
    for rows in range(launch.KEPT + 10):
        kernel[(1,)](*{**BASE, "rows": rows + 2}.values())
        assert device.launches[-1][3][2] == rows + 2
    assert len(kernel.found) <= launch.KEPT


def test_hooks_see_every_launch(kernel, device):
    seen = []
    kernel[(1,)](*BASE.values())
    hook = seen.append
    for chain in (triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook):
        chain.add(hook)
        try:
            with mock.patch.object(triton.runtime.jit.JITFunction, "run") as run:
                kernel[(1,)](*BASE.values())
            assert run.called
        finally:
            chain.remove(hook)
    with mock.patch.object(plain, "pre_run_hooks", [lambda *a, **k: seen.append("pre")]):
        kernel[(1,)](*BASE.values())
    assert seen == ["pre"]


def test_switches_that_triton_reads_at_a_launch_are_part_of_the_key(kernel, device):
    kernel[(1,)](*BASE.values())
    plain_function = device.launches[-1][0]
    with mock.patch.object(triton.knobs.runtime, "debug", True):
        kernel[(1,)](*BASE.values())
        assert device.launches[-1][0] is not plain_function
    kernel[(1,)](*BASE.values())
    assert device.launches[-1][0] is plain_function


def test_compile_only_launches_are_not_kept(kernel, device):
    kernel[(1,)](*BASE.values())
    with targets.assume(targets.TARGETS["sm_80"]), mock.patch.object(triton.runtime.jit.JITFunction, "run") as run:
        kernel[(1,)](*BASE.values())
        assert run.called


def test_what_a_hook_refused_to_compile_is_not_kept(kernel, device):
    with mock.patch.object(triton.knobs.runtime, "jit_cache_hook", return_value=True):
        kernel[(1,)](*BASE.values())
    assert not device.launches
    assert not kernel.found


@pytest.mark.parametrize("args", [(tensor(), None), (None, None, tensor(), 1, 1.0, 16, 1), (None, None, 1, 1, 1.0, 16)])
def test_arguments_out_of_place_are_refused(kernel, device, args):
    with pytest.raises(TypeError, match=r"plain takes 2 tensors and then 5 other arguments by position"):
        kernel[(1,)](*args)


def test_storage_beyond_two_gib_is_apart_on_amd(kernel, device, monkeypatch):
    """There Triton picks buffer instructions by the size of the storage."""
    monkeypatch.setattr(launch, "_HIP", True)
    small = tensor()
    kernel[(1,)](*BASE.values())
    held = len(kernel.found)
    large = mock.Mock(wraps=small, dtype=small.dtype)
    large.untyped_storage.return_value.size.return_value = 2**31
    kernel[(1,)](large, *list(BASE.values())[1:])
    assert len(kernel.found) == held + 1


def test_a_compiled_kernel_is_launched_again(tmp_path):
    """With the real compiler, as far as a machine without a GPU goes."""
    kernel = launch.launcher(plain)
    with triton.knobs.cache.scope(), standing_in("sm_80") as device:
        triton.knobs.cache.dir = str(tmp_path)
        plain.device_caches.clear()
        kernel[(1,)](*BASE.values())
        kernel[(2,)](*BASE.values())
    plain.device_caches.clear()
    (first, _, _, a), (second, _, grid, b) = device.launches
    assert first is second
    assert grid == (2, 1, 1)
    assert [x.data_ptr() for x in a[:2]] == list(b[:2])
    assert a[2:] == b[2:]
