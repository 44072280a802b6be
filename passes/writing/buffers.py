"""Tensors that a rewritten graph carries along: plans, router weights, the state of a generation."""

from __future__ import annotations

import torch
from torch import fx


def buffer_node(gm: fx.GraphModule, name: str, tensor: torch.Tensor) -> fx.Node:
    """Node that yields `tensor`, registered as a buffer of the graph module; AOT autograd lifts it to a static input.

    The same tensor is registered once; a name in use gets a number.
    """
    for known, buffer in gm.named_buffers():
        if buffer is tensor and known.startswith("_dynamicrad"):
            return gm.graph.get_attr(known)
    taken = {known for known, _ in gm.named_buffers()}
    full = next(n for n in (f"_dynamicrad_{name}_{i}" for i in range(len(taken) + 1)) if n not in taken)
    gm.register_buffer(full, tensor)
    sources = getattr(gm, "_param_name_to_source", None)
    if sources is not None:  # a graph of Dynamo must say where each of its buffers comes from
        from torch._dynamo.source import ConstantSource  # Dynamo is loaded if it made this graph, not before

        sources[full] = ConstantSource(source_name=full)
    return gm.graph.get_attr(full)
