"""A model of an sm_90 multiprocessor in plain Python that runs Gluon kernels of this project from their own source.

Tensors are torch tensors, layouts mean nothing, a partition of warps is a thread of Python of which one runs at a time.
Between any two operations on barriers, copies and products `choose` says who goes on: a partition, or a copy that
arrives. What real hardware would answer with wrong numbers or by hanging is an error here:

- a deadlock: nobody can go on;
- a tile of shared memory that is written while a product may still read it, or read while a copy writes it;
- an accumulator that is used before its product was waited for, or an operand in registers that no wait keeps alive;
- more arrivals at a barrier than its count, bytes that were not announced, copies or products that nobody waits for.

Products read their tiles when they are waited for, as late as they may. A product or copy is an operation of its own:
the trace of a run, a list for each partition, is what `gluon_search` searches every order of.
"""

from __future__ import annotations

import operator
import threading
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Operation = tuple[Any, ...]


class ProtocolError(Exception):
    """The kernel does what would go wrong on the device."""


@dataclass(eq=False)
class Barrier:
    """An mbarrier: a phase ends when `count` have arrived and no announced byte is missing."""

    name: str
    count: int = 0
    arrived: int = 0
    missing: int = 0
    phase: int = 0

    def arrive(self, expected: int = 0) -> None:
        """One arrival, which announces so many bytes."""
        self.arrived += 1
        self.missing += expected
        if self.arrived > self.count:
            raise ProtocolError(f"{self.name}: {self.arrived} arrivals, its count is {self.count}")
        self.settle()

    def settle(self) -> None:
        """End the phase if nothing is missing."""
        if self.missing < 0 and self.arrived == self.count:
            raise ProtocolError(f"{self.name}: more bytes than were announced")
        if self.arrived == self.count and self.missing == 0:
            self.arrived, self.phase = 0, self.phase + 1

    def passed(self, parity: int) -> bool:
        """Whether the phase of this parity has ended; that before the first one has."""
        return self.phase & 1 != parity


@dataclass(eq=False)
class Tile:
    """A tile of shared memory."""

    name: str
    value: Tensor | None = None
    writing: bool = False
    readers: int = 0


@dataclass(frozen=True, eq=False)
class View:
    """A tile as a product reads it."""

    tile: Tile
    dtype: torch.dtype
    shape: tuple[int, ...] | None = None
    transposed: bool = False

    def reshape(self, shape: Sequence[int]) -> View:
        """In another shape."""
        return View(self.tile, self.dtype, tuple(shape), self.transposed)

    def permute(self, order: Sequence[int]) -> View:
        """Transposed."""
        assert list(order) == [1, 0]
        return View(self.tile, self.dtype, self.shape, not self.transposed)

    def read(self) -> Tensor:
        """What is in it now."""
        if self.tile.value is None or self.tile.writing:
            raise ProtocolError(f"{self.tile.name} is read before a copy into it has arrived")
        x = self.tile.value.reshape(self.shape or self.tile.value.shape)
        return x.T if self.transposed else x


@dataclass(eq=False)
class Ring:
    """What `allocate_shared_memory` returns: tiles, or barriers."""

    items: list[Any]
    dtype: torch.dtype

    def index(self, i: Any) -> Any:
        """The i-th."""
        item = self.items[operator.index(i)]
        return item if isinstance(item, Barrier) else View(item, self.dtype)


class Pointer:
    """A pointer into memory, or a tensor of them: `x` is all of it behind the tensor's first element."""

    def __init__(self, x: Tensor, offset: Any = 0) -> None:
        self.x, self.offset = x, offset

    @classmethod
    def to(cls, x: Tensor) -> Pointer:
        """To the first element of a tensor."""
        behind = x.untyped_storage().nbytes() // x.element_size() - x.storage_offset()
        return cls(x.as_strided((behind,), (1,)))

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.x, self.offset + offset)

    def _places(self, mask: Any) -> tuple[Tensor, Tensor]:
        places = torch.as_tensor(self.offset)
        places, keep = torch.broadcast_tensors(places, torch.as_tensor(True if mask is None else mask))
        if bool(((places < 0) | (places >= self.x.numel()))[keep].any()):
            raise ProtocolError("an address outside of its tensor")
        return places, keep

    def load(self, mask: Any = None, other: Any = None) -> Tensor:
        """Values, `other` where the mask is false."""
        places, keep = self._places(mask)
        if not bool(keep.any()):
            return torch.full(places.shape, other, dtype=self.x.dtype)
        found = self.x[torch.where(keep, places, 0)]
        return found if mask is None else torch.where(keep, found, torch.as_tensor(other, dtype=self.x.dtype))

    def store(self, value: Tensor, mask: Any = None) -> None:
        """Write values where the mask is true."""
        places, keep = self._places(mask)
        self.x[places[keep]] = value.expand(places.shape)[keep].to(self.x.dtype)


@dataclass
class Descriptor:
    """A tensor as the copy engine sees it; reads beyond its sizes give zeros."""

    x: Tensor
    block: tuple[int, ...]

    def __post_init__(self) -> None:
        self.dtype, self.layout = self.x.dtype, None
        rows, columns = self.block[-2:]
        self.block_type = types.SimpleNamespace(nbytes=rows * columns * self.x.element_size(), shape=list(self.block))

    def read(self, coordinates: Sequence[Any]) -> Tensor:
        """The block at these coordinates."""
        i_b, i_h, first, column = (operator.index(c) for c in coordinates)
        rows, columns = self.block[-2:]
        found = torch.zeros(rows, columns, dtype=self.x.dtype)
        part = self.x[i_b, i_h, first : first + rows, column : column + columns]
        found[: part.shape[0], : part.shape[1]] = part
        return found


@dataclass(eq=False)
class Product:
    """An asynchronous product; `value` once it was waited for."""

    a: View | Tensor
    b: View
    acc: Tensor | None
    value: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        raise ProtocolError(f"an accumulator is used ({name}) before its product was waited for")

    def _refuse(self, *_: Any) -> Any:
        raise ProtocolError("an accumulator is used before its product was waited for")

    __add__ = __mul__ = __truediv__ = __sub__ = __rmul__ = _refuse

    @property
    def views(self) -> list[View]:
        """The tiles that it reads."""
        return [x for x in (self.a, self.b) if isinstance(x, View)]

    def finish(self) -> None:
        """Multiply."""
        a = self.a.read() if isinstance(self.a, View) else self.a
        value = a.float() @ self.b.read().float()
        object.__setattr__(self, "value", value if self.acc is None else value + self.acc)
        for view in self.views:
            view.tile.readers -= 1


@dataclass(eq=False)
class Copy:
    """A copy on its way into shared memory."""

    value: Tensor
    tile: Tile
    barrier: Barrier

    def deliver(self) -> None:
        """Arrive."""
        self.tile.value, self.tile.writing = self.value, False
        self.barrier.missing -= self.value.numel() * self.value.element_size()
        self.barrier.settle()


@dataclass(eq=False)
class Partition:
    """Warps that run a function; they may go on when `ready()` is true."""

    run: Callable[[], None]
    ready: Callable[[], bool] = lambda: True
    done: bool = False
    error: BaseException | None = None
    products: list[Product] = field(default_factory=list)
    trace: list[Operation] = field(default_factory=list)
    turn: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))


class Machine:
    """One multiprocessor with one program on it. `choose(number)` picks who goes on, of so many."""

    def __init__(self, choose: Callable[[int], int], program: int, programs: int) -> None:
        self.choose, self.program, self.programs = choose, program, programs
        self.copies: list[Copy] = []
        self.partitions: list[Partition] = []
        self.current: Partition | None = None
        self.control = threading.Semaphore(0)
        self.stopped = False
        self.tiles = 0

    def pause(self, ready: Callable[[], bool] = lambda: True) -> None:
        """Let the others go on, until `ready` and chosen."""
        own = self.current
        if own is None:
            return
        own.ready = ready
        self.control.release()
        own.turn.acquire()
        if self.stopped:
            raise SystemExit

    def record(self, *operation: Any) -> None:
        """Note an operation in the trace of who runs."""
        if self.current is not None:
            self.current.trace.append(operation)

    def specialize(self, functions: Sequence[tuple[Callable[..., None], Sequence[Any]]]) -> None:
        """Run partitions until all are done."""
        self.partitions = [Partition(lambda f=f, a=a: f(*a)) for f, a in functions]
        threads = [threading.Thread(target=self._thread, args=(p,), daemon=True) for p in self.partitions]
        for thread in threads:
            thread.start()
        try:
            while waiting := [p for p in self.partitions if not p.done]:
                able: list[Any] = [p for p in waiting if p.ready()] + self.copies
                if not able:
                    raise ProtocolError(f"deadlock: {len(waiting)} of {len(self.partitions)} partitions wait")
                chosen = able[self.choose(len(able))]
                if isinstance(chosen, Copy):
                    self.copies.remove(chosen)
                    chosen.deliver()
                    continue
                self.current = chosen
                chosen.turn.release()
                self.control.acquire()
                self.current = None
                if chosen.error is not None:
                    raise chosen.error
        finally:
            self.stopped = True
            for partition in self.partitions:
                partition.turn.release()
            for thread in threads:
                thread.join()
        if self.copies:
            raise ProtocolError(f"{len(self.copies)} copies arrive after the program has ended")

    def _thread(self, partition: Partition) -> None:
        partition.turn.acquire()
        try:
            if not self.stopped:
                partition.run()
                if partition.products:
                    raise ProtocolError(f"{len(partition.products)} products are not waited for")
        except SystemExit:
            pass
        except BaseException as error:
            partition.error = error
        partition.done = True
        if not self.stopped:
            self.control.release()
