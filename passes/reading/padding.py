"""Padding behind a video whose grid the user gives, where the values of the inputs show it.

Before:  %x : [B, 256, C], and grid = 5 x 6 x 8 = 240 tokens
After:   the axis of 256 is 240 tokens and 16 of padding, if rows 240.. are alike in each sample, and row 239 is not

Rows of padding are zeros, or what projections make of zeros: one like the other, as tokens of a video never are. So
they must be in all inputs along the axis, for modulation may be the same for many tokens. A row alone proves nothing.
Padding is read by all and reads all, as text is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from ..axes.labels import Axis, Part, fresh, resolve
from ..context import PassContext

TOLERANCE = 1e-2
"""Rows are alike if they differ by so much less than they do from the last token of the video."""


def split_padding(gm: fx.GraphModule, context: PassContext) -> int:
    """Split axes of sequences into the tokens of the user's grid and padding behind them; returns how many."""
    if context.grid is None:
        return 0
    tokens = math.prod(context.grid)
    traces = [site.trace for site in context.sites if site.trace is not None]
    labels = [resolve(label[-2]) for trace in traces for label in (trace.query, trace.key)]
    found: dict[Axis, list[tuple[bool, bool]]] = {axes[0]: [] for axes in labels if len(axes) == 1}
    for axis, value, dim in _inputs(gm, context):
        if axis in found and not axis.parts and axis.size > tokens + 1:
            found[axis].append(rows_behind(value, dim, tokens))
    padded = [axis for axis, rows in found.items() if all(same for same, _ in rows) and any(new for _, new in rows)]
    for axis in padded:
        _split(axis, tokens)
    return len(padded)


def rows_behind(value: torch.Tensor, dim: int, tokens: int) -> tuple[bool, bool]:
    """Whether the rows along `dim` from row `tokens` on are alike, and others than row `tokens - 1`, in each sample.

    Samples are dimension 0, where the rows are not.
    """
    rows = value.detach().movedim(dim, 0)
    rows = rows.reshape(len(rows), rows.shape[1] if dim else 1, -1)
    last, behind = rows[tokens - 1].double(), rows[tokens:].double()
    spread, step = (behind - behind[:1]).abs().amax((0, -1)), (last - behind[0]).abs().amax(-1)
    return bool((spread <= TOLERANCE * step).all() or (spread == 0).all()), bool((step > 0).all())


def _inputs(gm: fx.GraphModule, context: PassContext) -> Iterator[tuple[Axis, torch.Tensor, int]]:
    """Axes along which inputs have features, with the inputs' values and dimensions."""
    for node, value in zip(gm.graph.find_nodes(op="placeholder"), context.example_inputs, strict=False):
        if not isinstance(value, torch.Tensor) or isinstance(value, (FakeTensor, torch.nn.Parameter)):
            continue
        for dim, label in enumerate(context.node_labels.get(node, [])):
            axes = resolve(label)
            if len(axes) == 1 and axes[0].size == value.shape[dim] and value.is_floating_point() and value.dim() > 2:
                yield axes[0], value, dim


def _split(axis: Axis, tokens: int) -> None:
    video, padding = fresh(tokens, axis.source), fresh(axis.size - tokens, axis.source)
    for piece in video:
        piece.why, piece.conflict = axis.why, axis.conflict
    for piece in padding:
        piece.blank = True
    axis.parts = (Part(video, 0, tokens), Part(padding, 0, axis.size - tokens))
