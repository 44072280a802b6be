"""Matrix products by letters: matmul, bmm, baddbmm and einsum of two tensors are one thing, a contraction."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from ..graph import shape_hint, value_of
from ..operators.names import argument, op_name, operand, tensor_value
from ..operators.table import permutation
from .numbers import number
from .writes import Positions, is_mutating

HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Product:
    """out = scale * sum over `summed` of left * right + bias; a letter for each dimension."""

    node: fx.Node
    left: fx.Node
    right: fx.Node
    left_dims: str
    right_dims: str
    out_dims: str
    summed: str
    scale: float = 1.0
    bias: fx.Node | None = None

    def swapped(self) -> Product:
        """The same product with its operands exchanged."""
        return Product(
            self.node, self.right, self.left, self.right_dims, self.left_dims, self.out_dims, self.summed,
            self.scale, self.bias,
        )  # fmt: skip


def read_product(node: fx.Node) -> Product | None:
    """The contraction that a node computes over exactly one letter; None if it computes something else."""
    name = op_name(node)
    if name in ("matmul", "bmm"):
        other = "mat2" if name == "bmm" else "other"
        return _of_matrices(node, operand(node), argument(node, 1, other))
    if name == "baddbmm":
        beta, alpha = number(node.kwargs.get("beta", 1)), number(node.kwargs.get("alpha", 1))
        if len(node.args) != 3 or alpha is None or beta not in (0.0, 1.0):
            return None
        bias = node.args[0] if beta == 1.0 and number(node.args[0]) != 0.0 else None
        return _of_matrices(node, node.args[1], node.args[2], alpha, bias)
    return _of_einsum(node) if name == "einsum" else None


def _of_matrices(node: fx.Node, left: object, right: object, scale: float = 1.0, bias: object = None) -> Product | None:
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return None
    a, b = shape_hint(left), shape_hint(right)
    if a is None or b is None or min(len(a), len(b)) < 2:
        return None
    batch = "ABCDEFGH"[: max(len(a), len(b)) - 2]
    left_dims = batch[len(batch) - len(a) + 2 :] + "mk"
    right_dims = batch[len(batch) - len(b) + 2 :] + "kn"
    return Product(
        node, left, right, left_dims, right_dims, batch + "mn", "k", scale, bias if isinstance(bias, fx.Node) else None
    )


def _of_einsum(node: fx.Node) -> Product | None:
    equation, operands = argument(node, 0, "equation"), node.args[1:]
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or len(operands) != 2 or equation.count("->") != 1:
        return None
    terms, _, out = equation.replace(" ", "").partition("->")
    dims = []
    for term, tensor in zip(terms.split(","), operands, strict=True):
        shape = shape_hint(tensor) if isinstance(tensor, fx.Node) else None
        if shape is None:
            return None
        rest = len(shape) - len(term.replace("...", ""))
        dims.append(term.replace("...", "ABCDEFGH"[8 - rest :] if rest else ""))
        if len(dims[-1]) != len(shape) or len(set(dims[-1])) != len(shape):
            return None
    widest = max((d for d in dims), key=lambda d: sum(x.isupper() for x in d))
    out = out.replace("...", "".join(x for x in widest if x in "ABCDEFGH") if "..." in equation else "")
    left_dims, right_dims = dims
    summed = "".join(x for x in left_dims if x in right_dims and x not in out)
    everything = set(left_dims) | set(right_dims)
    if len(summed) != 1 or set(out) != everything - set(summed) or len(set(out)) != len(out):
        return None
    return Product(node, operands[0], operands[1], left_dims, right_dims, out, summed)


def peel(node: fx.Node, layout: str, until: fx.Node, positions: Positions) -> tuple[fx.Node, str, float, list[fx.Node]]:
    """Take off an operand what the op does itself: scaling, transposition, a cast from half precision.

    Returns the node below, its layout, the factor taken off and the nodes taken off. Nothing is taken off that was
    computed before something was written in place, up to the product `until`.
    """
    scale = 1.0
    nodes: list[fx.Node] = []
    while True:
        base = operand(node)
        value, below = tensor_value(node), tensor_value(base)
        if value is None or below is None or is_mutating(node):
            break
        name, order = op_name(node), permutation(node, value.dim())
        factor = number(node.args[1]) if name in ("mul", "div") and len(node.args) == 2 else None
        widens = name == "cast" and below.dtype in HALF and value.dtype == torch.float32
        if not (order or factor or widens or name in ("same", "clone")) or positions.write_between(node, until):
            break
        if order:
            layout = "".join(layout[order.index(d)] for d in range(len(order)))
        elif factor:
            scale *= factor if name == "mul" else 1 / factor
        nodes.insert(0, node)
        node = base
    return node, layout, scale, nodes


def computed_in(query: fx.Node, key: fx.Node, outer: Product, scores: fx.Node) -> torch.dtype:
    """The dtype of an attention of two products: autocast makes both narrower than their operands."""

    def of(node: fx.Node, product: fx.Node) -> torch.dtype:
        result = value_of(product).dtype
        return result if result in HALF else value_of(node).dtype

    parts = [of(query, scores), of(key, scores), of(outer.right, outer.node)]
    return torch.promote_types(torch.promote_types(parts[0], parts[1]), parts[2])
