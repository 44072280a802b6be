"""How axes move where processes exchange rows; see axes/shards.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...axes.concatenation import settled
from ...axes.labels import Label, Peers, Source, fresh, resolve, take
from ...axes.shards import axis_of
from ...axes.streams import Stream, get_stream
from ...axes.tensor_labels import Labels, get_labels
from ..calls import AxisTrace, StreamCall
from ..process_groups import peers_of


def all_to_all(trace: AxisTrace, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels | None:
    """Rows for each peer are exchanged for rows from each: (x, rows from each, rows for each, group)."""
    x, heard, sent = args[:3]
    peers, labels = peers_of(args[3]), get_labels(x)
    if peers is None:
        return None
    if len(set(heard)) > 1:  # heads for tokens, of shards that differ
        return _gather_tokens(trace, labels, peers, heard)
    if len(set(sent)) > 1:  # and back
        local = trace.shards.local_of(labels[0], peers, sent)
        return None if local is None else [(*_heads(peers, trace.source()), local), *labels[1:]]
    leaves = list(settled(labels[0]))
    outer = take(leaves, peers.size, trace.node)
    if outer is None or _dealt(outer, tuple(leaves)):
        return None
    front = resolve(outer)[0] if outer else None
    back = front is not None and front.peers == peers
    first = _heads(peers, trace.source()) if back else (axis_of(peers, trace.source()),)
    return [trace.shards.rejoined((*first, *leaves), trace.source()), *labels[1:]]


def _gather_tokens(trace: AxisTrace, labels: Labels, peers: Peers, heard: Sequence[int]) -> Labels | None:
    """[n x local, ...] with the local rows of each peer's heads -> the rows of all peers."""
    leaves = list(settled(labels[0]))
    outer = take(leaves, peers.size, trace.node)
    if outer is None or len(leaves) != 1 or leaves[0].size != heard[peers.rank] or _dealt(outer, resolve(labels[-1])):
        return None
    whole = trace.shards.whole(leaves[0], peers, trace.source(), heard)
    return None if whole is None else [whole, *labels[1:]]


def _heads(peers: Peers, source: Source) -> Label:
    """Axis of the heads, or of other features, that each peer has sent."""
    (axis,) = fresh(peers.size, source)
    axis.feature = True
    return (axis,)


def _dealt(outer: Label, rest: Label) -> bool:
    """Whether heads are dealt one by one, so that a process has none that follow each other."""
    front = resolve(outer)[:1]
    parents = [axis.parent for axis in rest if axis.parent is not None and front and axis.parent is front[0].parent]
    return any(resolve(parent.factors or ())[:1] != front for parent in parents)


def all_gather(trace: AxisTrace, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels | None:
    """The rows of all peers, one peer after the other: (x, number of peers, group)."""
    peers, labels = peers_of(args[2]), get_labels(args[0])
    if peers is None:
        return None
    first = (axis_of(peers, trace.source()), *settled(labels[0]))
    if len(first) > 1 and first[1].shard is not None:
        first = trace.shards.rejoined(first, trace.source())
    return [first, *labels[1:]]


def gathered(call: StreamCall) -> list[Stream | None]:
    """The tokens of all peers, of which the operand's are some."""
    x, peers = call.args[0], peers_of(call.args[2])
    stream = get_stream(x)
    if stream is None or peers is None:
        return [stream]
    n = x.shape[0]
    return [Stream(call.streams.whole_of(stream.term, peers, n), stream.projected)]
