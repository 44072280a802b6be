"""Sequences that several processes hold in pieces, as context parallelism does.

A *shard* is the rows of a sequence that this process holds. Its peers hold the others, in the order of their ranks, and
all run the same program; so where two shards are aligned, the sequences are. An exchange puts a new axis in front whose
positions are the peers ("row r came from process r"), and that axis with the shard behind it is the sequence again:

    %local  : [B, S / n, H, D]           chunk[rank]: a shard of S
    %sent   : [n, S / n, B, H / n, D]    the heads for process r in place r
    %heard  : [n, S / n, B, H / n, D]    all_to_all_single: peers x shard
    %whole  : [S, B, H / n, D]           flatten(0, 1): S

Nothing need be known of the sequence: where no graph showed how it was cut, as in a compiled block, it is a new axis.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from .concatenation import slice_label
from .labels import Axis, Label, Part, Peers, Shard, Source, label_size, resolve, same_axes


class Joined(NamedTuple):
    """A sequence that an exchange has put together from shards of these lengths, one a peer."""

    whole: Label
    local: Axis
    peers: Peers
    lengths: tuple[int, ...]


class Shards:
    """The shards of one graph; groups: the processes that its collectives are among."""

    def __init__(self, groups: Iterable[Peers] = ()) -> None:
        self.groups = frozenset(groups)
        self._joined: list[Joined] = []

    def mark(self, label: Label, whole: Label, start: int, stop: int) -> Label:
        """The label of rows `start..stop` of a dimension; noted as a shard where they are those of this process.

        So are rows that are all of a piece, such as the prompt in front of a video: other processes have other rows.
        """
        leaves = resolve(label)
        by = next((one for one in self.groups if rows_of_rank(label_size(whole), one) == (start, stop)), None)
        if by is None or not leaves or any(axis.feature or axis.shard for axis in leaves) or start == stop:
            return label
        one = leaves[0]
        if len(leaves) > 1 or not one.parts or one in resolve(whole):
            one = Axis(stop - start, one.source)
            one.parts = (Part(leaves, 0, stop - start),)
        one.shard = Shard(Part(whole, start, stop), by)
        return (one,)

    def noted(self, label: Label) -> Label:
        """The label; noted as a shard where it is rows of this process, as what was sliced out of video and text is."""
        leaves = resolve(label)
        if len(leaves) == 1 and len(leaves[0].parts or ()) == 1:
            (rows,) = leaves[0].parts or ()
            self.mark(label, rows.label, rows.start, rows.stop)
        return label

    def whole(self, local: Axis, peers: Peers, source: Source, lengths: Sequence[int] = ()) -> Label | None:
        """What the shards of all peers are together; None where they are no rows that follow each other.

        lengths: of the peers' shards, where they differ.
        """
        lengths = tuple(lengths) or (local.size,) * peers.size
        for joined in self._joined:
            if (joined.local, joined.peers, joined.lengths) == (local, peers, lengths):
                return joined.whole
        before = sum(lengths[: peers.rank])
        if local.shard is None:
            rows = Part((Axis(sum(lengths), source),), before, before + local.size)
            local.shard = Shard(rows, peers)
            local.parts = local.parts or (rows,)
        rows, by = local.shard
        start, stop = rows.start - before, rows.start - before + sum(lengths)
        if start < 0 or stop > label_size(rows.label) or not _follow_each_other(peers, by, rows):
            return None
        whole = slice_label(rows.label, start, stop, source)
        if not same_axes(resolve(whole), resolve(rows.label)) and len(resolve(whole)) == 1:
            resolve(whole)[0].shard = Shard(Part(rows.label, start, stop), by)
        self._joined.append(Joined(whole, local, peers, lengths))
        return whole

    def rejoined(self, label: Label, source: Source) -> Label:
        """The sequence, of a label that is peers and the shard behind them; any other label as it is."""
        leaves = resolve(label)
        if len(leaves) != 2 or leaves[0].peers is None or leaves[1].feature or leaves[1].peers:
            return label
        whole = self.whole(leaves[1], leaves[0].peers, source)
        return label if whole is None else whole

    def parted(self, labels: Sequence[Label], sizes: Sequence[int], source: Source) -> Sequence[Label]:
        """Labels in which a joined sequence is peers and shard again, where a reshape to `sizes` cuts it so."""
        leaves = [leaf for label in labels for leaf in resolve(label)]
        for joined in self._joined:
            inner = resolve(joined.whole)
            if len(set(joined.lengths)) != 1:
                continue
            for i in range(len(leaves) - len(inner) + 1):
                if same_axes(tuple(leaves[i : i + len(inner)]), inner) and _cuts(leaves[:i], joined, sizes):
                    return _substituted(labels, inner, (axis_of(joined.peers, source), joined.local))
        return labels

    def local_of(self, label: Label, peers: Peers, lengths: Sequence[int]) -> Axis | None:
        """The shard of which a label is the whole, for shards of these lengths; None where it is none's."""
        for joined in self._joined:
            cut_so = (joined.peers, joined.lengths) == (peers, tuple(lengths))
            if cut_so and same_axes(resolve(joined.whole), resolve(label)):
                return joined.local
        return None

    def of_peer(self, label: Label, rank: int, peers: Peers, source: Source) -> Label:
        """The label that process `rank` has where this one has `label`: a shard is its shard."""
        leaves = resolve(label)
        if len(leaves) != 1 or leaves[0].feature or leaves[0].shard is None:
            return label
        whole, n = self.whole(leaves[0], peers, source), leaves[0].size
        return label if whole is None else slice_label(whole, rank * n, (rank + 1) * n, source)


def axis_of(peers: Peers, source: Source) -> Axis:
    """A new axis whose positions are the processes of a group."""
    axis = Axis(peers.size, source)
    axis.peers = peers
    return axis


def rows_of_rank(size: int, peers: Peers) -> tuple[int, int]:
    """(start, stop) of the rows of one process, of a dimension that is cut as evenly as can be (`tensor_split`)."""
    each, more = divmod(size, peers.size)
    start = peers.rank * each + min(peers.rank, more)
    return start, start + each + (peers.rank < more)


def _follow_each_other(peers: Peers, by: Peers, rows: Part) -> bool:
    """Whether rows of some processes, as many as these, follow each other in a sequence that was cut among others.

    They may be those of several of these others, which an exchange has put together before.
    """
    each = max(1, rows.size * by.size // max(1, label_size(rows.label)))
    places = [by.ranks.index(rank) // each if rank in by.ranks else -1 for rank in peers.ranks]
    return min(places) >= 0 and places == list(range(places[0], places[0] + len(places)))


def _cuts(before: Sequence[Axis], joined: Joined, sizes: Sequence[int]) -> bool:
    """Whether a shape has a boundary between the peers of a sequence and their shards, and one behind these."""
    outer, ends = label_size(tuple(before)), {1}
    total = 1
    for size in sizes:
        total *= size
        ends.add(total)
    return {outer, outer * joined.peers.size, outer * label_size(joined.whole)} <= ends


def _substituted(labels: Sequence[Label], inner: Label, by: Label) -> list[Label]:
    """Labels with axes that follow each other within one of them replaced."""
    out = []
    for label in labels:
        leaves = list(resolve(label))
        for i in range(len(leaves) - len(inner) + 1):
            if same_axes(tuple(leaves[i : i + len(inner)]), inner):
                leaves[i : i + len(inner)] = by
                break
        out.append(tuple(leaves) if any(axis in by for axis in leaves) else label)
    return out
