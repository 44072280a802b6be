"""Put one attention over all keys beside each ring, which context parallelism unrolls into one for each process.

Before:  %out = merge(attention(%q, %k, %v), attention(%q, keys and values of process 1), ...)
After:   the same, and scaled_dot_product_attention(%q, all keys, all values) beside it, which may be replaced

See reading/ring and writing/ring. The pieces are sites only where they are no ring.
"""

from __future__ import annotations

from torch import fx

from .context import PassContext
from .find_attention import read_attention
from .operators.process_groups import is_collective
from .reading.ring import is_needed, rings
from .reading.writes import Positions
from .writing.ring import write_beside


def gather_ring(gm: fx.GraphModule, context: PassContext) -> int:
    """Fill `context.rings`; returns how many were found."""
    if not any(node.op == "call_function" and is_collective(node) for node in gm.graph.nodes):
        return 0
    positions = Positions(gm.graph)
    for ring in list(rings(gm.graph, lambda node: read_attention(gm, node, positions))):
        if is_needed([ring.merged]) and not is_needed(ring.pieces, but_by=ring.merged):  # its log-sum-exp is not
            context.rings.append(write_beside(gm.graph, ring))
    return len(context.rings)
