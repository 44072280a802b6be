"""Ring attention: one attention for the keys of each process, merged by their log-sum-exps.

    %all = wait(all_gather(cat([%k.flatten(), %v.flatten()])))        every process has all keys and values
    %out_0, %lse_0 = attention(%q, %k, %v)                            its own
    %out_1, %lse_1 = attention(%q, %all[1][:n] as %k, %all[1][n:] as %v)
    %out = %out_0 - sigmoid(%lse_1 - %lse_0) * (%out_0 - %out_1)
    %lse = %lse_0 - logsigmoid(%lse_0 - %lse_1), and so on

This is attention of the local queries over all keys. Whatever is not exactly so is no ring.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from ..operators.names import argument, op_name, operand, operator_name, tensor_value
from ..operators.process_groups import peers_of
from ..operators.table import operator_of
from ..site import AttentionCall, Ring
from .library_attention import MORE_OUTPUTS

Read = Callable[[fx.Node], "AttentionCall | None"]
"""The attention that ends in a node; None if none does."""


@dataclass(frozen=True)
class _State:
    """Pieces that are merged in `out`, and the log-sum-exp that belongs to it."""

    out: fx.Node
    pieces: tuple[fx.Node, ...]
    steps: tuple[fx.Node, ...]


def rings(graph: fx.Graph, read: Read) -> Iterator[Ring]:
    """The rings of a graph, in order."""
    calls: dict[fx.Node, AttentionCall] = {}
    for node in graph.nodes:
        found = read(node) if node.op == "call_function" else None
        if found is not None and found.output == 0 and _is_plain(found):
            calls[node] = found
    if len(calls) < 2:
        return
    merges = {node: state for node in graph.nodes if (state := _merged(node, calls)) is not None}
    inner = {node for state in merges.values() for node in _before(state.out, merges)}
    for node, state in merges.items():
        if node in inner:
            continue
        ring = _ring(state, [calls[piece] for piece in state.pieces])
        if ring is not None and _is_known(graph, ring):
            yield ring


def _is_plain(call: AttentionCall) -> bool:
    """Whether an attention is one of all keys, of which more than the output may be used."""
    nothing_else = call.mask is None and not call.is_causal and not call.dropout_p and call.sequences is None
    return nothing_else and call.projections is None and call.refusal in (None, MORE_OUTPUTS)


def _is_known(graph: fx.Graph, ring: Ring) -> bool:
    """Whether what is done to the output needs nothing that comes behind the first attention."""
    earlier = set(itertools.takewhile(lambda node: node is not ring.pieces[0], graph.nodes))
    needed = [node for step in ring.steps for node in step.all_input_nodes if node is not step.args[0]]
    return all(node in earlier for node in needed)


def _before(node: fx.Node, merges: dict[fx.Node, _State]) -> list[fx.Node]:
    """The merge that this one goes on from."""
    before, _ = _strip(node.args[0])
    return [before] if before in merges else []


def _merged(node: fx.Node, calls: dict[fx.Node, AttentionCall]) -> _State | None:
    """What a node merges: before - sigmoid(lse - lse before) * (before - out); None if it is no merge."""
    parts = _operands(node, "sub")
    product = _operands(parts[1], "mul") if parts else None
    if parts is None or product is None:
        return None
    gate, difference = product if op_name(product[0]) == "sigmoid" else product[::-1]
    both = _operands(difference, "sub")
    scores = _operands(argument(gate, 0, "input"), "sub") if op_name(gate) == "sigmoid" else None
    if both is None or scores is None or both[0] is not parts[0]:
        return None
    before, last = _state(parts[0], calls), _state(both[1], calls)
    if before is None or last is None or len(last.pieces) != 1:
        return None
    if not _is_lse(scores[0], last, calls) or not _is_lse(scores[1], before, calls):
        return None
    return _State(node, (*before.pieces, *last.pieces), before.steps)


def _state(node: Any, calls: dict[fx.Node, AttentionCall]) -> _State | None:
    """The pieces whose output, or merged output, a node is; through views and casts."""
    root, steps = _strip(node)
    if not isinstance(root, fx.Node):
        return None
    if op_name(root) == "getitem" and root.args[0] in calls and root.args[1] == 0:
        return _State(node, (root.args[0],), tuple(reversed(steps)))
    merged = _merged(root, calls)
    casts = all(op_name(step) in ("cast", "same") for step in steps)
    return _State(root, merged.pieces, merged.steps) if merged is not None and casts else None


def _is_lse(node: Any, state: _State, calls: dict[fx.Node, AttentionCall]) -> bool:
    """Whether a node is the log-sum-exp of a state."""
    root, _ = _strip(node)
    if len(state.pieces) == 1:
        return op_name(root) == "getitem" and root.args == (state.pieces[0], 1)
    parts = _operands(root, "sub")
    inner = argument(parts[1], 0, "input") if parts and op_name(parts[1]) in ("log_sigmoid", "logsigmoid") else None
    scores = _operands(inner, "sub")
    if parts is None or scores is None or scores[0] is not parts[0]:
        return False
    last = _State(state.out, state.pieces[-1:], ())
    return _is_lse(scores[1], last, calls) and _is_lse(scores[0], _State(state.out, state.pieces[:-1], ()), calls)


def _operands(node: Any, name: str) -> tuple[Any, Any] | None:
    """Both operands of an elementwise operation of that name, without factors; None for anything else."""
    if op_name(node) != name or len(node.args) != 2 or node.kwargs:
        return None
    if not all(isinstance(x, fx.Node) for x in node.args):
        return None
    return node.args[0], node.args[1]


def _strip(node: Any) -> tuple[Any, list[fx.Node]]:
    """What a node is a view or a cast of, and the nodes between, from the last to the first. A getitem is none."""
    steps: list[fx.Node] = []
    while isinstance(node, fx.Node) and op_name(node) != "getitem":
        if not (operator_of(node).view or op_name(node) == "cast") or not isinstance(node.args[0], fx.Node):
            break
        steps.append(node)
        node = node.args[0]
    return node, steps


def _ring(state: _State, calls: Sequence[AttentionCall]) -> Ring | None:
    """The ring of merged pieces, if their keys are those of all processes, each once, and nothing else differs."""
    first = calls[0]
    chunk = _strip(_strip(calls[1].key)[0])[0]
    chunk = chunk.args[0].args[0] if op_name(chunk) == "getitem" and op_name(chunk.args[0]) == "getitem" else None
    sent = _collective(chunk)
    if sent is None or any(not _alike(first, call) for call in calls[1:]):
        return None
    key, value, group = sent
    peers = peers_of(group)
    senders = [_sender(call, first, key, value, chunk) for call in calls[1:]]
    ranks = () if peers is None else (peers.rank, *(-1 if rank is None else rank for rank in senders))
    if peers is None or sorted(ranks) != list(range(peers.size)):
        return None
    return Ring(state.pieces, tuple(calls), ranks, state.steps, state.out, group, peers)


def _alike(one: AttentionCall, other: AttentionCall) -> bool:
    """Whether two attentions differ in their keys and values alone."""
    return (one.scale, one.layouts) == (other.scale, other.layouts) and _path(one.query) == _path(other.query)


def _path(node: fx.Node) -> tuple[Any, ...]:
    """A tensor as what it is a view of, and how."""
    root, steps = _strip(node)
    return (root, *_spelled(steps))


def _sender(call: AttentionCall, own: AttentionCall, key: fx.Node, value: fx.Node, chunk: fx.Node) -> int | None:
    """The process whose keys and values an attention reads; None where it reads anything else.

    key, value: those that this process sent; chunk: what all have sent, one piece for each.
    """
    ranks = set()
    for which, (node, like, local) in enumerate(((call.key, own.key, key), (call.value, own.value, value))):
        views = _views(like, local)
        piece, received = _strip(node)
        if views is None or _spelled(received[: len(views)]) != _spelled(views):
            return None
        shapes = [step for step in received[len(views) :] if op_name(step) not in ("reshape", "view", "same")]
        if shapes or _size(node) != _size(like) or op_name(piece) != "getitem":
            return None
        rows, half, whole = piece.args[1], _size(piece), _size(piece.args[0])
        if not isinstance(rows, slice) or rows.step not in (None, 1) or op_name(piece.args[0]) != "getitem":
            return None
        wanted = (0, *half) if which == 0 else (*half, *whole)
        stop = whole if rows.stop is None else (rows.stop,)
        if (rows.start or 0, *stop) != wanted:
            return None
        if piece.args[0].args[0] is not chunk:
            return None
        ranks.add(piece.args[0].args[1])
    return ranks.pop() if len(ranks) == 1 else None


def _views(node: fx.Node, of: fx.Node) -> list[fx.Node] | None:
    """The views and casts between two nodes, from the last to the first; None where one is not of the other."""
    steps: list[fx.Node] = []
    while node is not of:
        if not (operator_of(node).view or op_name(node) == "cast") or not isinstance(node.args[0], fx.Node):
            return None
        steps.append(node)
        node = node.args[0]
    return steps


def _size(node: Any) -> tuple[Any, ...]:
    """Shape of a node's tensor; () where it has none."""
    value = tensor_value(node)
    return () if value is None else tuple(value.shape)


def _spelled(steps: Sequence[fx.Node]) -> list[Any]:
    """Operations and their settings."""
    return [(op_name(step), step.args[1:], dict(step.kwargs)) for step in steps]


def _collective(chunk: Any) -> tuple[fx.Node, fx.Node, Any] | None:
    """(keys, values, group) that each process sent to all, of the result that is cut into a piece for each."""
    if op_name(chunk) != "chunk":
        return None
    waited, _ = _strip(chunk.args[0])
    if not isinstance(waited, fx.Node) or not operator_name(waited.target).endswith("::all_gather_into_tensor"):
        return None
    sent, size, group = waited.args
    joined, _ = _strip(sent)
    pieces = argument(joined, 0, "tensors") if op_name(joined) == "cat" else ()
    if argument(chunk, 1, "chunks") != size or argument(chunk, 2, "dim", 0) != 0 or len(pieces) != 2:
        return None
    if any(op_name(piece) != "reshape" or len(_size(piece)) != 1 for piece in pieces):
        return None
    key, value = (operand(piece) for piece in pieces)
    return key, value, group


def is_needed(starts: Sequence[fx.Node], but_by: fx.Node | None = None) -> bool:
    """Whether anything that a graph gives back or writes depends on some nodes, other than through `but_by`."""
    todo, seen = [user for node in starts for user in node.users], set[fx.Node]()
    while todo:
        user = todo.pop()
        if user in seen or user is but_by:
            continue
        seen.add(user)
        if user.op == "output" or user.is_impure():
            return True
        todo += user.users
    return False
