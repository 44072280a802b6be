"""Recognise attention written out as two matrix products with a softmax between them.

    scores  = q k^T, scaled before or after, with a mask added or filled in, perhaps in float32
    weights = softmax(scores) over the keys, perhaps cast back, perhaps with a dropout that does nothing
    out     = weights v

The search starts at the last product and goes back one step at a time. A step that is not listed here (a norm, a
gate, a learned temperature) ends it: then it is no attention that this package knows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import fx

from dynamicrad_compile.reporting.reason import CALL_SDPA, Reason

from ..graph import shape_hint
from ..operators.names import argument, op_name, operand, tensor_value
from ..operators.table import permutation
from ..site import AttentionCall
from .hiding import HIDDEN
from .layout import layout_of_rank
from .numbers import number
from .products import Product, computed_in, peel, read_product
from .writes import Positions

ONE_MASK = "put its masks together into one bool mask before the scores are masked"
SCALE_FIRST = "scale queries or scores before the mask is added"
FILL_IN = "fill in float('-inf') where keys are masked"


def read_softmax_attention(node: fx.Node, positions: Positions) -> AttentionCall | None:
    """The attention whose last product is `node`; None if there is none."""
    outer = read_product(node)
    if outer is None or outer.bias is not None or outer.scale != 1.0:
        return None
    for product in (outer, outer.swapped()):
        weights = _follow(product.left, node)
        if weights is not None and weights.keys:
            return _attention(product, weights, positions)
    return None


@dataclass(frozen=True)
class _Steps:
    """What lies between the product q k^T and a node after it.

    dims      dimensions of the node, by the letters of the product; "?" where a reshape joined or split some
    keys      letter over which the softmax went; empty before it
    """

    product: Product
    dims: str
    nodes: tuple[fx.Node, ...] = ()
    unsplit: tuple[tuple[int, ...], str] | None = None  # shape and dims before the first "?"
    scale: float = 1.0
    mask: fx.Node | None = None
    mask_is: str = "keep"
    mask_dims: str = ""
    keys: str = ""
    dropout_p: float = 0.0
    refusal: Reason | None = None

    def refuse(self, why: Reason) -> _Steps:
        return replace(self, refusal=self.refusal or why)

    def masked(self, mask: fx.Node, mask_is: str) -> _Steps:
        if self.mask is not None:
            return self.refuse(Reason("several_masks", "it has more than one mask", ONE_MASK))
        if "?" in self.dims:
            text = f"its mask is applied to reshaped scores ({mask.name})"
            return self.refuse(Reason("mask_on_reshaped_scores", text, CALL_SDPA))
        return replace(self, mask=mask, mask_is=mask_is, mask_dims=self.dims)


def _follow(node: object, user: fx.Node, depth: int = 32) -> _Steps | None:
    """Steps from the scores to `node`; None if it does not come from scores in a known way."""
    if not isinstance(node, fx.Node) or depth == 0:
        return None
    product = read_product(node)
    if product is not None:
        found: _Steps | None = _Steps(product, product.out_dims, scale=product.scale)
        if found is not None and product.bias is not None:
            found = found.masked(product.bias, "bias")
    else:
        step = _STEPS.get(op_name(node))
        found = step(node, lambda x: _follow(x, node, depth - 1)) if step is not None else None
    if found is None:
        return None
    checks = [u for u in node.users if op_name(u) == "_assert_tensor_metadata"]
    others = [u.name for u in node.users if u is not user and u not in checks]
    if others:
        text = f"its {'probabilities' if found.keys else 'scores'} are used elsewhere too ({others[0]})"
        found = found.refuse(Reason("scores_used_elsewhere", text, CALL_SDPA))
    return replace(found, nodes=(*found.nodes, node, *checks))


_Inner = Callable[[object], "_Steps | None"]


def _same(node: fx.Node, inner: _Inner) -> _Steps | None:
    value = tensor_value(node)
    return inner(operand(node)) if value is not None and value.is_floating_point() else None


def _scale(node: fx.Node, inner: _Inner) -> _Steps | None:
    if len(node.args) != 2 or node.kwargs:
        return None
    scores, other = node.args
    if op_name(node) == "mul" and number(scores) is not None:
        scores, other = other, scores
    factor = number(other)
    found = inner(scores) if factor else None
    if found is None or not factor or found.keys:
        return None
    if found.mask is not None and factor != 1:
        found = found.refuse(Reason("scaled_after_mask", "it is scaled after its mask was added", SCALE_FIRST))
    return replace(found, scale=found.scale * factor if op_name(node) == "mul" else found.scale / factor)


def _add(node: fx.Node, inner: _Inner) -> _Steps | None:
    """A number changes no softmax; a tensor is a mask or a bias."""
    if len(node.args) != 2 or node.kwargs:
        return None
    a, b = node.args
    for scores, term in ((a, b), (b, a)):
        found = inner(scores)
        if found is None or found.keys or _shape(node) != _shape(scores):
            continue
        if number(term) is not None:
            return found
        if tensor_value(term) is not None and op_name(node) == "add":
            return found.masked(term, "bias")
    return None


def _fill(node: fx.Node, inner: _Inner) -> _Steps | None:
    """masked_fill(scores, mask, low), where(mask, scores, low), where(mask, low, scores)."""
    if op_name(node) == "masked_fill":
        scores, mask, low, means = operand(node), argument(node, 1, "mask"), argument(node, 2, "value"), "drop"
    else:
        mask, scores, low = argument(node, 0, "condition"), argument(node, 1, "self"), argument(node, 2, "other")
        means = "keep"
        if number(scores) is not None:
            scores, low, means = low, scores, "drop"
    found, level = inner(scores), number(low)
    if found is None or found.keys or not isinstance(mask, fx.Node) or _shape(node) != _shape(scores):
        return None
    if level is None or level > HIDDEN:
        text = f"its mask fills in {'a tensor' if level is None else level} instead of -inf"
        return found.refuse(Reason("mask_fills_in", text, FILL_IN))
    return found.masked(mask, means)


def _move(node: fx.Node, inner: _Inner) -> _Steps | None:
    found = inner(operand(node))
    order = permutation(node, len(found.dims)) if found is not None else None
    if found is None or order is None or "?" in found.dims:
        return None
    return replace(found, dims="".join(found.dims[d] for d in order))


def _regroup(node: fx.Node, inner: _Inner) -> _Steps | None:
    """Batch and heads joined or split; the last two dimensions must stay."""
    found, shape, before = inner(operand(node)), _shape(node), _shape(operand(node))
    if found is None or shape is None or before is None or shape[-2:] != before[-2:]:
        return None
    if shape == before:
        return found
    unsplit = found.unsplit or (before, found.dims)
    if shape == unsplit[0]:
        return replace(found, dims=unsplit[1], unsplit=None)
    return replace(found, dims="?" * (len(shape) - 2) + found.dims[-2:], unsplit=unsplit)


def _softmax(node: fx.Node, inner: _Inner) -> _Steps | None:
    found, dim = inner(operand(node)), argument(node, 1, "dim")
    if found is None or found.keys or not isinstance(dim, int) or found.dims[dim] == "?":
        return None
    return replace(found, keys=found.dims[dim])


def _dropout(node: fx.Node, inner: _Inner) -> _Steps | None:
    found, p = inner(operand(node)), number(argument(node, 1, "p", 0.5))
    if found is None or not found.keys or p is None:
        return None
    training = argument(node, 2, "training", node.kwargs.get("train", True))
    return found if training is False else replace(found, dropout_p=max(p, found.dropout_p))


def _shape(node: object) -> tuple[int, ...] | None:
    return shape_hint(node) if isinstance(node, fx.Node) else None


_STEPS: dict[str, Callable[[fx.Node, _Inner], _Steps | None]] = {
    **dict.fromkeys(("cast", "same", "clone"), _same),
    **dict.fromkeys(("mul", "div"), _scale),
    **dict.fromkeys(("add", "sub"), _add),
    **dict.fromkeys(("masked_fill", "where"), _fill),
    **dict.fromkeys(("transpose", "permute", "mT"), _move),
    **dict.fromkeys(("view", "reshape", "expand", "unsqueeze", "squeeze"), _regroup),
    "softmax": _softmax,
    "dropout": _dropout,
}


def _attention(outer: Product, steps: _Steps, positions: Positions) -> AttentionCall | None:
    """Put both products together, if their letters do."""
    inner = steps.product if steps.keys in steps.product.right_dims else steps.product.swapped()
    names = _names(inner, steps.keys)
    if names is None:
        return None
    refusal = steps.refusal
    if "?" in steps.dims:  # heads folded into the batch between the products
        rank = len(outer.right_dims)
        value_layout = out_layout = layout_of_rank(rank)
        text = "its scores are reshaped between the two products"
        refusal = refusal or Reason("scores_reshaped", text, CALL_SDPA)
    else:
        seen = {letter: names[x] for letter, x in zip(outer.left_dims, steps.dims, strict=True)}
        features = [x for x in outer.right_dims if x not in outer.left_dims]
        kept = {*outer.out_dims, outer.summed}
        if seen.get(outer.summed) != "k" or len(features) != 1 or not kept.issuperset(outer.left_dims):
            return None
        seen[features[0]] = "d"
        value_layout = "".join(seen[x] for x in outer.right_dims).replace("k", "s")
        out_layout = "".join(seen[x] for x in outer.out_dims).replace("q", "s")
    query_layout = "".join(names[x] for x in inner.left_dims).replace("q", "s")
    key_layout = "".join(names[x] for x in inner.right_dims).replace("k", "s")
    mask = steps.mask if steps.mask_is != "bias" else None  # a bias is looked at more closely later
    write = positions.write_between(inner.node, outer.node, steps.nodes, mask)
    if write is not None:
        text = f"{write.name} writes in place while it is computed"
        refusal = refusal or Reason("write_while_computed", text, CALL_SDPA)
    query, query_layout, factor, q_nodes = peel(inner.left, query_layout, inner.node, positions)
    key, key_layout, other, k_nodes = peel(inner.right, key_layout, inner.node, positions)
    return AttentionCall(
        query, key, outer.right, steps.mask,
        dropout_p=steps.dropout_p, scale=steps.scale * factor * other,
        layouts=(query_layout, key_layout, value_layout, out_layout),
        mask_layout="".join(names[x] for x in steps.mask_dims) or "bhqk", mask_is=steps.mask_is,
        dtype=computed_in(query, key, outer, inner.node), inner=(*q_nodes, *k_nodes, *steps.nodes), refusal=refusal,
    )  # fmt: skip


def _names(product: Product, keys: str) -> dict[str, str] | None:
    """Letters of the product q k^T by meaning: b, h, q, k, d; None if it is no such product.

    Of the letters that only q has, the last one in the result is its tokens; others are heads that share a key.
    """
    left, right, out = product.left_dims, product.right_dims, product.out_dims
    queries = [x for x in out if x in left and x not in right]
    batch = [x for x in out if x != keys and x not in queries[-1:]]
    if min(len(left), len(right)) < 3 or keys in left or not queries or not set(batch) <= set(left):
        return None
    letters = "b" if len(batch) == 1 else "b" * (len(batch) - 1) + "h"
    return {keys: "k", queries[-1]: "q", product.summed: "d", **dict(zip(batch, letters, strict=True))}
