"""Tokens that come from other processes: context parallelism exchanges them just before the attention.

Ulysses: each process holds a piece of the sequence with all heads, and an all-to-all turns it into the whole sequence
with some of the heads. Such exchanges are followed (axes/shards.py); where one is not, the attention stays dense.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from dynamicrad_compile.reporting.reason import Reason

from ..axes.labels import Label, Peers, resolve
from ..operators.names import argument, op_name, operator_name
from ..operators.process_groups import is_collective, peers_of
from ..operators.table import operator_of
from ..site import AttentionCall


def exchanged(call: AttentionCall, query: Label, key: Label) -> Reason | None:
    """Why the tokens of an attention are not known in this graph; None if they are, or come from no collective.

    query, key: labels of their sequences.
    """
    for operand, label in ((call.query, query), (call.key, key)):
        source = _collective(operand)
        if source is not None and any(axis.source.node == source.name for axis in resolve(label)):
            return Reason(
                "context_parallel",
                f"its tokens come from other processes ({source.name}): this exchange is not followed",
                "set `grid`; under context parallelism it stays dense, and right",
            )
    return None


def heads_among(call: AttentionCall) -> Peers | None:
    """The processes among which an all-to-all has dealt the heads of an attention; None where it was none."""
    source = _collective(call.query)
    if source is None or not operator_name(source.target).endswith("::all_to_all_single"):
        return None
    return peers_of(source.args[-1])


def _collective(node: Any) -> fx.Node | None:
    """The collective of which a node is a view or a copy."""
    while isinstance(node, fx.Node):
        if is_collective(node):
            return node
        if op_name(node) == "cat":  # text that is not exchanged, in front of a video that is
            pieces = argument(node, 0, "tensors", ())
            return next((found for piece in pieces if (found := _collective(piece)) is not None), None)
        if not operator_of(node).view:
            return None
        node = node.args[0] if node.args else None
    return None
