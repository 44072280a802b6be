"""How each ATen operation moves axes. One rule per family of operations; unknown operations give fresh axes.

Rules are applied by `AxisMode`, a dispatch mode that sees the primitive operations of whatever runs under it on
fake tensors: views, matrix products, in-place copies. So a rule is needed per primitive, not per spelling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ._axes import Label, Part, Source, concat, fresh, label_size, reshape, resolve, slice_label, split, unify

aten = torch.ops.aten
Labels = list[Label]


def get_labels(tensor: torch.Tensor, source: Source | None = None) -> Labels:
    """Labels of a tensor's dimensions; fresh ones at first sight."""
    labels = getattr(tensor, "_drad_labels", None)
    if labels is None or len(labels) != tensor.dim():
        node = source or Source("constant", 0, "op")
        labels = [fresh(n, Source(node.node, d, node.kind, tensor.dim())) for d, n in enumerate(tensor.shape)]
        set_labels(tensor, labels)
    return labels


def set_labels(tensor: torch.Tensor, labels: Labels) -> None:
    """Attach labels, one per dimension."""
    tensor._drad_labels = labels


class AxisMode(TorchDispatchMode):
    """Labels every tensor made under it. `node` names the graph node that is running."""

    def __init__(self) -> None:
        super().__init__()
        self.node = "input"

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        rule = RULES.get(func.overloadpacket)
        if rule is None and torch.Tag.pointwise in func.tags:
            rule = pointwise
        labels = rule(self, out, args, kwargs) if rule else None
        outs = list(out) if isinstance(out, (tuple, list)) else [out]
        given = labels if isinstance(out, (tuple, list)) else [labels]
        for i, tensor in enumerate(outs):
            if not isinstance(tensor, torch.Tensor):
                continue
            known = given[i] if given is not None and i < len(given) else None
            if known is not None and [label_size(label) for label in known] == list(tensor.shape):
                set_labels(tensor, known)
            elif not any(tensor is leaf for leaf in tree_leaves((args, kwargs))):
                get_labels(tensor, self.source())
        return out

    def source(self, dim: int = 0) -> Source:
        """Source of an axis born in the running node."""
        return Source(self.node, dim, "op")


def pointwise(mode: AxisMode, out: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels | None:
    """Broadcasting: aligned dimensions are the same axis."""
    if not isinstance(out, torch.Tensor):
        return None
    labels: Labels = [()] * out.dim()
    for tensor in tree_leaves((args, kwargs)):
        if not isinstance(tensor, torch.Tensor) or tensor.dim() > out.dim():
            continue
        offset = out.dim() - tensor.dim()
        for d, label in enumerate(get_labels(tensor)):
            if tensor.shape[d] == 1 or tensor.shape[d] != out.shape[offset + d]:
                continue
            current = labels[offset + d]
            labels[offset + d] = unify(current, label, mode.node) if current else label
    return [
        label if label_size(label) == n else fresh(n, mode.source(d))
        for d, (label, n) in enumerate(zip(labels, out.shape, strict=True))
    ]


def like_first(mode: AxisMode, out: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Output (or the first of several outputs) has the dimensions of the first argument."""
    labels = list(get_labels(args[0]))
    return [labels] if isinstance(out, (tuple, list)) else labels


def keep_sizes(mode: AxisMode, out: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Leading dimensions of equal size keep their axis (normalisation, packing of complex numbers)."""
    first = out[0] if isinstance(out, (tuple, list)) else out
    labels = get_labels(args[0])
    kept = [
        labels[d] if d < len(labels) and args[0].shape[d] == n else fresh(n, mode.source(d))
        for d, n in enumerate(first.shape)
    ]
    return [kept] if isinstance(out, (tuple, list)) else kept


def view(mode: AxisMode, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    """Row-major regrouping."""
    return reshape(get_labels(args[0]), list(out.shape), mode.source())


def view_dtype(mode: AxisMode, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    """`view` has two meanings: another shape or another dtype."""
    if isinstance(args[1], torch.dtype):
        return keep_sizes(mode, out, args, kwargs)
    return view(mode, out, args, kwargs)


def permute(mode: AxisMode, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    labels = get_labels(args[0])
    return [labels[d] for d in args[1]]


def transpose(mode: AxisMode, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    labels = list(get_labels(args[0]))
    if labels:
        labels[args[1]], labels[args[2]] = labels[args[2]], labels[args[1]]
    return labels


def t(mode: AxisMode, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    return list(reversed(get_labels(args[0])))


def unsqueeze(mode: AxisMode, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    labels = list(get_labels(args[0]))
    labels.insert(args[1] % out.dim(), ())
    return labels


def squeeze(mode: AxisMode, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    tensor, rest = args[0], args[1:]
    dims = range(tensor.dim()) if not rest else [rest[0]] if isinstance(rest[0], int) else rest[0]
    gone = {d % max(tensor.dim(), 1) for d in dims if tensor.dim() and tensor.shape[d] == 1}
    return [label for d, label in enumerate(get_labels(tensor)) if d not in gone]


def expand(mode: AxisMode, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    tensor = args[0]
    labels, offset = get_labels(tensor), out.dim() - tensor.dim()
    return [
        labels[d - offset] if d >= offset and tensor.shape[d - offset] == n else fresh(n, mode.source(d))
        for d, n in enumerate(out.shape)
    ]


def repeat(mode: AxisMode, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    """Each dimension is (copies x old)."""
    tensor = args[0]
    labels, offset = get_labels(tensor), out.dim() - tensor.dim()
    result: Labels = []
    for d, n in enumerate(out.shape):
        old = labels[d - offset] if d >= offset else ()
        copies = n // max(label_size(old), 1)
        result.append((*fresh(copies, mode.source(d)), *old))
    return result


def slice_(mode: AxisMode, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    tensor = args[0]
    dim = (args[1] if len(args) > 1 else 0) % tensor.dim()
    start = args[2] if len(args) > 2 and args[2] is not None else 0
    step = args[4] if len(args) > 4 else 1
    size = tensor.shape[dim]
    start = min(max(start + size if start < 0 else start, 0), size)
    labels = list(get_labels(tensor))
    n = out.shape[dim]
    if step == 1:
        labels[dim] = slice_label(labels[dim], start, start + n, mode.source(dim))
    else:
        labels[dim] = fresh(n, mode.source(dim))
    return labels


def select(mode: AxisMode, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    labels = list(get_labels(args[0]))
    del labels[args[1] % args[0].dim()]
    return labels


def unbind(mode: AxisMode, out: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Labels]:
    dim = args[1] if len(args) > 1 else 0
    return [select(mode, piece, (args[0], dim), {}) for piece in out]


def split_(mode: AxisMode, out: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Labels]:
    tensor = args[0]
    dim = (args[2] if len(args) > 2 else kwargs.get("dim", 0)) % tensor.dim()
    result, start = [], 0
    for piece in out:
        labels = list(get_labels(tensor))
        labels[dim] = slice_label(labels[dim], start, start + piece.shape[dim], mode.source(dim))
        result.append(labels)
        start += piece.shape[dim]
    return result


def cat(mode: AxisMode, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.dim()
    tensors = [x for x in args[0] if x.dim() == out.dim()]
    labels = list(get_labels(tensors[0]))
    for tensor in tensors[1:]:
        for d, label in enumerate(get_labels(tensor)):
            if d != dim:
                labels[d] = unify(labels[d], label, mode.node)
    pieces = [Part(get_labels(x)[dim], 0, x.shape[dim]) for x in tensors]
    labels[dim] = concat([p for piece in pieces for p in _flat(piece)], mode.source(dim))
    return labels


def _flat(piece: Part) -> Sequence[Part]:
    leaves = resolve(piece.label)
    return leaves[0].parts if len(leaves) == 1 and leaves[0].parts else (piece,)


def stack(mode: AxisMode, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.dim()
    labels = list(get_labels(args[0][0]))
    for tensor in args[0][1:]:
        for d, label in enumerate(get_labels(tensor)):
            labels[d] = unify(labels[d], label, mode.node)
    labels.insert(dim, fresh(out.shape[dim], mode.source(dim)))
    return labels


def pad(mode: AxisMode, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    tensor, amounts = args[0], args[1]
    labels = list(get_labels(tensor))
    for k in range(len(amounts) // 2):
        d = tensor.dim() - 1 - k
        before, after = amounts[2 * k], amounts[2 * k + 1]
        if min(before, after) < 0:
            labels[d] = fresh(out.shape[d], mode.source(d))
        elif before or after:
            pieces = [
                Part(fresh(before, mode.source(d)), 0, before),
                *_flat(Part(labels[d], 0, tensor.shape[d])),
                Part(fresh(after, mode.source(d)), 0, after),
            ]
            labels[d] = concat(pieces, mode.source(d))
    return labels


def write(mode: AxisMode, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    """In-place copy: the destination's dimensions are those of what is written."""
    labels = get_labels(args[0])
    if isinstance(args[1], torch.Tensor):
        pointwise(mode, args[0], args[:2], {})
    return list(labels)


def reduce(mode: AxisMode, out: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Reductions drop or flatten dimensions to 1."""
    first = out[0] if isinstance(out, (tuple, list)) else out
    tensor = args[0]
    dims = args[1] if len(args) > 1 else kwargs.get("dim")
    dims = range(tensor.dim()) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    gone = {d % max(tensor.dim(), 1) for d in dims}
    labels = get_labels(tensor)
    kept = [() if d in gone else label for d, label in enumerate(labels)]
    if first.dim() != tensor.dim():
        kept = [label for d, label in enumerate(labels) if d not in gone]
    return [kept, kept] if isinstance(out, (tuple, list)) else kept


def mm(mode: AxisMode, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    return [get_labels(args[0])[0], get_labels(args[1])[1]]


def addmm(mode: AxisMode, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    return mm(mode, out, args[1:], kwargs)


def bmm(mode: AxisMode, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    a, b = get_labels(args[0]), get_labels(args[1])
    return [unify(a[0], b[0], mode.node), a[1], b[2]]


def baddbmm(mode: AxisMode, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    return bmm(mode, out, args[1:], kwargs)


def linear(mode: AxisMode, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    return [*get_labels(args[0])[:-1], get_labels(args[1])[0]]


def embedding(mode: AxisMode, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    return [*get_labels(args[1]), get_labels(args[0])[1]]


def index_select(mode: AxisMode, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    labels = list(get_labels(args[0]))
    dim = args[1] % args[0].dim()
    labels[dim] = get_labels(args[2])[0] if args[2].dim() else ()
    return labels


def index(mode: AxisMode, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels | None:
    """Gather along one dimension by an integer tensor; anything else is not followed."""
    tensor, indices = args[0], args[1]
    used = [d for d, i in enumerate(indices) if i is not None]
    if len(used) != 1 or indices[used[0]].dtype in (torch.bool, torch.uint8):
        return None
    labels = list(get_labels(tensor))
    labels[used[0] : used[0] + 1] = get_labels(indices[used[0]])
    return labels


def convolution(mode: AxisMode, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    """A patch embedding (kernel = stride) keeps the coarse half of an axis; a 'same' convolution all of it."""
    tensor, weight, _, stride, padding, dilation, transposed = args[:7]
    labels = get_labels(tensor)
    result: Labels = [labels[0], fresh(out.shape[1], mode.source(1))]
    for d in range(2, out.dim()):
        k = d - 2
        step, n, m = stride[k % len(stride)], tensor.shape[d], out.shape[d]
        kernel = weight.shape[d]
        label: Label | None = None
        if not transposed and step == 1 and n == m:
            label = labels[d]
        elif not transposed and kernel == step and n == m * step and not any(padding) and set(dilation) <= {1}:
            leaves = resolve(labels[d])
            halves = split(leaves[-1], leaves[-1].size // step) if leaves and leaves[-1].size % step == 0 else None
            label = (*leaves[:-1], *halves[0]) if halves else None
        result.append(label if label is not None else fresh(m, mode.source(d)))
    return result


def attention(mode: AxisMode, out: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """A fused attention kernel: positions of the query, features of the value."""
    query, value = get_labels(args[0]), get_labels(args[2])
    labels = [*query[:-1], value[-1]]
    return [labels] if isinstance(out, (tuple, list)) else labels


def _table() -> dict[Any, Callable[..., Any]]:
    groups: list[tuple[Callable[..., Any], str]] = [
        (like_first, "clone alias detach lift_fresh lift_fresh_copy lift contiguous _to_copy _conj "
         "empty_like zeros_like ones_like full_like rand_like randn_like fill_ zero_ softmax _softmax "
         "_log_softmax cumsum native_dropout _conj_physical resolve_conj resolve_neg triu tril"),
        (keep_sizes, "view_as_complex view_as_real native_layer_norm native_group_norm _fused_rms_norm rms_norm"),
        (pointwise, "polar complex where silu gelu mish"),
        (view, "_unsafe_view reshape _reshape_copy _reshape_alias"),
        (view_dtype, "view"),
        (permute, "permute"),
        (transpose, "transpose"),
        (t, "t"),
        (unsqueeze, "unsqueeze"),
        (squeeze, "squeeze"),
        (expand, "expand"),
        (repeat, "repeat"),
        (slice_, "slice"),
        (select, "select"),
        (unbind, "unbind"),
        (split_, "split split_with_sizes unsafe_split unsafe_split_with_sizes"),
        (cat, "cat concat"),
        (stack, "stack"),
        (pad, "constant_pad_nd"),
        (write, "copy_"),
        (reduce, "sum mean amax amin any all var std max min prod logsumexp argmax argmin linalg_vector_norm norm"),
        (mm, "mm"),
        (addmm, "addmm"),
        (bmm, "bmm"),
        (baddbmm, "baddbmm"),
        (linear, "linear"),
        (embedding, "embedding"),
        (index_select, "index_select"),
        (index, "index"),
        (convolution, "convolution _convolution"),
        (attention, "scaled_dot_product_attention _scaled_dot_product_flash_attention_for_cpu "
         "_scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention "
         "_scaled_dot_product_cudnn_attention _scaled_dot_product_attention_math"),
    ]  # fmt: skip
    return {getattr(aten, name): rule for rule, names in groups for name in names.split() if hasattr(aten, name)}


RULES = _table()
