"""Every order in which the operations of a Gluon kernel can happen, searched to the end.

What the partitions of a program do does not depend on who is faster: a run in `gluon_model` gives the list of each, and
every interleaving of these lists and of the arrivals of copies is a run that hardware may show. A state is how far each
partition is and which copies are still on their way; all else follows from it. States that were seen are not searched
again, so that the search ends: half a million states for rows of six, no and three tiles with four stages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .gluon_model import Barrier, Operation, ProtocolError, Tile


class Search:
    """All states that a program can reach; raises ProtocolError in the first bad one."""

    def __init__(self, traces: Sequence[Sequence[Operation]], counts: dict[Barrier, int]) -> None:
        self.traces, self.counts = traces, counts
        self.arrivals = [list(_arrivals(trace)) for trace in traces]
        self.announced = [list(_announced(trace)) for trace in traces]
        self.read = [list(_reading(trace)) for trace in traces]

    def run(self) -> int:
        """Search; returns the number of states."""
        start = (tuple(0 for _ in self.traces), frozenset())
        seen, waiting = {start}, [start]
        while waiting:
            state = waiting.pop()
            nexts = list(self.successors(state))
            if not nexts and any(place < len(trace) for place, trace in zip(state[0], self.traces, strict=True)):
                raise ProtocolError(f"deadlock at operations {state[0]}")
            if not nexts and state[1]:
                raise ProtocolError("a copy arrives after the program has ended")
            for found in nexts:
                if found not in seen:
                    seen.add(found)
                    waiting.append(found)
        return len(seen)

    def successors(self, state: Any) -> Iterator[Any]:
        """States one operation later."""
        places, flying = state
        reading = self.reading(places)
        written = {self.traces[p][i][1] for p, i in flying}
        for copy in flying:
            yield places, flying - {copy}
        for p, (place, trace) in enumerate(zip(places, self.traces, strict=True)):
            if place == len(trace):
                continue
            kind, *rest = trace[place]
            if kind == "wait" and self.phase(rest[0], places, flying) & 1 == rest[1]:
                continue
            if kind == "copy" and (rest[0] in reading or rest[0] in written):
                raise ProtocolError(f"{rest[0].name} is written while it is in use, at operations {places}")
            if kind == "read" and (bad := [tile.name for tile in rest if tile in written]):
                raise ProtocolError(f"{bad} are read while they are written, at operations {places}")
            moved = (*places[:p], place + 1, *places[p + 1 :])
            yield moved, flying | {(p, place)} if kind == "copy" else flying

    def phase(self, barrier: Barrier, places: Sequence[int], flying: Any) -> int:
        """Ended phases of a barrier: by arrivals, and not before the bytes of the last of them are there."""
        arrivals = sum(self.arrivals[p][place].get(barrier, 0) for p, place in enumerate(places))
        whole, part = divmod(arrivals, self.counts[barrier])
        announced = any(self.announced[p][place] is barrier for p, place in enumerate(places))
        missing = announced or any(self.traces[p][i][2] is barrier for p, i in flying)
        return whole - (part == 0 and missing)

    def reading(self, places: Sequence[int]) -> set[Tile]:
        """Tiles that a product which is not waited for yet may read."""
        return set().union(*(self.read[p][place] for p, place in enumerate(places)))


def _arrivals(trace: Sequence[Operation]) -> Iterator[dict[Barrier, int]]:
    """Arrivals at barriers before each operation of a partition, and after the last."""
    found: dict[Barrier, int] = {}
    yield found
    for kind, *rest in trace:
        if kind in ("arrive", "expect"):
            found = {**found, rest[0]: found.get(rest[0], 0) + (rest[1] if kind == "arrive" else 1)}
        yield found


def _announced(trace: Sequence[Operation]) -> Iterator[Barrier | None]:
    """The barrier to which bytes were announced whose copy is not under way yet."""
    barrier = None
    yield barrier
    for kind, *rest in trace:
        if kind == "expect":
            barrier = rest[0]
        elif kind == "copy":
            assert rest[1] is barrier, "a copy follows the announcement of its bytes"
            barrier = None
        yield barrier


def _reading(trace: Sequence[Operation]) -> Iterator[set[Tile]]:
    """Tiles that products of a partition may read."""
    queue: list[Sequence[Tile]] = []
    yield set()
    for kind, *rest in trace:
        if kind == "read":
            queue = [*queue, rest]
        elif kind == "finish":
            queue = queue[len(queue) - rest[0] :] if rest[0] else []
        yield {tile for tiles in queue for tile in tiles}


def search(traces: Sequence[Sequence[Operation]]) -> int:
    """Number of states of one program's traces; raises ProtocolError where one is bad."""
    barriers = {x for trace in traces for operation in trace for x in operation if isinstance(x, Barrier)}
    return Search(traces, {barrier: barrier.count for barrier in barriers}).run()
