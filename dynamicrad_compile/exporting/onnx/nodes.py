"""From the ops of a rewritten graph to nodes of the domain `dynamicrad` in an ONNX model.

    %pair = dynamicrad.block_sparse_attention(%q, %k, %v, %counts, %indices, scale, block_q, block_kv, mask, weight)
    %pair = attention_node(...)

torch.onnx makes of it dynamicrad::BlockSparseAttention(q, k, v, kv_counts, kv_indices, kv_mask, compensate).

Mask and weight are inputs of every node: all True and 0 where the op has none, so that a plugin has one signature.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, fx
from torch.onnx import ops as onnx_ops

from ...errors import ExportError

VERSION = 1


def attention_node(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_counts: Tensor,
    kv_indices: Tensor,
    scale: float | None,
    block_q: int,
    block_kv: int,
    kv_mask: Tensor | None = None,
    compensate: Tensor | None = None,
) -> tuple[Tensor, None]:
    """A node for `block_sparse_attention`; its lse is left out."""
    if compensate is None:
        compensate = torch.zeros(1, dtype=torch.float32, device=q.device)
    out = onnx_ops.symbolic(
        "dynamicrad::BlockSparseAttention",
        (q, k, v, kv_counts, kv_indices, _mask(k, kv_mask), compensate),
        {"scale": _scale(q, scale), "block_q": block_q, "block_kv": block_kv},
        dtype=q.dtype,
        shape=q.shape,
        version=VERSION,
    )
    return out, None


def selection_node(
    q: Tensor,
    k: Tensor,
    kv_counts: Tensor,
    kv_indices: Tensor,
    kv_forced: Tensor,
    kv_near: Tensor,
    thresholds: Tensor,
    scale: float | None,
    block_q: int,
    block_kv: int,
    criterion: str,
    kv_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A node for `select_blocks`."""
    attributes = {"scale": _scale(q, scale), "block_q": block_q, "block_kv": block_kv}
    name = "SelectBlocksByThreshold"
    if criterion != "threshold":
        name, attributes["by_mass"] = "SelectBlocksByOrder", int(criterion == "mass")
    shape = (*q.shape[:2], *kv_indices.shape[2:])
    counts, indices = onnx_ops.symbolic_multi_out(
        f"dynamicrad::{name}",
        (q, k, kv_counts, kv_indices, kv_forced, kv_near, thresholds, _mask(k, kv_mask)),
        attributes,
        dtypes=(torch.int32, torch.int32),
        shapes=(shape[:3], shape),
        version=VERSION,
    )
    return counts, indices


def _mask(k: Tensor, kv_mask: Tensor | None) -> Tensor:
    return torch.ones(1, k.shape[2], dtype=torch.bool, device=k.device) if kv_mask is None else kv_mask


def _scale(q: Tensor, scale: float | None) -> float:
    return float(q.shape[-1]) ** -0.5 if scale is None else scale


NODES = {
    "block_sparse_attention": attention_node,
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
