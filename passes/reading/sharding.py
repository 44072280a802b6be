"""Tokens that come from other processes: context parallelism exchanges them just before the attention.

Ulysses: each process holds a piece of the sequence with all heads, and an all-to-all turns it into the whole sequence
with some of the heads. What the other processes put in is in no graph, so such an attention stays dense.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from dynamicrad_compile.reporting.reason import Reason

from ..operators.names import operator_name
from ..operators.table import operator_of
from ..site import AttentionCall

_NAMESPACES = ("_c10d_functional::", "_c10d_functional_autograd::")


def exchanged(call: AttentionCall) -> Reason | None:
    """Why the tokens of an attention are not known in this graph; None if they don't come from a collective."""
    for operand in (call.query, call.key):
        source = _collective(operand)
        if source is not None:
            return Reason(
                "context_parallel",
                f"its tokens come from other processes ({source.name}): context parallel shards are not followed",
                "nothing to set yet: under context parallelism it stays dense, and right",
            )
    return None


def _collective(node: Any) -> fx.Node | None:
    """The collective of which a node is a view or a copy."""
    while isinstance(node, fx.Node):
        operator = operator_name(node.target)
        if operator.startswith(_NAMESPACES) and not operator.endswith("wait_tensor"):
            return node
        if not operator.startswith(_NAMESPACES) and not operator_of(node).view:
            return None
        node = node.args[0] if node.args else None
    return None
