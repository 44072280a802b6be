"""Process groups: which processes a collective is among."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..axes.labels import Peers
from .names import operator_name

COLLECTIVES = ("_c10d_functional::", "_c10d_functional_autograd::")


def is_collective(node: fx.Node) -> bool:
    """Whether a node sends tensors between processes; a `wait_tensor` does not."""
    name = operator_name(node.target)
    return name.startswith(COLLECTIVES) and not name.endswith("wait_tensor")


def peers_of(group: Any) -> Peers | None:
    """The processes of a group, given by its name or itself; None where it is unknown or has one process."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    from torch.distributed import distributed_c10d

    try:
        found = distributed_c10d._resolve_process_group(group) if isinstance(group, str) else group
        ranks = tuple(torch.distributed.get_process_group_ranks(found))
        rank = torch.distributed.get_rank(found)
    except (RuntimeError, ValueError, TypeError, KeyError):
        return None
    return Peers(ranks, rank) if len(ranks) > 1 and rank >= 0 else None


def groups_of(graph: fx.Graph) -> frozenset[Peers]:
    """The groups among which a graph moves rows; sums over processes, of tensor parallelism say, move none."""
    moves = ("::all_to_all_single", "::all_gather_into_tensor")
    collectives = (node for node in graph.nodes if node.op == "call_function" and is_collective(node))
    names = [node.args[-1] for node in collectives if operator_name(node.target).endswith(moves)]
    found = (peers_of(name) for name in dict.fromkeys(names) if not isinstance(name, fx.Node))
    return frozenset(peers for peers in found if peers is not None)
