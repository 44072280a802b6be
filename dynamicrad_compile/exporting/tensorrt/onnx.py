"""ONNX models for TensorRT: with the attention as a plugin, or in standard operators.

attention_node       dynamicrad::BlockSparseAttention..., which the plugins of `plugin` take
second_order_node    two of these, for kept blocks and for means of dropped ones, and covariances in standard operators
standard_attention   a softmax over all keys under the block mask: correct, and not faster than dense attention.
                     TensorRT does not read the Scan by which model.onnx of format "onnx" saves that work.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.onnx import ops as onnx_ops

from ...errors import ExportError
from ...kernels.attention_arguments import Attention
from ...kernels.blocks import valid_counts
from ...kernels.moments import growth_and_shift, moments_of
from ..job import Job
from ..onnx.model import _quiet as quiet
from .graph import block_means, kept_flags, lower, plugin_inputs, with_second_order
from .names import NAMESPACE, plugin_name

HIDDEN = -1.0e30


def attention_node(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """block_sparse_attention as a node for a plugin, with mean keys and values computed in front of it."""
    a = Attention(*args, **kwargs)
    return _node(*plugin_inputs(a), a.factor, a.block_q, a.block_kv)


def second_order_node(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    """second_order_attention as two such nodes, with covariances between them."""
    a = Attention(*args, **kwargs)
    return with_second_order(a, *attention_node(*a._replace(compensate=None)), _node)


def _node(*arguments: Any) -> tuple[Tensor, Tensor]:
    """A node of the arguments of `plugin_attention`."""
    *tensors, scale, block_q, block_kv = arguments
    q = tensors[0]
    out, lse = onnx_ops.symbolic_multi_out(
        f"{NAMESPACE}::{plugin_name(tensors[5] is not None, tensors[6] is not None)}",
        [tensor for tensor in tensors if tensor is not None],
        {
            "scale": [float(scale)],
            "block_q": [block_q],
            "block_kv": [block_kv],
            "plugin_namespace": NAMESPACE,  # how TensorRT's parser finds the plugin, and that it is compiled ahead
            "plugin_version": "1",
            "aot": 1,
        },
        dtypes=(q.dtype, torch.float32),
        shapes=(q.shape, q.shape[:3]),
        version=1,
    )
    return out, lse


def standard_attention(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """block_sparse_attention in operations that every runtime has; memory is that of all scores."""
    return _standard(Attention(*args, **kwargs)), None


def standard_second_order(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """second_order_attention in such operations."""
    a = Attention(*args, **kwargs)
    kept = kept_flags(a.kv_counts, a.kv_indices, a.num_kv_blocks) > 0
    growth, shift = growth_and_shift(a, moments_of(a, kept))
    return _standard(a, growth.log(), shift), None


def _standard(a: Attention, log_growth: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
    """log_growth [B, H, Sq, 1] is added to the scores of means, shift [B, H, Sq, D] to their values."""
    (_, heads, q_len, _), (_, kv_heads, kv_len, _) = a.q.shape, a.k.shape
    plans, plan_heads, m_q = a.kv_counts.shape

    def per_query(flags: Tensor) -> Tensor:  # [P, H', Mq, N] -> [P, H', Sq, N]
        wide = flags.unsqueeze(3).expand(-1, -1, -1, a.block_q, -1)
        return wide.reshape(plans, plan_heads, m_q * a.block_q, -1).narrow(2, 0, q_len)

    kept = kept_flags(a.kv_counts, a.kv_indices, a.num_kv_blocks) > 0
    seen = per_query(kept.unsqueeze(-1).expand(-1, -1, -1, -1, a.block_kv).flatten(3)).narrow(-1, 0, kv_len)
    if a.kv_mask is not None:
        seen = seen & a.kv_mask.unsqueeze(1).unsqueeze(1)
    queries, keys, values = a.q.float() * a.factor, a.k.float(), a.v.float()
    bias = torch.where(seen, 0.0, HIDDEN)
    if a.compensate is not None:
        n_valid = valid_counts(kv_len, a.block_kv, a.kv_mask, a.k.device)
        keys = torch.cat((keys, block_means(a.k, a.block_kv, n_valid, a.kv_mask).float()), 2)
        values = torch.cat((values, block_means(a.v, a.block_kv, n_valid, a.kv_mask).float()), 2)
        share = n_valid.float() * a.compensate.unsqueeze(-1)  # [B or 1, Mk]
        weight = torch.where(share > 0, share, 1.0).log()
        shown = per_query(~kept) & (share > 0).unsqueeze(1).unsqueeze(1)
        extra = torch.where(shown, weight.unsqueeze(1).unsqueeze(1), HIDDEN)
        rows, groups = torch.broadcast_shapes(extra.shape[:1], bias.shape[:1])[0], plan_heads
        bias = torch.cat((bias.expand(rows, groups, -1, -1), extra.expand(rows, groups, -1, -1)), -1)
    if kv_heads != heads:
        keys, values = (x.unsqueeze(2).expand(-1, -1, heads // kv_heads, -1, -1).flatten(1, 2) for x in (keys, values))
    scores = queries @ keys.transpose(-1, -2) + bias
    if log_growth is not None:
        parts = scores.narrow(-1, 0, kv_len), scores.narrow(-1, kv_len, a.num_kv_blocks) + log_growth
        scores = torch.cat(parts, -1)
    weights = torch.softmax(scores, -1) * (bias > HIDDEN / 2)  # a query without a key gets 0
    out = weights @ values
    if shift is not None:
        out = out + weights.narrow(-1, kv_len, a.num_kv_blocks).sum(-1, keepdim=True) * shift
    return out.to(a.q.dtype)


FORMS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "plugin": (attention_node, second_order_node),
    "trtexec": (standard_attention, standard_second_order),
}
"""What stands for block_sparse_attention and for second_order_attention."""


def write_onnx(job: Job, via: str, opset: int) -> str:
    """Write STEM.onnx, and its weights as STEM.onnx.data; returns the name of the file.

    via: "plugin", or "trtexec" for standard operators. Raises ExportError where ONNX lacks an operation.
    """
    import onnx
    import onnx_ir

    module = fx.GraphModule(job.module, copy.deepcopy(job.module.graph))
    lower(module, *FORMS[via])
    for node in module.graph.nodes:
        if node.op == "call_function" and str(node.target).startswith(("dynamicrad.", "dynamicrad::")):
            raise ExportError(
                f"TensorRT from ONNX: {node.target} is no operation of ONNX, nor of a plugin. Use mode='static_ratio' "
                "and fixed sizes (the batch may be open), or via='torch', which runs it in PyTorch."
            )
    job.say(f"translating to ONNX, opset {opset}")
    program = job.program(module)
    with quiet():
        try:
            exported = torch.onnx.export(program, dynamo=True, opset_version=opset, verbose=False)
        except torch.onnx.errors.OnnxExporterError as error:
            raise ExportError(f"torch.onnx can't translate the model at opset {opset}: {error}") from error
    assert exported is not None
    file = f"{job.stem}.onnx"
    onnx_ir.save(exported.model, job.folder / file, external_data=f"{file}.data")
    _without_notes(onnx, job.folder / file)
    return file


def _without_notes(onnx: Any, path: Path) -> None:
    """Drop the exporter's notes, which hold paths of this machine."""
    model = onnx.load(path, load_external_data=False)
    for holder in (model, model.graph, *model.graph.node, *model.graph.initializer, *model.graph.value_info):
        del holder.metadata_props[:]
    onnx.save(model, path)
    onnx.checker.check_model(str(path))
