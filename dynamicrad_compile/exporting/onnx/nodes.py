"""From the ops of a rewritten graph to nodes of the domain `dynamicrad` in an ONNX model.

    %pair = dynamicrad.block_sparse_attention(%q, %k, %v, %counts, %indices, scale, block_q, block_kv, mask, weight)
    %pair = attention_node(...)

torch.onnx makes of it dynamicrad::BlockSparseAttention(q, k, v, kv_counts, kv_indices, kv_mask, compensate).

second_order_attention becomes dynamicrad::SecondOrderAttention(the same, growth, shift), with the moments of its
queries in operators of ONNX before it. Mask and weight are inputs of every node: all True and 0 where the op has none,
so that a plugin has one signature.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx
from torch.onnx import ops as onnx_ops

from ...errors import ExportError
from ...kernels.attention_arguments import Attention
from ...kernels.moments import growth_and_shift, moments_of
from ...kernels.select_arguments import Selection

VERSION = 1


def attention_node(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """A node for `block_sparse_attention`, of the op's arguments; its lse is left out."""
    return _attention("BlockSparseAttention", Attention(*args, **kwargs)), None


def second_order_node(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """A node for `second_order_attention`, of the op's arguments, with the moments of its queries before it."""
    a = Attention(*args, **kwargs)
    return _attention("SecondOrderAttention", a, *growth_and_shift(a, moments_of(a))), None


def _attention(name: str, a: Attention, *more: Tensor) -> Tensor:
    compensate = torch.zeros(1, dtype=torch.float32, device=a.q.device) if a.compensate is None else a.compensate
    out: Tensor = onnx_ops.symbolic(
        f"dynamicrad::{name}",
        (a.q, a.k, a.v, a.kv_counts, a.kv_indices, _mask(a), compensate, *more),
        _attributes(a),
        dtype=a.q.dtype,
        shape=a.q.shape,
        version=VERSION,
    )
    return out


def selection_node(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """A node for `select_blocks`, of the op's arguments."""
    a = Selection(*args, **kwargs)
    name, attributes = "SelectBlocksByThreshold", {**_attributes(a), "by_error": int(a.rank == "error")}
    if a.criterion != "threshold":
        name, attributes["by_mass"] = "SelectBlocksByOrder", int(a.criterion == "mass")
    shape = (*a.q.shape[:2], *a.kv_indices.shape[2:])
    counts, indices = onnx_ops.symbolic_multi_out(
        f"dynamicrad::{name}",
        (a.q, a.k, a.kv_counts, a.kv_indices, a.kv_forced, a.kv_near, a.thresholds, _mask(a)),
        attributes,
        dtypes=(torch.int32, torch.int32),
        shapes=(shape[:3], shape),
        version=VERSION,
    )
    return counts, indices


def _mask(a: Attention | Selection) -> Tensor:
    return torch.ones(1, a.k.shape[2], dtype=torch.bool, device=a.k.device) if a.kv_mask is None else a.kv_mask


def _attributes(a: Attention | Selection) -> dict[str, float | int]:
    return {"scale": a.factor, "block_q": a.block_q, "block_kv": a.block_kv}


NODES = {
    "block_sparse_attention": attention_node,
    "second_order_attention": second_order_node,
    "select_blocks": selection_node,
}


def with_onnx_nodes(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of a rewritten module whose ops are calls of NODES.

    Raises ExportError where an op has no counterpart in ONNX.
    """
    graph = copy.deepcopy(module.graph)
    for node in graph.nodes:
        namespace, _, name = str(node.target).partition(".")
        name = name.partition(".")[0]
        if node.op != "call_function" or namespace != "dynamicrad":
            continue
        if name == "make_plan":
            raise ExportError(
                "ONNX: a plan depends on sizes that are known only when the model runs. Fix them (only the batch may "
                "be dynamic), and export one model for each resolution; or use format 'torch' or 'aoti'."
            )
        if name not in NODES:
            raise ExportError(
                f"ONNX: there is no node for dynamicrad::{name}. Set refresh_steps to None, or use format 'torch'."
            )
        node.target = NODES[name]
    return fx.GraphModule(module, graph)
