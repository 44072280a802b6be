"""The words of Gluon as `gluon_model` understands them, and kernels run from their own source with those words."""

from __future__ import annotations

import operator
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .gluon_model import (
    Barrier,
    Copy,
    Descriptor,
    Machine,
    Operation,
    Pointer,
    Product,
    ProtocolError,
    Ring,
    Tile,
    View,
)

SCALARS = ("items", "H", "SQ", "SK")
"""Arguments of kernels that are known when they run."""


def number(x: Any) -> Tensor:
    """A scalar as kernels have it."""
    return torch.as_tensor(x, dtype=torch.int32)


def language(machine: Machine) -> types.SimpleNamespace:
    """`gl`, and `tl` of the functions that Gluon kernels borrow."""

    def allocate(dtype: Any, shape: Sequence[Any], layout: Any) -> Ring:
        machine.tiles += 1
        label, length = machine.tiles, operator.index(shape[0])
        if dtype is torch.int64:
            return Ring([Barrier(f"barrier {label}.{i}") for i in range(length)], dtype)
        return Ring([Tile(f"tile {label}.{i}") for i in range(length)], dtype)

    def pinned(text: str, constraints: str, args: Sequence[Tensor], **_: Any) -> Tensor:
        assert not bool((args[0] < 0).any()), "the instruction that never runs would run"
        return args[0]

    def warp_specialize(functions: Any, warps: Sequence[int], registers: Sequence[int]) -> None:
        assert len(functions) == len(warps) + 1 == len(registers) + 1
        machine.specialize(functions)

    def full(shape: Sequence[Any], value: float, dtype: torch.dtype, layout: Any = None) -> Tensor:
        return torch.full([operator.index(n) for n in shape], value, dtype=dtype)

    return types.SimpleNamespace(
        constexpr=lambda x: x,
        int32=torch.int32,
        int64=torch.int64,
        float32=torch.float32,
        static_range=lambda n: range(n),
        program_id=lambda axis: number(machine.program),
        num_programs=lambda axis: number(machine.programs),
        load=lambda p, mask=None, other=None: p.load(mask, other),
        store=lambda p, value, mask=None: p.store(value, mask),
        arange=lambda first, end, layout=None: torch.arange(first, end, dtype=torch.int32),
        full=full,
        where=lambda mask, a, b: torch.where(torch.as_tensor(mask), a, b),
        maximum=lambda a, b: torch.maximum(*map(torch.as_tensor, (a, b))),
        minimum=lambda a, b: torch.minimum(*map(torch.as_tensor, (a, b))),
        max=lambda x, axis: x.amax(axis),
        min=lambda x, axis: x.amin(axis),
        sum=lambda x, axis: x.sum(axis),
        exp2=torch.exp2,
        log2=torch.log2,
        to_tensor=torch.as_tensor,
        cdiv=lambda a, b: (a + b - 1) // b,
        expand_dims=torch.unsqueeze,
        convert_layout=lambda x, layout: x,
        inline_asm_elementwise=pinned,
        allocate_shared_memory=allocate,
        warp_specialize=warp_specialize,
        NVMMADistributedLayout=lambda *_: None,
        DotOperandLayout=lambda *_: None,
        SliceLayout=lambda *_: None,
        BlockedLayout=lambda *_: None,
    )


def barriers(machine: Machine) -> types.SimpleNamespace:
    """`mbarrier`."""

    def init(barrier: Barrier, count: int) -> None:
        barrier.count = count

    def wait(barrier: Barrier, parity: Any) -> None:
        parity = int(parity)
        machine.record("wait", barrier, parity)
        machine.pause(lambda: barrier.passed(parity))

    def arrive(barrier: Barrier, count: int = 1) -> None:
        machine.pause()
        machine.record("arrive", barrier, count)
        for _ in range(count):
            barrier.arrive()

    def expect(barrier: Barrier, nbytes: int) -> None:
        machine.pause()
        machine.record("expect", barrier, nbytes)
        barrier.arrive(nbytes)

    return types.SimpleNamespace(init=init, wait=wait, arrive=arrive, expect=expect, MBarrierLayout=lambda: None)


def copies(machine: Machine) -> Callable[..., None]:
    """`async_load`."""

    def load(x: Descriptor, coordinates: Sequence[Any], barrier: Barrier, view: View) -> None:
        machine.pause()
        tile, value = view.tile, x.read(coordinates)
        if tile.readers or tile.writing:
            raise ProtocolError(f"{tile.name} is written while it is {'read' if tile.readers else 'written'}")
        machine.record("copy", tile, barrier, value.numel() * value.element_size())
        tile.writing = True
        machine.copies.append(Copy(value, tile, barrier))

    return load


def products(machine: Machine) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`warpgroup_mma` and `warpgroup_mma_wait`."""

    def multiply(a: Any, b: View, acc: Any, use_acc: bool = True, is_async: bool = False) -> Product:
        assert is_async
        machine.pause()
        if isinstance(acc, Product):
            raise ProtocolError("a product adds to an accumulator that was not waited for")
        product = Product(a, b, acc if use_acc else None)
        for view in product.views:
            view.read()
            view.tile.readers += 1
        machine.record("read", *(view.tile for view in product.views))
        machine.current.products.append(product)
        return product

    def wait(outstanding: int, deps: Iterable[Any]) -> Any:
        deps = list(deps)
        machine.pause()
        machine.record("finish", outstanding)
        queue = machine.current.products
        while len(queue) > outstanding:
            product = queue.pop(0)
            product.finish()
            kept = [product, *([product.a] if isinstance(product.a, Tensor) else [])]
            if any(all(x is not dep for dep in deps) for x in kept):
                raise ProtocolError("a wait does not keep what its product writes, or reads from registers, alive")
        results = [x.value if isinstance(x, Product) and x.value is not None else x for x in deps]
        return results[0] if len(results) == 1 else tuple(results)

    return multiply, wait


def scope_of(home: dict[str, Any], words: dict[str, Any], made: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """The globals of a module of kernels in which Gluon's words, and functions of other modules, are the model's."""
    if id(home) in made:
        return made[id(home)]
    names = made[id(home)] = dict(home)
    for name, value in home.items():
        if name in words:
            names[name] = words[name]
        elif hasattr(value, "FIELDS"):
            names[name] = lambda *values, fields=value.FIELDS: types.SimpleNamespace(
                **dict(zip(fields, values, strict=True))
            )
        elif hasattr(value, "fn") and hasattr(value, "arg_names"):  # a kernel or a part of one
            part = value.fn
            scope = scope_of(part.__globals__, words, made)
            names[name] = types.FunctionType(part.__code__, scope, name, part.__defaults__)
        elif type(value).__name__ == "constexpr":
            names[name] = value.value
    return names


def run(
    kernel: Any, programs: int, choose: Callable[[int], int], arguments: dict[str, Any]
) -> list[list[list[Operation]]]:
    """Run a Gluon kernel; tensors among the arguments become pointers. Returns the traces of each program."""
    function = kernel.fn
    given = {
        name: Pointer.to(x) if isinstance(x, Tensor) else number(x) if name in SCALARS else x
        for name, x in arguments.items()
    }
    traces = []
    for program in range(programs):
        machine = Machine(choose, program, programs)
        gl = language(machine)
        multiply, wait = products(machine)
        words = {"gl": gl, "tl": gl, "mbarrier": barriers(machine), "async_load": copies(machine)}
        words |= {"warpgroup_mma": multiply, "warpgroup_mma_wait": wait}
        scope = scope_of(function.__globals__, words, {})
        types.FunctionType(function.__code__, scope, "kernel")(**given)
        traces.append([partition.trace for partition in machine.partitions])
    return traces
