"""Tensors that a rewritten graph needs besides its inputs.

Plans and router weights are buffers of the graph. What is remembered from call to call is handed to it as further
inputs: a graph serves many models and requests (dynamicrad_compile/runtime/state.py). Only an exported program, which
serves one, carries it as a buffer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from dynamicrad_compile.runtime.pool import Slot

from ..context import PassContext
from ..graph import value_of


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
    if sources is not None:
        sources[full] = _source(full)
    return gm.graph.get_attr(full)


def state_node(gm: fx.GraphModule, context: PassContext, slot: Slot) -> fx.Node:
    """Node that yields a tensor which is kept outside the graph; its name gets a number if it is in use."""
    taken = {known.name for known in context.slots}
    name = next(n for n in (slot.name, *(f"{slot.name}_{i}" for i in range(1, len(taken) + 1))) if n not in taken)
    example = slot.make()
    if context.is_final:
        return buffer_node(gm, name, example)
    context.slots.append(replace(slot, name=name))
    graph, inputs = gm.graph, gm.graph.find_nodes(op="placeholder")
    with graph.inserting_after(inputs[-1]) if inputs else graph.inserting_before(next(iter(graph.nodes))):
        node = graph.placeholder(f"dynamicrad_{name}")
    mode = next((value.fake_mode for n in inputs if isinstance(value := value_of(n), FakeTensor)), None)
    node.meta["example_value"] = example if mode is None else mode.from_tensor(example, static_shapes=True)
    node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}  # its address stays: CUDA graphs need no copy
    if hasattr(gm, "_param_name_to_source"):
        node._dynamo_source = _source(node.name)
    return node


def _source(name: str) -> Any:
    """What Dynamo wants to know of each input of its graphs."""
    from torch._dynamo.source import ConstantSource  # Dynamo is loaded if it made this graph, not before

    return ConstantSource(source_name=name)
