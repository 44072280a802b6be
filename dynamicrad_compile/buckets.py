"""Graphs that DDP cuts into buckets: what the passes learnt of earlier buckets, and the real inputs behind fake ones.

PyTorch hands the buckets of one graph to the backend in turn, with fake tensors: see torch/_dynamo/backends/distributed
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from .frames import frame_of
from .passes import Earlier


def earlier_buckets() -> Earlier | None:
    """What is known of the values of earlier buckets; None where no graph is being cut.

    Values go by the names of the nodes of the graph of buckets: each bucket is a node of it.
    """
    frame = frame_of("run_node", "distributed.py")
    if frame is None:
        return None
    cutter, node = frame.f_locals.get("self"), frame.f_locals.get("n")
    if not isinstance(node, fx.Node) or cutter is None:
        return None
    found: Earlier = cutter.__dict__.setdefault("_dynamicrad", Earlier())
    found.inputs = [str(given) for given in node.args]
    found.outputs = {
        0: str(node),
        **{user.args[1]: str(user) for user in node.users if user.target is operator.getitem},
    }
    return found


def real_inputs(inputs: Sequence[Any]) -> Sequence[Any]:
    """Inputs with those fake tensors that stand for real ones of the caller put back.

    Where PyTorch does not tell of which tensor a fake one was made, the fake one stays.
    """
    modes = {id(x.fake_mode): x.fake_mode for x in inputs if isinstance(x, FakeTensor)}
    real: dict[int, torch.Tensor] = {}
    for mode in modes.values():
        converter = getattr(mode.fake_tensor_converter, "meta_converter", None)
        described = getattr(getattr(converter, "describer", None), "lookup_tensor", {})
        fakes = getattr(converter, "tensor_memo", {})
        for tensor, number in list(described.items()):
            fake = fakes.get(number)
            if fake is not None and not isinstance(tensor, FakeTensor):
                real[id(fake)] = tensor
    return [real.get(id(x), x) for x in inputs]
