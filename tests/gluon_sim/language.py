"""Gluon's functions on CPU tensors. Register tiles are plain tensors, scalars of the device 0-d ones, so that 32-bit
arithmetic wraps as it does there."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
import triton.experimental.gluon.language as real
from triton.experimental.gluon.language.nvidia.hopper import mbarrier as real_mbarrier

from .faults import Contended, Misused, OutOfBounds, Unwaited
from .machine import Barrier, Buffer, Machine, Product


class State:
    """What the functions below act on: one program at a time."""

    machine: Machine
    program = 0
    written: ClassVar[dict[int, torch.Tensor]] = {}  # by address of a tensor: the program that wrote each element


class constexpr:
    """An annotation, and a function that leaves its argument alone."""

    def __new__(cls, value: Any) -> Any:
        return value


class Function:
    """A jitted function: callable from others, or launched over a grid."""

    def __init__(self, fn: Any) -> None:
        self.fn = fn
        self.seed: object = 0
        self.parameters = inspect.signature(fn).parameters

    def __call__(self, *args: Any) -> Any:
        return self.fn(*args)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **kwargs: self._launch(grid, args, kwargs)

    def _launch(self, grid: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        State.written.clear()
        options = {"num_warps", "maxnreg", "num_stages"}
        given = {name: value for name, value in kwargs.items() if name not in options}
        bound = inspect.signature(self.fn).bind(*args, **given).arguments
        values = {
            name: value if self.parameters[name].annotation is constexpr else _device_value(value)
            for name, value in bound.items()
        }
        for program in range(grid[0]):
            State.program = program
            State.machine = Machine((self.seed, program))
            self.fn(**values)
            State.machine.finish()


def jit(fn: Any = None, **_: Any) -> Any:
    return Function if fn is None else Function(fn)


def constexpr_function(fn: Any) -> Any:
    return fn


class Pointer:
    """Elements of a tensor's memory; reaching outside it is a fault."""

    def __init__(self, memory: torch.Tensor, offset: torch.Tensor) -> None:
        self.memory, self.offset = memory, offset
        self.dtype = SimpleNamespace(element_ty=memory.dtype)

    @classmethod
    def to(cls, tensor: torch.Tensor) -> Pointer:
        span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else 0
        return cls(tensor.as_strided((span,), (1,)), torch.tensor(0))

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.memory, self.offset + offset)

    def places(self, mask: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """(flat indices, which of them count), of one shape."""
        chosen = torch.as_tensor(True if mask is None else mask)
        offset, chosen = torch.broadcast_tensors(self.offset, chosen)
        outside = chosen & ((offset < 0) | (offset >= len(self.memory)))
        if outside.any():
            raise OutOfBounds(f"element {int(offset[outside][0])} of a tensor that spans {len(self.memory)}")
        return offset, chosen


def _device_value(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return Pointer.to(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        kind = torch.float32 if isinstance(value, float) else torch.int32 if abs(value) < 2**31 else torch.int64
        return torch.tensor(value, dtype=kind)
    return value


def load(pointer: Pointer, mask: Any = None, other: Any = 0) -> torch.Tensor:
    offset, chosen = pointer.places(mask)
    values = pointer.memory[torch.where(chosen, offset, 0)]
    return torch.where(chosen, values, torch.as_tensor(other, dtype=values.dtype))


def store(pointer: Pointer, value: Any, mask: Any = None) -> None:
    offset, chosen = pointer.places(mask)
    value = _tile(value).expand(offset.shape)
    place = offset[chosen]
    written = State.written.setdefault(pointer.memory.data_ptr(), torch.full(pointer.memory.shape, -1))
    if ((written[place] != -1) & (written[place] != State.program)).any():
        raise Contended("two programs write the same element")
    written[place] = State.program
    pointer.memory[place] = value[chosen].to(pointer.memory.dtype)


def _tile(x: Any) -> torch.Tensor:
    if isinstance(x, Product):
        raise Unwaited("an accumulator is used before its wgmma is waited for")
    return torch.as_tensor(x)


def _pair(a: Any, b: Any) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = (x if isinstance(x, torch.Tensor) else _tile(x) for x in (a, b))
    kind = a.dtype if a.ndim or b.ndim == 0 else b.dtype
    return a.to(kind), b.to(kind)


def maximum(a: Any, b: Any) -> Any:
    """NaN counts as nothing, as on the device."""
    return torch.fmax(*_pair(a, b))


def minimum(a: Any, b: Any) -> Any:
    return torch.fmin(*_pair(a, b))


def reduce_max(x: Any, axis: int) -> torch.Tensor:
    x = _tile(x)
    lost = x.isnan().all(axis)
    return torch.where(lost, x.sum(axis), x.nan_to_num(float("-inf"), float("inf"), float("-inf")).amax(axis))


def reduce_min(x: Any, axis: int) -> torch.Tensor:
    return _tile(x).amin(axis)


def convert_layout(value: Any, layout: Any, assert_trivial: bool = False) -> torch.Tensor:
    value = _tile(value)
    if isinstance(layout, real.DotOperandLayout) and value.element_size() != 2:
        raise Misused(f"a register operand of a wgmma has 16 bits an element, got {value.dtype}")
    if not isinstance(layout, real.SliceLayout) and value.ndim != 2:
        raise Misused(f"{layout} holds matrices, got {list(value.shape)}")
    return value


def full(shape: list[int], value: Any, dtype: torch.dtype, layout: Any = None) -> torch.Tensor:
    return torch.full(list(shape), value, dtype=dtype)


def inline_asm_elementwise(asm: str, constraints: str, args: list[Any], **_: Any) -> torch.Tensor:
    """Moves only: what else PTX can do is not simulated."""
    if asm != "mov.b32 $0, $1;":
        raise Misused(f"no simulation of {asm!r}")
    return _tile(args[0])


def allocate_shared_memory(dtype: torch.dtype, shape: list[int], layout: Any) -> Any:
    if isinstance(layout, real_mbarrier.MBarrierLayout):
        State.machine.allocate(8 * shape[0])
        first = len(State.machine.barriers)
        made = [Barrier(State.machine, f"{first + i}") for i in range(shape[0])]
        return SimpleNamespace(index=lambda i: _at(made, int(i)))
    return Buffer.allocate(State.machine, list(shape), dtype)


def _at(barriers: list[Barrier], index: int) -> Barrier:
    if not 0 <= index < len(barriers):
        raise OutOfBounds(f"barrier {index} of {len(barriers)}")
    return barriers[index]


def warp_specialize(functions_and_args: list[Any], worker_num_warps: list[int], worker_num_regs: list[int]) -> None:
    if not len(functions_and_args) - 1 == len(worker_num_warps) == len(worker_num_regs):
        raise Misused("every worker needs its number of warps and of registers")
    State.machine.run([lambda f=f, args=args: f(*args) for f, args in functions_and_args])


def _arrive(barrier: Barrier, *, count: int = 1, pred: Any = True) -> None:
    State.machine.pause()
    if pred:
        barrier.arrive(count)


def _expect(barrier: Barrier, count: int, pred: Any = True) -> None:
    State.machine.pause()
    if pred:
        barrier.expect(count)


def _wait(barrier: Barrier, phase: Any, pred: Any = True, deps: Any = ()) -> None:
    State.machine.pause()
    if pred:
        barrier.wait(int(phase))


def _box(descriptor: Any, coord: list[Any], buffer: Buffer) -> torch.Tensor:
    """The part of the tensor that a tile covers."""
    if buffer.shape != list(descriptor.block_shape) or buffer.dtype != descriptor.base.dtype:
        raise Misused(f"a tile {descriptor.block_shape} and a buffer of {buffer.dtype} {buffer.shape}")
    coord, sizes = [int(x) for x in coord], list(descriptor.shape)
    # The first dimension may reach past the end; heads lie beside each other in the last.
    last = sizes[-1] - (buffer.shape[-1] if len(sizes) > 1 else 1)
    if not (0 <= coord[0] < sizes[0] and 0 <= coord[-1] <= last):
        raise OutOfBounds(f"a tile at {coord} of a tensor {sizes}")
    memory = descriptor.base.as_strided(sizes, tuple(descriptor.strides))
    return memory[tuple(slice(at, at + size) for at, size in zip(coord, buffer.shape, strict=True))]


def _tma_load(descriptor: Any, coord: list[Any], barrier: Barrier, result: Buffer, pred: Any = True) -> None:
    machine = State.machine
    machine.pause()
    if not pred:
        return
    box = _box(descriptor, coord, result)
    barrier.must_live()
    number = result.begin_landing()

    def land() -> None:
        # What lies outside the tensor reads as zero, and counts.
        values = torch.zeros(result.shape, dtype=result.dtype)
        values[: box.shape[0]] = box
        result.end_landing(values)
        barrier.land(values.nbytes, number)

    machine.copies.append(land)


def fence_async_shared(cluster: bool = False) -> None:
    State.machine.fence()


def warpgroup_mma(a: Any, b: Buffer, acc: Any, *, use_acc: Any = True, is_async: bool = False) -> Any:
    machine = State.machine
    machine.pause()
    if not isinstance(b, Buffer) or isinstance(a, Product):
        raise Misused("the right factor of a wgmma lies in shared memory, the left one there or in registers")
    (rows, inner), (inner_b, columns) = a.shape, b.shape
    if inner != inner_b or list(acc.shape) != [rows, columns] or a.dtype != b.dtype or a.dtype.itemsize != 2:
        raise Misused(f"{a.dtype} {list(a.shape)} times {b.dtype} {b.shape} into {list(acc.shape)}")
    if rows % 64 or columns % 8 or inner % 16:
        raise Misused(f"no wgmma of {rows} x {columns} x {inner}")
    before = acc.value if isinstance(acc, Product) else acc
    read = [x for x in (a, b) if isinstance(x, Buffer)]
    for buffer in read:
        buffer.check_read(asynchronous=True)
        buffer.begin_reading()
    left, right = (x.data if isinstance(x, Buffer) else x for x in (a, b))
    value = left.float() @ right.float()
    if use_acc:
        value = value + before
    product = Product(value, read, None if isinstance(a, Buffer) else a)
    machine.now.products.append(product)
    return product if is_async else warpgroup_mma_wait(0, deps=[product, a])[0]


def warpgroup_mma_wait(num_outstanding: int = 0, deps: Any = None) -> Any:
    machine = State.machine
    machine.pause()
    products = machine.now.products
    while len(products) > num_outstanding:
        products.popleft().retire(machine.now, list(deps))
    found = [x.value if isinstance(x, Product) and x.retired else x for x in deps]
    return found[0] if len(found) == 1 else tuple(found)


def _namespace() -> SimpleNamespace:
    layouts = ("BlockedLayout", "SliceLayout", "DotOperandLayout", "NVMMADistributedLayout", "NVMMASharedLayout")
    kinds = ("int8", "int16", "int32", "int64", "float16", "bfloat16", "float32")
    return SimpleNamespace(
        **{name: getattr(real, name) for name in (*layouts, "SwizzledSharedLayout")},
        **{name: getattr(torch, name) for name in kinds},
        int1=torch.bool,
        constexpr=constexpr,
        constexpr_function=constexpr_function,
        static_range=range,
        static_assert=lambda *_: None,
        program_id=lambda axis: torch.tensor(State.program, dtype=torch.int32),
        load=load,
        store=store,
        arange=lambda start, end, layout=None: torch.arange(start, end, dtype=torch.int32),
        zeros=lambda shape, dtype, layout=None: full(shape, 0, dtype, layout),
        full=full,
        zeros_like=lambda x: torch.zeros_like(_tile(x)),
        full_like=lambda x, value: torch.full_like(_tile(x), value),
        where=lambda condition, a, b: torch.where(_tile(condition), a, b),
        maximum=maximum,
        minimum=minimum,
        max=reduce_max,
        min=reduce_min,
        sum=lambda x, axis: _tile(x).sum(axis),
        exp2=lambda x: torch.exp2(_tile(x)),
        log=lambda x: torch.log(_tile(x)),
        abs=lambda x: torch.abs(_tile(x)),
        cast=lambda x, dtype: _tile(x).to(dtype),
        cdiv=lambda a, b: (a + b - 1) // b,
        convert_layout=convert_layout,
        inline_asm_elementwise=inline_asm_elementwise,
        allocate_shared_memory=allocate_shared_memory,
        warp_specialize=warp_specialize,
    )


language = _namespace()
mbarrier = SimpleNamespace(
    MBarrierLayout=real_mbarrier.MBarrierLayout,
    init=lambda barrier, count: barrier.init(count),
    arrive=_arrive,
    expect=_expect,
    wait=_wait,
)
hopper = SimpleNamespace(
    mbarrier=mbarrier,
    tma=SimpleNamespace(async_load=_tma_load),
    fence_async_shared=fence_async_shared,
    warpgroup_mma=warpgroup_mma,
    warpgroup_mma_wait=warpgroup_mma_wait,
)
