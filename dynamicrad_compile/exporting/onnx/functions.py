"""Function bodies for the nodes of the domain `dynamicrad`, attached to a model that is finished otherwise.

Not earlier: what torch.onnx translates to a function it inlines, and then there would be no node for a plugin.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx

from .attention import AttentionOfRows, BlockSparseAttention, SecondOrderAttention
from .select import BestOfGroup, CandidateScores, KeptBlocks, SelectBlocksByOrder, SelectBlocksByThreshold

FUNCTIONS = {
    function.name: function
    for function in (
        AttentionOfRows,
        BestOfGroup,
        BlockSparseAttention,
        CandidateScores,
        KeptBlocks,
        SecondOrderAttention,
        SelectBlocksByOrder,
        SelectBlocksByThreshold,
    )
}


def attach_functions(model: onnx.ModelProto) -> None:
    """Add the bodies that the model's nodes need, at its opset."""
    opset = next(entry.version for entry in model.opset_import if entry.domain == "")
    for name in dict.fromkeys(_needed(model.graph.node)):
        function = FUNCTIONS[name].to_function_proto()
        for entry in function.opset_import:
            if entry.domain == "":
                entry.version = opset  # the operators in it mean the same in all of OPSETS
        model.functions.append(function)


def _needed(nodes: Iterator[onnx.NodeProto]) -> Iterator[str]:
    for node in nodes:
        if node.domain == "dynamicrad":
            yield node.op_type
            yield from _needed(FUNCTIONS[node.op_type].to_function_proto().node)
