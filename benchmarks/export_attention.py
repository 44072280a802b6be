"""ONNX models of one attention, for `export_table`: our node with its function body, and dense attention."""

from __future__ import annotations

import onnx
from onnx import TensorProto, helper

from dynamicrad_compile.exporting.onnx.functions import attach_functions

FLOATS = ("q", "k", "v")
OPSETS = [helper.make_opsetid("", 18), helper.make_opsetid("dynamicrad", 1)]


def _floats(names: tuple[str, ...]) -> list[onnx.ValueInfoProto]:
    return [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", "H", "S", "D"]) for name in names]


def sparse_model(head_dim: int, block: int) -> onnx.ModelProto:
    """`dynamicrad::BlockSparseAttention` with its body."""
    plan = [
        helper.make_tensor_value_info("kv_counts", TensorProto.INT32, ["P", "Q", "M"]),
        helper.make_tensor_value_info("kv_indices", TensorProto.INT32, ["P", "Q", "M", "W"]),
        helper.make_tensor_value_info("kv_mask", TensorProto.BOOL, ["N", "S"]),
        helper.make_tensor_value_info("compensate", TensorProto.FLOAT, ["N"]),
    ]
    inputs = [*_floats(FLOATS), *plan]
    names = [value.name for value in inputs]
    attributes = {"scale": head_dim**-0.5, "block_q": block, "block_kv": block}
    node = helper.make_node("BlockSparseAttention", names, ["out"], domain="dynamicrad", **attributes)
    graph = helper.make_graph([node], "attention", inputs, _floats(("out",)))
    model = helper.make_model(graph, opset_imports=OPSETS, ir_version=10)
    attach_functions(model)
    return model


def dense_model(head_dim: int) -> onnx.ModelProto:
    """softmax(q k^T / sqrt(D)) v in standard operators."""
    scale = helper.make_tensor("scale", TensorProto.FLOAT, [], [head_dim**-0.5])
    nodes = [
        helper.make_node("Mul", ["q", "scale"], ["scaled"]),
        helper.make_node("Transpose", ["k"], ["transposed"], perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["scaled", "transposed"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["weights"], axis=-1),
        helper.make_node("MatMul", ["weights", "v"], ["out"]),
    ]
    graph = helper.make_graph(nodes, "attention", _floats(FLOATS), _floats(("out",)), [scale])
    return helper.make_model(graph, opset_imports=OPSETS[:1], ir_version=10)
