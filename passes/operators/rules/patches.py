"""How axes move where neighbouring positions become one: convolutions, pooling, patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...axes.labels import Label, fresh, resolve, split
from ...axes.tensor_labels import Labels, get_labels
from ..calls import AxisTrace


def convolution(trace: AxisTrace, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    """A patch embedding (kernel = stride) keeps the coarse half of an axis; a 'same' convolution all of it."""
    tensor, weight, _, stride, padding, dilation, transposed = args[:7]
    labels = get_labels(tensor)
    if tensor.dim() != out.dim():
        return [fresh(n, trace.source(d)) for d, n in enumerate(out.shape)]
    result: Labels = [labels[0], fresh(out.shape[1], trace.source(1, "feature"))]
    for d in range(2, out.dim()):
        k = d - 2
        step, n, m = stride[k % len(stride)], tensor.shape[d], out.shape[d]
        label: Label | None = None
        if not transposed and step == 1 and n == m:
            label = labels[d]
        elif not transposed and weight.shape[d] == step and not any(padding) and set(dilation) <= {1}:
            label = _coarse(trace, labels[d], n, m, step)
        result.append(label if label is not None else fresh(m, trace.source(d)))
    return result


def pool(trace: AxisTrace, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
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
        label = _coarse(trace, result[d], tensor.shape[d], out.shape[d], step) if plain else None
        result[d] = label if label is not None else fresh(out.shape[d], trace.source(d))
    return result


def im2col(trace: AxisTrace, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    """[B, C, H, W] -> [B, C kernel, patches] (F.unfold): patches without overlap are rows x columns of them."""
    tensor, kernel, dilation, padding, stride = args[:5]
    labels = get_labels(tensor)
    result: Labels = [fresh(n, trace.source(d)) for d, n in enumerate(out.shape)]
    if tensor.dim() != 4:
        return result
    result[0] = labels[0]
    result[1] = fresh(out.shape[1], trace.source(1, "feature"))
    if list(kernel) == list(stride) and set(dilation) == {1} and not any(padding):
        each = [
            _coarse(trace, labels[d], n, n // step, step)
            for d, n, step in zip((2, 3), tensor.shape[2:], kernel, strict=True)
        ]
        if each[0] is not None and each[1] is not None:
            result[2] = (*each[0], *each[1])
    return result


def pixel_unshuffle(trace: AxisTrace, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    """[..., C, H r, W r] -> [..., C r r, H, W]."""
    tensor, step = args[:2]
    labels = list(get_labels(tensor))
    for d in (-2, -1):
        label = _coarse(trace, labels[d], tensor.shape[d], out.shape[d], step)
        labels[d] = label if label is not None else fresh(out.shape[d], trace.source(out.dim() + d))
    labels[-3] = fresh(out.shape[-3], trace.source(out.dim() - 3))
    return labels


def pixel_shuffle(trace: AxisTrace, out: torch.Tensor, args: Sequence[Any], kwargs: dict[str, Any]) -> Labels:
    """[..., C r r, H, W] -> [..., C, H r, W r]."""
    labels = list(get_labels(args[0]))
    for d in (-2, -1):
        labels[d] = (*labels[d], *fresh(args[1], trace.source(out.dim() + d)))
    labels[-3] = fresh(out.shape[-3], trace.source(out.dim() - 3))
    return labels


def _coarse(trace: AxisTrace, label: Label, n: int, m: int, step: int) -> Label | None:
    """Patches of `step` positions, as an axis."""
    leaves = resolve(label)
    if n != m * step or not leaves or leaves[-1].size % step:
        return None
    halves = split(leaves[-1], leaves[-1].size // step, trace.node)
    return (*leaves[:-1], *halves[0]) if halves else None
