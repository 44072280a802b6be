"""nn.MultiheadAttention, which Dynamo keeps as one call with its projections inside.

    %out, %weights = multi_head_attention_forward(%x, %x, %x, embed_dim, heads, in_proj_weight, ...)

Query, key and value are [S, B, E] and not yet projected. Exported programs hold the parts instead, with
scaled_dot_product_attention among them.
"""

from __future__ import annotations

import inspect
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from dynamicrad_compile.reporting.reason import PROMPT_MASK, REBUILD_MHA, Reason

from ..operators.names import op_name, tensor_value
from ..site import AttentionCall, Projections
from .layout import BHSD, to_plain

_SIGNATURE = inspect.signature(F.multi_head_attention_forward)
_LEARNED_KEY = Reason("mha_learned_key", "it appends a learned key and value", REBUILD_MHA)
_NOT_NEUTRAL = {
    "bias_k": _LEARNED_KEY,
    "bias_v": _LEARNED_KEY,
    "add_zero_attn": Reason("mha_zero_key", "it appends a zero key and value", REBUILD_MHA),
    "use_separate_proj_weight": Reason("mha_widths", "keys and values have other widths than queries", REBUILD_MHA),
    "static_k": Reason("mha_static_keys", "its keys are given from outside", REBUILD_MHA),
    "static_v": Reason("mha_static_values", "its values are given from outside", REBUILD_MHA),
}


def read_multihead_attention(node: fx.Node) -> AttentionCall | None:
    """The arguments of a multi_head_attention_forward call; None if the node is none."""
    if node.op != "call_function" or node.target is not F.multi_head_attention_forward:
        return _fused_layer(node)
    bound = _SIGNATURE.bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    given: dict[str, Any] = dict(bound.arguments)
    query = given["query"]
    value = tensor_value(query)
    batched = value is None or value.dim() == 3
    layout = "sbd" if batched else "sd"
    refusal = next((why for name, why in _NOT_NEUTRAL.items() if given[name] not in (None, False)), None)
    if any(op_name(user) != "getitem" or (user.args[1] != 0 and user.users) for user in node.users):
        refusal = refusal or Reason(
            "mha_weights_used", "its attention weights are used (need_weights=True)", REBUILD_MHA
        )
    if given["in_proj_weight"] is None or given["out_proj_weight"] is None:
        refusal = refusal or Reason("mha_split_weights", "its projection weights are not in one piece", REBUILD_MHA)
    mask, mask_layout = given["key_padding_mask"], "bk" if batched else "k"
    if given["attn_mask"] is not None:
        if mask is not None:
            refusal = refusal or Reason("mha_two_masks", "it has a key padding mask and another", PROMPT_MASK)
        attn_value = tensor_value(given["attn_mask"])
        mask, mask_layout = given["attn_mask"], "qk" if attn_value is not None and attn_value.dim() == 2 else "bqk"
    is_bool = isinstance(mask, fx.Node) and getattr(tensor_value(mask), "dtype", None) == torch.bool
    return AttentionCall(
        query, given["key"], given["value"], mask,
        dropout_p=given["dropout_p"] if given["training"] else 0.0,
        is_causal=given["is_causal"],
        layouts=(layout,) * 4, mask_layout=mask_layout, mask_is="drop" if is_bool else "bias", output=0,
        projections=Projections(
            given["num_heads"], given["in_proj_weight"], given["in_proj_bias"],
            given["out_proj_weight"], given["out_proj_bias"],
        ),
        refusal=refusal,
    )  # fmt: skip


def _fused_layer(node: fx.Node) -> AttentionCall | None:
    """The inference fast path of nn.TransformerEncoderLayer: attention and feed-forward in one operation."""
    if node.op != "call_function" or node.target is not torch._transformer_encoder_layer_fwd:
        return None
    source = node.args[0]
    assert isinstance(source, fx.Node)
    why = Reason(
        "fused_encoder_layer",
        "it is fused with a whole encoder layer; call torch.backends.mha.set_fastpath_enabled(False) first",
        "call torch.backends.mha.set_fastpath_enabled(False) before compiling",
    )
    return AttentionCall(source, source, source, layouts=("bsd",) * 4, refusal=why)


def project_inputs(graph: fx.Graph, call: AttentionCall, nodes: tuple[fx.Node, ...]) -> list[fx.Node]:
    """Nodes of query, key and value [B, H, S, D] from the unprojected ones."""
    given = call.projections
    assert given is not None
    if all(node is nodes[0] for node in nodes):
        whole = graph.call_function(F.linear, (nodes[0], given.in_weight, given.in_bias))
        pieces = graph.call_function(torch.chunk, (whole, 3, -1))
        parts = [graph.call_function(operator.getitem, (pieces, i)) for i in range(3)]
    else:
        weights = graph.call_function(torch.chunk, (given.in_weight, 3, 0))
        biases = None if given.in_bias is None else graph.call_function(torch.chunk, (given.in_bias, 3, 0))
        parts = []
        for i, node in enumerate(nodes):
            bias = None if biases is None else graph.call_function(operator.getitem, (biases, i))
            weight = graph.call_function(operator.getitem, (weights, i))
            parts.append(graph.call_function(F.linear, (node, weight, bias)))
    layouts = [layout.replace("d", "hd") for layout in call.layouts]
    split = [graph.call_function(torch.unflatten, (part, -1, (given.heads, -1))) for part in parts]
    return [to_plain(graph, node, layout, None) for node, layout in zip(split, layouts, strict=False)]


def project_output(graph: fx.Graph, call: AttentionCall, out: fx.Node) -> fx.Node:
    """Node of the projected output, in the layout of the query, from the attention's [B, H, S, D]."""
    given = call.projections
    assert given is not None
    layout = call.layouts[3].replace("d", "hd")
    if "b" not in layout:
        out, order = graph.call_function(torch.squeeze, (out, 0)), [BHSD.replace("b", "").index(x) for x in layout]
    else:
        order = [BHSD.index(x) for x in layout]
    out = graph.call_function(torch.flatten, (graph.call_function(torch.permute, (out, order)), -2))
    return graph.call_function(F.linear, (out, given.out_weight, given.out_bias))
