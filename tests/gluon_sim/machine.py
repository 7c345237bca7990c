"""One thread block: its partitions, barriers, shared memory, copies and matrix products under way."""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from .faults import Deadlock, Misused, OutOfBounds, Unfenced, Unlanded, Unreleased, Unwaited, WrongPhase

PARTITIONS = 4
SHARED_BYTES = 232448  # of a block on sm_90; CUDA C++ programming guide, technical specifications
# Rows of a buffer's records beside its data; the last PARTITIONS rows hold each partition's time of reading.
STATE, WRITER, WRITTEN, READERS, READ = 0, 1, 2, 3, 4
COPY = PARTITIONS  # as a writer: a TMA copy
EMPTY, VALID, LANDING, UNFENCED = 0, 1, 2, 3
GRAIN = 16  # elements that share a record, in each dimension; what kernels reach for are multiples of it


class Partition:
    """One role of a warp-specialised kernel, or the whole block before it splits.

    Attributes:
        clock: what it knows of every partition's time (a vector clock).
        landed: the copies that it knows to have landed.
        products: its wgmma that are not waited for, oldest first.
    """

    def __init__(self, number: int, clock: list[int], landed: set[int]) -> None:
        self.number = number
        self.clock, self.landed = clock, landed
        self.products: deque[Product] = deque()
        self.ready: Callable[[], bool] = lambda: True
        self.waits_for = ""
        self.done = False
        self.go = threading.Semaphore(0)

    def learn(self, clock: list[int], landed: set[int]) -> None:
        self.clock[:] = map(max, self.clock, clock)
        self.landed |= landed

    def tell(self) -> tuple[list[int], set[int]]:
        """What others learn now; whatever this partition does next is later."""
        told = list(self.clock), set(self.landed)
        self.clock[self.number] += 1
        return told


class Machine:
    """Runs one program. The seed decides whose turn it is and when copies land."""

    def __init__(self, seed: object) -> None:
        self.random = random.Random(str(seed))
        self.now = Partition(0, [0] * PARTITIONS, set())
        self.now.clock[0] = 1
        self.copies: list[Callable[[], None]] = []
        self.copied = 0
        self.buffers: list[Buffer] = []
        self.barriers: list[Barrier] = []
        self.allocated = 0
        self.split = False
        self.back = threading.Semaphore(0)
        self.fault: BaseException | None = None

    def allocate(self, count: int) -> None:
        self.allocated += count
        if self.allocated > SHARED_BYTES:
            raise Misused(f"{self.allocated} bytes of shared memory, the device has {SHARED_BYTES}")

    def fence(self) -> None:
        """What this partition's threads wrote, tensor cores and TMA may read."""
        for buffer in self.buffers:
            state = buffer.record[STATE]
            state[(state == UNFENCED) & (buffer.record[WRITER] == self.now.number)] = VALID

    def pause(self) -> None:
        """A moment at which others may run."""
        if self.split and self.random.random() < 0.5:
            self._leave()
        elif not self.split:
            self._land_some()

    def wait(self, ready: Callable[[], bool], what: str) -> None:
        """Until ready() holds."""
        if self.split:
            self.now.ready, self.now.waits_for = ready, what
            self._leave()
            self.now.ready = lambda: True
        while not ready():
            if not self.copies:
                raise Deadlock(what)
            self._land()

    def run(self, roles: list[Callable[[], None]]) -> None:
        """The roles of a warp_specialize, the first of them by the default partition."""
        parent = self.now
        clock, landed = parent.tell()
        partitions = [parent] + [Partition(i, list(clock), set(landed)) for i in range(1, len(roles))]
        for partition in partitions[1:]:
            partition.clock[partition.number] = 1
        threads = [
            threading.Thread(target=self._work, args=(partition, role), daemon=True)
            for partition, role in zip(partitions, roles, strict=True)
        ]
        for thread in threads:
            thread.start()
        self.split = True
        while self.fault is None and any(not p.done for p in partitions):
            able = [p for p in partitions if not p.done and p.ready()]
            if not able and not self.copies:
                stuck = "; ".join(f"partition {p.number} {p.waits_for}" for p in partitions if not p.done)
                self.fault = Deadlock(stuck)
            elif not able or (self.copies and self.random.random() < 0.3):
                self._land()
            else:
                self.now = self.random.choice(able)
                self.now.go.release()
                self.back.acquire()
        self.split = False
        for partition in partitions:
            partition.go.release()
        for thread in threads:
            thread.join()
        if self.fault is not None:
            raise self.fault
        self.now = parent
        for partition in partitions:
            parent.done = False
            parent.learn(partition.clock, partition.landed)

    def finish(self) -> None:
        """The end of the program: nothing may be under way."""
        if self.copies:
            raise Unlanded(f"{len(self.copies)} copies are under way at the end of the program")
        if self.now.products:
            raise Unwaited("a wgmma is not waited for at the end of the program")
        for barrier in self.barriers:
            if barrier.bytes:
                raise WrongPhase(f"{barrier} expects {barrier.bytes} bytes more at the end of the program")

    def _work(self, partition: Partition, role: Callable[[], None]) -> None:
        partition.go.acquire()
        try:
            if self.fault is None:
                role()
                if partition.products:
                    raise Unwaited(f"partition {partition.number} ends before its wgmma are waited for")
        except _Stopped:
            pass
        except BaseException as error:
            self.fault = self.fault or error
        partition.done = True
        self.back.release()

    def _leave(self) -> None:
        partition = self.now
        self.back.release()
        partition.go.acquire()
        if self.fault is not None:
            raise _Stopped
        self.now = partition

    def _land(self) -> None:
        self.copies.pop(self.random.randrange(len(self.copies)))()

    def _land_some(self) -> None:
        while self.copies and self.random.random() < 0.3:
            self._land()


class _Stopped(BaseException):
    """Ends a partition after a fault elsewhere."""


class Barrier:
    """An mbarrier: a phase ends when its arrivals and its bytes are complete (PTX ISA, "mbarrier")."""

    def __init__(self, machine: Machine, name: str) -> None:
        self.machine, self.name = machine, name
        self.count = self.left = self.bytes = self.phases = 0
        self.told: tuple[list[int], set[int]] = [0] * PARTITIONS, set()
        self.known: tuple[list[int], set[int]] = [0] * PARTITIONS, set()
        self.seen: dict[int, int] = {}
        machine.barriers.append(self)

    def __str__(self) -> str:
        return f"barrier {self.name}"

    def init(self, count: int) -> None:
        if self.count:
            raise Misused(f"{self} is initialised twice")
        self.count = self.left = count

    def arrive(self, count: int) -> None:
        self.must_live()
        if count > self.left:
            raise WrongPhase(f"more arrivals at {self} than the {self.count} of a phase")
        self.left -= count
        self._learn(*self.machine.now.tell())

    def expect(self, count: int) -> None:
        self.must_live()
        self.bytes += count
        self.arrive(1)

    def land(self, count: int, copy: int) -> None:
        self.bytes -= count
        self._learn([0] * PARTITIONS, {copy})

    def wait(self, parity: int) -> None:
        self.must_live()
        partition = self.machine.now
        text = f"waits for the phase of parity {parity} of {self} ({self.left} arrivals, {self.bytes} bytes missing)"
        self.machine.wait(lambda: (self.phases - 1) % 2 == parity, text)
        # A fresh barrier passes a wait for parity 1, as if a phase had ended before; each later phase is waited for in
        # turn, or parity stops telling them apart.
        last = self.seen.get(partition.number)
        due = min(self.phases, 1) if last is None else last + 1
        if self.phases != due:
            raise WrongPhase(f"partition {partition.number} passes {self} at phase {self.phases}, not {due}")
        self.seen[partition.number] = self.phases
        partition.learn(*self.known)

    def must_live(self) -> None:
        if not self.count:
            raise Misused(f"{self} is used before it is initialised")

    def _learn(self, clock: list[int], landed: set[int]) -> None:
        self.told = list(map(max, self.told[0], clock)), self.told[1] | landed
        if self.left == 0 and self.bytes == 0:
            self.phases += 1
            self.left = self.count
            self.known = self.told


class Buffer:
    """Shared memory, or a view of some: data, and beside it who wrote and who read it when.

    Attributes:
        grain: elements of each dimension that share a record: GRAIN where that divides the size, or 1.
    """

    def __init__(self, machine: Machine, data: torch.Tensor, record: torch.Tensor, grain: tuple[int, ...]) -> None:
        self.machine, self.data, self.record, self.grain = machine, data, record, grain

    @classmethod
    def allocate(cls, machine: Machine, shape: list[int], dtype: torch.dtype) -> Buffer:
        machine.allocate(dtype.itemsize * torch.Size(shape).numel())
        grain = tuple(1 if size % GRAIN else GRAIN for size in shape)
        records = [size // share for size, share in zip(shape, grain, strict=True)]
        record = torch.zeros((READ + PARTITIONS, *records), dtype=torch.int32)
        made = cls(machine, _poison(torch.empty(shape, dtype=dtype)), record, grain)
        machine.buffers.append(made)
        return made

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    def index(self, index: Any) -> Buffer:
        index = int(index)
        if not 0 <= index < self.data.shape[0]:
            raise OutOfBounds(f"buffer {index} of {self.data.shape[0]}")
        if self.grain[0] != 1:
            raise Misused(f"the simulator records {GRAIN} rows of a buffer {self.shape} together: slice it")
        return Buffer(self.machine, self.data[index], self.record[:, index], self.grain[1:])

    def slice(self, start: int, length: int, dim: int = 0) -> Buffer:
        if not 0 <= start <= start + length <= self.data.shape[dim]:
            raise OutOfBounds(f"[{start}, {start + length}) of dimension {dim} of a buffer {self.shape}")
        share = self.grain[dim]
        if start % share or length % share:
            raise Misused(f"the simulator records {share} elements together, got [{start}, {start + length})")
        data = self.data.narrow(dim, start, length)
        return Buffer(self.machine, data, self.record.narrow(dim + 1, start // share, length // share), self.grain)

    def permute(self, order: tuple[int, ...]) -> Buffer:
        record = self.record.permute((0, *(d + 1 for d in order)))
        return Buffer(self.machine, self.data.permute(order), record, tuple(self.grain[d] for d in order))

    def load(self, layout: Any) -> torch.Tensor:
        self.machine.pause()
        self.check_read(asynchronous=False)
        self.record[READ + self.machine.now.number] = self._time
        return self.data.clone()

    def store(self, value: torch.Tensor) -> None:
        self.machine.pause()
        if list(value.shape) != self.shape or value.dtype != self.dtype:
            raise Misused(f"{value.dtype} {list(value.shape)} stored to a buffer of {self.dtype} {self.shape}")
        self.check_write()
        self.data.copy_(value)
        self.mark(UNFENCED)

    @property
    def _time(self) -> int:
        return self.machine.now.clock[self.machine.now.number]

    def mark(self, state: int) -> None:
        """As written by this partition now."""
        self.record[STATE] = state
        self.record[WRITER] = self.machine.now.number
        self.record[WRITTEN] = self._time

    def begin_landing(self) -> int:
        """A copy into this buffer begins; returns its number, which its barrier tells to those who wait."""
        self.check_write()
        self.machine.copied += 1
        self.record[STATE], self.record[WRITER], self.record[WRITTEN] = LANDING, COPY, self.machine.copied
        _poison(self.data)
        return self.machine.copied

    def end_landing(self, values: torch.Tensor) -> None:
        self.data.copy_(values)
        self.record[STATE] = VALID

    def begin_reading(self) -> None:
        self.record[READERS] += 1

    def check_read(self, asynchronous: bool) -> None:
        state = self.record[STATE]
        if (state == LANDING).any():
            raise Unlanded(f"a buffer {self.shape} is read while its copy is under way")
        if (state == EMPTY).any():
            raise Unlanded(f"a buffer {self.shape} is read that nobody has written")
        if asynchronous and (state == UNFENCED).any():
            raise Unfenced(f"a buffer {self.shape} written by threads is read by the asynchronous proxy")
        if self._unknown_write():
            raise Unlanded(f"a buffer {self.shape} is read without waiting for its writer")

    def check_write(self) -> None:
        if (self.record[STATE] == LANDING).any():
            raise Unreleased(f"a buffer {self.shape} is written while a copy into it is under way")
        if (self.record[READERS] > 0).any():
            raise Unreleased(f"a buffer {self.shape} is written while a wgmma reads it")
        clock = torch.tensor(self.machine.now.clock, dtype=torch.int32)
        if (self.record[READ:] > clock.view(-1, *[1] * len(self.shape))).any():
            raise Unreleased(f"a buffer {self.shape} is written without waiting for its readers")
        if self._unknown_write():
            raise Unreleased(f"a buffer {self.shape} is written without waiting for its writer")

    def _unknown_write(self) -> bool:
        writer, written = self.record[WRITER], self.record[WRITTEN]
        copied = writer == COPY
        if not set(written[copied].unique().tolist()) <= self.machine.now.landed:
            return True
        known = torch.tensor([*self.machine.now.clock, 0], dtype=torch.int32)[writer.long()]
        return bool(((written > known) & ~copied).any())


class Product:
    """A wgmma under way. It is no tensor: any use before the wait is a fault."""

    def __init__(self, value: torch.Tensor, read: list[Buffer], operand: torch.Tensor | None) -> None:
        self.value, self.read, self.operand = value, read, operand
        self.retired = False

    @property
    def shape(self) -> list[int]:
        return list(self.value.shape)

    def retire(self, partition: Partition, kept: list[Any]) -> None:
        if self.operand is not None and not any(x is self.operand for x in kept):
            raise Unwaited("the register operand of a wgmma is not among what is kept until its end")
        for buffer in self.read:
            buffer.record[READERS] -= 1
            buffer.record[READ + partition.number] = partition.clock[partition.number]
        self.retired = True

    def _used(self, *_: Any) -> Any:
        raise Unwaited("an accumulator is used before its wgmma is waited for")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __getitem__ = __eq__ = __lt__ = _used
    __neg__ = __gt__ = __le__ = __ge__ = _used
    __hash__ = object.__hash__

    def __getattr__(self, name: str) -> Any:
        self._used()


def _poison(x: torch.Tensor) -> torch.Tensor:
    return x.fill_(float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).max)
