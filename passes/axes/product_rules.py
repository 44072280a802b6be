"""How axes move through reductions, products, convolutions, indexing and attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .labels import Label, fresh, resolve, slice_label, split, unify
from .streams import get_stream
from .tensor_labels import Labels, get_labels, get_range
from .view_rules import pointwise

Mode = Any  # _axis_rules.AxisMode


def reduce(mode: Mode, out: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Reductions drop or flatten dimensions to 1."""
    first = out[0] if isinstance(out, (tuple, list)) else out
    tensor = args[0]
    dims = args[1] if len(args) > 1 else kwargs.get("dim")
    if isinstance(dims, torch.Tensor):  # max and min of two tensors
        return pointwise(mode, out, args, kwargs)
    dims = None if isinstance(dims, bool) else dims
    return _reduced(first, tensor, dims, isinstance(out, (tuple, list)))


def norm(mode: Mode, out: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Norms have their order before the dimensions."""
    return _reduced(out, args[0], args[2] if len(args) > 2 else kwargs.get("dim"), False)


def _reduced(first: torch.Tensor, tensor: torch.Tensor, dims: Any, several: bool) -> Any:
    dims = range(tensor.dim()) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    gone = {d % max(tensor.dim(), 1) for d in dims}
    labels = get_labels(tensor)
    kept = [() if d in gone else label for d, label in enumerate(labels)]
    if first.dim() != tensor.dim():
        kept = [label for d, label in enumerate(labels) if d not in gone]
    return [kept, kept] if several else kept


def mm(mode: Mode, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    return [get_labels(args[0])[0], _columns(mode, out, args[1])]


def _columns(mode: Mode, out: torch.Tensor, right: torch.Tensor) -> Label:
    """Last dimension of a product: features where the right operand is a weight (nothing that was projected)."""
    stream = get_stream(right)
    if stream is None or not stream.projected:
        return fresh(out.shape[-1], mode.source(out.dim() - 1, "feature"))
    return get_labels(right)[-1]


def addmm(mode: Mode, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    return mm(mode, out, args[1:], kwargs)


def bmm(mode: Mode, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    a, b = get_labels(args[0]), get_labels(args[1])
    return [unify(a[0], b[0], mode.node), a[1], _columns(mode, out, args[1])]


def baddbmm(mode: Mode, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    return bmm(mode, out, args[1:], kwargs)


def linear(mode: Mode, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    return [*get_labels(args[0])[:-1], fresh(out.shape[-1], mode.source(out.dim() - 1, "feature"))]


def embedding(mode: Mode, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    return [*get_labels(args[1]), fresh(out.shape[-1], mode.source(out.dim() - 1, "feature"))]


def index_select(mode: Mode, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    labels = list(get_labels(args[0]))
    dim = args[1] % args[0].dim()
    labels[dim] = _rows(mode, labels[dim], args[0].shape[dim], args[2])[0] if args[2].dim() else ()
    return labels


def _rows(mode: Mode, label: Label, size: int, by: torch.Tensor) -> Labels:
    """Rows of a dimension chosen by an index: a slice where its values are consecutive."""
    found = get_range(by)
    if found is not None and by.dim() == 1 and found.start >= 0 and found.start + by.numel() <= size:
        return [slice_label(label, found.start, found.start + by.numel(), mode.source())]
    return get_labels(by)


def index(mode: Mode, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels | None:
    """Gather along one dimension by an integer tensor; anything else is not followed."""
    tensor, indices = args[0], args[1]
    used = [d for d, i in enumerate(indices) if i is not None]
    if len(used) != 1 or indices[used[0]].dtype in (torch.bool, torch.uint8):
        return None
    labels = list(get_labels(tensor))
    labels[used[0] : used[0] + 1] = _rows(mode, labels[used[0]], tensor.shape[used[0]], indices[used[0]])
    return labels


def convolution(mode: Mode, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    """A patch embedding (kernel = stride) keeps the coarse half of an axis; a 'same' convolution all of it."""
    tensor, weight, _, stride, padding, dilation, transposed = args[:7]
    labels = get_labels(tensor)
    if tensor.dim() != out.dim():
        return [fresh(n, mode.source(d)) for d, n in enumerate(out.shape)]
    result: Labels = [labels[0], fresh(out.shape[1], mode.source(1, "feature"))]
    for d in range(2, out.dim()):
        k = d - 2
        step, n, m = stride[k % len(stride)], tensor.shape[d], out.shape[d]
        label: Label | None = None
        if not transposed and step == 1 and n == m:
            label = labels[d]
        elif not transposed and weight.shape[d] == step and not any(padding) and set(dilation) <= {1}:
            label = _coarse(mode, labels[d], n, m, step)
        result.append(label if label is not None else fresh(m, mode.source(d)))
    return result


def _coarse(mode: Mode, label: Label, n: int, m: int, step: int) -> Label | None:
    """Patches of `step` positions, as an axis."""
    leaves = resolve(label)
    if n != m * step or not leaves or leaves[-1].size % step:
        return None
    halves = split(leaves[-1], leaves[-1].size // step, mode.node)
    return (*leaves[:-1], *halves[0]) if halves else None


def pool(mode: Mode, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    """Pooling without overlap makes patches, as a patch embedding does."""
    tensor, kernel = args[:2]
    stride = (args[2] if len(args) > 2 else None) or kernel
    padding = args[3] if len(args) > 3 else 0
    spatial = len(kernel) if isinstance(kernel, (list, tuple)) else 1
    first = out.dim() - spatial
    result = list(get_labels(tensor))
    for d in range(first, out.dim()):
        size, step = (x[(d - first) % len(x)] if isinstance(x, (list, tuple)) else x for x in (kernel, stride))
        plain = size == step and not any(padding if isinstance(padding, (list, tuple)) else [padding])
        label = _coarse(mode, result[d], tensor.shape[d], out.shape[d], step) if plain else None
        result[d] = label if label is not None else fresh(out.shape[d], mode.source(d))
    return result


def im2col(mode: Mode, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    """[B, C, H, W] -> [B, C kernel, patches] (F.unfold): patches without overlap are rows x columns of them."""
    tensor, kernel, dilation, padding, stride = args[:5]
    labels = get_labels(tensor)
    result: Labels = [fresh(n, mode.source(d)) for d, n in enumerate(out.shape)]
    if tensor.dim() != 4:
        return result
    result[0] = labels[0]
    result[1] = fresh(out.shape[1], mode.source(1, "feature"))
    if list(kernel) == list(stride) and set(dilation) == {1} and not any(padding):
        each = [
            _coarse(mode, labels[d], n, n // step, step)
            for d, n, step in zip((2, 3), tensor.shape[2:], kernel, strict=True)
        ]
        if each[0] is not None and each[1] is not None:
            result[2] = (*each[0], *each[1])
    return result


def pixel_unshuffle(mode: Mode, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    """[..., C, H r, W r] -> [..., C r r, H, W]."""
    tensor, step = args[:2]
    labels = list(get_labels(tensor))
    for d in (-2, -1):
        label = _coarse(mode, labels[d], tensor.shape[d], out.shape[d], step)
        labels[d] = label if label is not None else fresh(out.shape[d], mode.source(out.dim() + d))
    labels[-3] = fresh(out.shape[-3], mode.source(out.dim() - 3))
    return labels


def pixel_shuffle(mode: Mode, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    """[..., C r r, H, W] -> [..., C, H r, W r]."""
    labels = list(get_labels(args[0]))
    for d in (-2, -1):
        labels[d] = (*labels[d], *fresh(args[1], mode.source(out.dim() + d)))
    labels[-3] = fresh(out.shape[-3], mode.source(out.dim() - 3))
    return labels


def attention(mode: Mode, out: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """A fused attention kernel: positions of the query, features of the value."""
    query, value = get_labels(args[0]), get_labels(args[2])
    labels = [*query[:-1], value[-1]]
    return [labels] if isinstance(out, (tuple, list)) else labels
