"""Read the grid from the values of a position table where no shape of the graph shows it.

Before:  a compiled block: %q : [1, 2, 240, 24], %rope : [1, 240, 1, 24], nothing says what the 240 are
After:   the axis of 240 is 5 x 6 x 8; each of the three says in `table` how to check that later

In regional compilation the latents are outside the graph, but the RoPE table (or the coordinates) comes in as
an input, and Dynamo shows its real values at compile time (how they are read: dynamicrad_compile/plans/positions).

One such graph serves every grid with as many tokens, without being compiled again. So the table is looked at
each time the graph runs: a grid without a plan in the graph gets dense attention, never another grid's plan. Where the
number of tokens is symbolic the plan is made when the graph runs.

Pictures of one size, which lie in a sequence as frames do, are told by their times and stay dense. References in front
of the frames or behind them are told by these too: they are extra tokens, as text is.

A single frame may be followed by a video, or be an image of a model that makes no others. Where graphs of the same
code have shown a video, it is taken for one. Else the first such graphs are for their number of tokens alone, so that a
video compiles again; after these the model is one of images.
"""

from __future__ import annotations

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from dynamicrad_compile.plans.layout import MIN_FRAMES
from dynamicrad_compile.plans.positions import (
    Decoded,
    columns_of,
    decode_table,
    may_be_pictures,
    times_of,
)
from dynamicrad_compile.reporting.reason import Reason

from .axes.concatenation import parts_of
from .axes.labels import Axis, Label, Part, fresh, label_size, resolve
from .axes.positions import PositionTable
from .graph import specialise, value_of
from .site import PassContext

MAX_FRAMES = 2
"""So many graphs of one code that show a single frame are for it alone."""
IF_VIDEO = "set `grid` if they are a video"


def decode_positions(gm: fx.GraphModule, context: PassContext) -> int:
    """Split sequence axes whose grid is shown by an input's values; returns how many."""
    wanted: set[Axis] = set()
    traced: set[Label] = set()
    for site in context.sites:
        if site.trace is not None and len(site.trace.query) >= 2:
            for part in parts_of(site.trace.query[-2]):
                axes = resolve(part.label) if part.whole else ()
                wanted.update(axis for axis in axes if len(axes) == 1 and not axis.parts)
                traced.update([axes] if len(axes) == 3 else [])
    found = 0
    for node, value in zip(gm.graph.find_nodes(op="placeholder"), context.example_inputs, strict=False):
        if not isinstance(value, torch.Tensor) or isinstance(value, (FakeTensor, torch.nn.Parameter)):
            continue
        for dim, label in enumerate(context.node_labels.get(node, [])):
            axes = resolve(label)
            if label_size(axes) != value.shape[dim]:
                continue
            if len(axes) == 1 and axes[0] in wanted:
                found += _decode(node, value, dim, axes[0], context)
            elif axes in traced:
                _compare(node, value, dim, axes)
    return found


def _compare(node: fx.Node, value: torch.Tensor, dim: int, axes: Label) -> None:
    """Note it where the values of an input contradict the axes that shapes of the graph show."""
    table = columns_of(value.detach(), dim)
    decoded = decode_table(table)
    sizes = tuple(axis.size for axis in axes)
    if decoded is None or (decoded.grid, decoded.around) == (sizes, (0, 0)):
        return
    shown, times = "x".join(map(str, decoded.grid)), _times(table, decoded)
    if decoded.grid == sizes:
        text = f"by the values of {node.name} its {sizes[0]} pictures{times} are not frames that follow each other"
    else:
        text = f"the values of {node.name} show {shown}, shapes of the graph {'x'.join(map(str, sizes))}"
    axes[0].conflict = axes[0].conflict or Reason("positions_disagree", text, IF_VIDEO)


def _decode(node: fx.Node, value: torch.Tensor, dim: int, axis: Axis, context: PassContext) -> int:
    varies = isinstance(value_of(node).shape[dim], torch.SymInt)
    table = columns_of(value.detach(), dim)
    decoded = decode_table(table, single_frame=varies)
    if decoded is None or (decoded.video[0] == 1 and not _may_be_video(value_of(node).shape[dim], context)):
        return 0
    doubt = _doubt(table, decoded, varies)
    context.seen.videos += decoded.video[0] >= MIN_FRAMES and doubt is None
    factors = tuple(Axis(size, axis.source, axis) for size in decoded.video)
    for factor in factors:
        factor.blank, factor.feature = axis.blank, axis.feature
        factor.table = PositionTable(node, dim, decoded, varies)
        factor.conflict = factor.conflict or doubt
    if decoded.around is None or not sum(decoded.around):
        axis.factors = factors
        return 1
    pieces: list[Label] = [fresh(n, axis.source) for n in decoded.tokens_around]
    pieces.insert(1, factors)
    axis.parts = tuple(Part(piece, 0, n) for piece in pieces if (n := label_size(piece)) > 0)
    return 1


def _may_be_video(tokens: torch.SymInt, context: PassContext) -> bool:
    """Whether a single frame is planned for like a video; if not, it may be that the graph is for it alone."""
    marked = any(getattr(value, "_dynamo_dynamic_indices", None) for value in context.example_inputs)
    if context.seen.videos or marked:
        return True
    context.seen.frames += 1
    if context.seen.frames <= MAX_FRAMES:
        specialise(tokens)
    return False


def _doubt(table: torch.Tensor, decoded: Decoded, varies: bool) -> Reason | None:
    """Why the frames that a table shows may be pictures."""
    frames, numbers = decoded.grid[0], _times(table, decoded)
    if decoded.around is None:
        text = f"{frames} pictures of one size{numbers}: in time they do not follow each other as frames do"
        return Reason("pictures", text, IF_VIDEO)
    if may_be_pictures(decoded) and not varies:
        few = f"only {decoded.video[0]} frames{numbers}"
        text = f"{few}, and nothing but positions says so: they may be pictures to be edited"
        return Reason("frames_or_pictures", text, IF_VIDEO)
    return None


def _times(table: torch.Tensor, decoded: Decoded) -> str:
    """The numbers of pictures in brackets, where the table has numbers."""
    if not decoded.numbers or decoded.grid[0] == 1:
        return ""
    return f" (numbers {', '.join(f'{t:g}' for t in times_of(table, decoded).tolist())})"
