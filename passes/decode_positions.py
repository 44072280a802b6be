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

Under context parallelism the input may be this process's rows of the table (see reading/shard_positions).

In a packed sequence, of text, audio, pictures and video one behind the other, the video is one piece of the axis, and
what is in front of it and behind it are others (plans/packed). A table over text and video does the same where the
graph puts the two together: then the video is in one of the pieces.

Where the user gives the grid, padding behind it is told by the values of the inputs, too (see reading/padding).

A single frame may be followed by a video, or be an image of a model that makes no others. Where graphs of the same
code have shown a video, it is taken for one. Else the first such graphs are for their number of tokens alone, so that a
video compiles again; after these the model is one of images.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from dynamicrad_compile.plans.layout import MIN_FRAMES
from dynamicrad_compile.plans.packed import Packed, find_video, is_of_positions
from dynamicrad_compile.plans.positions import (
    Decoded,
    Triple,
    columns_of,
    decode_table,
    may_be_pictures,
    times_of,
)
from dynamicrad_compile.reporting.reason import IF_VIDEO, NOTHING, Reason

from .axes.concatenation import parts_of
from .axes.kinship import roots
from .axes.labels import Axis, Label, Part, fresh, label_size, resolve, take
from .axes.positions import PositionTable, table_of
from .context import PassContext
from .graph import hint, specialise, value_of
from .reading.padding import split_padding
from .reading.shard_positions import joined_of, table_of_shard
from .site import Trace

MAX_FRAMES = 2
"""So many graphs of one code that show a single frame are for it alone."""
RASTER_ROWS = f"{NOTHING} if it holds none; else keep its rows frame by frame, row by row, in even steps of time"


def decode_positions(gm: fx.GraphModule, context: PassContext) -> int:
    """Split sequence axes whose grid is shown by an input's values; returns how many."""
    wanted: set[Axis] = set()
    traced: set[Label] = set()
    cut: set[Label] = set()
    for site in context.sites:
        if site.trace is not None and len(site.trace.query) >= 2:
            sequence = site.trace.key if _is_shard(site.trace) else site.trace.query
            for part in parts_of(sequence[-2]):
                axes = resolve(part.label) if part.whole else ()
                wanted.update(axis for axis in axes if len(axes) == 1 and not axis.parts)
                traced.update([axes] if len(axes) == 3 else [])
                cut.update([axes] if len(axes) == 2 and roots(axes[0]) & roots(axes[1]) else [])
    found = 0
    for node, value in zip(gm.graph.find_nodes(op="placeholder"), context.example_inputs, strict=False):
        if not isinstance(value, torch.Tensor) or isinstance(value, (FakeTensor, torch.nn.Parameter)):
            continue
        for dim, label in enumerate(context.node_labels.get(node, [])):
            axes = resolve(label)
            if label_size(axes) != value.shape[dim]:
                continue
            if len(axes) == 1 and axes[0] in wanted and not axes[0].parts:
                found += _decode(node, value, dim, axes[0], context)
                traced.update([resolve(label)] if len(resolve(label)) == 3 else [])
            elif len(axes) == 1 and not wanted.isdisjoint(axis for one in _pieces(axes[0]) for axis in one):
                found += _decode_joined(node, value, dim, axes[0], context)
            elif axes in cut:
                found += _decode_cut(node, value, dim, axes, context)
            elif context.grid is None and (joined := joined_of(axes)) is not None and joined[0] in wanted:
                found += _decode_shard(node, value, dim, *joined, context)
            elif axes in traced:
                _compare(node, value, dim, axes)
    return found + split_padding(gm, context)


def _is_shard(trace: Trace) -> bool:
    """Whether the queries are some of a sequence, of which other processes hold the others."""
    return any(axis.shard for axis in resolve(trace.query[-2]))


def _compare(node: fx.Node, value: torch.Tensor, dim: int, axes: Label) -> None:
    """Note it where the values of an input contradict the axes that shapes of the graph, or another table, show."""
    table = columns_of(value.detach(), dim)
    decoded, first = decode_table(table), table_of(axes)
    sizes = tuple(axis.size for axis in axes)
    if decoded is None:
        return
    shown, times = "x".join(map(str, decoded.grid)), _times(table, decoded)
    if first is not None:  # of sines and cosines of the same angles one may tell less than the other
        if not _are_swapped(first, decoded, table.shape[1]):
            return
        text = f"the values of {node.name} and of {first.node.name} have frames, rows and columns in another order"
    elif (decoded.grid, decoded.around) == (sizes, (0, 0)):
        return
    elif decoded.grid == sizes:
        text = f"by the values of {node.name} its {sizes[0]} pictures{times} are not frames that follow each other"
    else:
        text = f"the values of {node.name} show {shown}, shapes of the graph {'x'.join(map(str, sizes))}"
    axes[0].conflict = axes[0].conflict or Reason("positions_disagree", text, IF_VIDEO)


def _are_swapped(first: PositionTable, other: Decoded, columns: int) -> bool:
    """Whether two tables of as many columns have the columns of one axis for those of another."""
    shown, value = first.shown, value_of(first.node)
    if not isinstance(shown, Decoded) or columns * hint(value.shape[first.dim]) != math.prod(map(hint, value.shape)):
        return False
    pairs = itertools.permutations(range(3), 2)
    return any(set(shown.of_axes[i]) & set(other.of_axes[j]) for i, j in pairs)


def _decode(node: fx.Node, value: torch.Tensor, dim: int, axis: Axis, context: PassContext) -> int:
    varies = isinstance(value_of(node).shape[dim], torch.SymInt)
    table = columns_of(value.detach(), dim)
    decoded = decode_table(table, single_frame=varies)
    if decoded is None:
        packed = find_video(table)
        if packed is not None:
            shown = PositionTable(node, dim, packed, varies)
            return _split_packed(packed, packed.tokens_around, table, shown, axis, context)
        if axis.why is not None and is_of_positions(table):  # its rows were written in an order that is not known
            text = f"the positions in {node.name} show no {MIN_FRAMES} frames or more in its {axis.size} tokens"
            axis.why = Reason("no_video_in_positions", text, RASTER_ROWS)
        return 0
    if decoded.video[0] == 1 and not _may_be_video(value_of(node).shape[dim], context):
        return 0
    doubt = _doubt(table, decoded, varies)
    context.seen.videos += decoded.video[0] >= MIN_FRAMES and doubt is None
    _split(axis, decoded.video, decoded.tokens_around, PositionTable(node, dim, decoded, varies), doubt)
    return 1


def _decode_cut(node: fx.Node, value: torch.Tensor, dim: int, axes: Label, context: PassContext) -> int:
    """Tell the axes of a sequence that a reshape has cut in two before, into frames and places, say."""
    varies = isinstance(value_of(node).shape[dim], torch.SymInt)
    table = columns_of(value.detach(), dim)
    decoded, leaves = decode_table(table), list(axes)
    if decoded is None or decoded.around != (0, 0):
        return 0
    frames, height, _ = decoded.grid
    if axes[0].size not in (frames, frames * height):
        return 0
    found = [resolve(label) for size in decoded.grid if (label := take(leaves, size, node.name)) is not None]
    if [len(label) for label in found] != [1, 1, 1]:
        return 0
    doubt = _doubt(table, decoded, varies)
    context.seen.videos += decoded.video[0] >= MIN_FRAMES and doubt is None
    for (axis,) in found:
        axis.table, axis.conflict = PositionTable(node, dim, decoded, varies), axis.conflict or doubt
    return 1


def _decode_shard(node: fx.Node, value: torch.Tensor, dim: int, axis: Axis, rows: Part, context: PassContext) -> int:
    table = table_of_shard(node, value, dim, axis, rows)
    if table is None:
        return 0
    context.seen.videos += 1
    _split(axis, table.shown.grid, (0, 0), table, None)
    return 1


def _pieces(joined: Axis) -> list[Label]:
    """The pieces of a concatenation that are axes of their own; () for each that is none."""
    parts = parts_of((joined,)) if joined.parts else ()
    return [resolve(part.label) if part.whole and len(resolve(part.label)) == 1 else () for part in parts]


def _decode_joined(node: fx.Node, value: torch.Tensor, dim: int, joined: Axis, context: PassContext) -> int:
    """Split a piece of a concatenation, such as text and video, whose rows are those of one table."""
    table = columns_of(value.detach(), dim)
    packed = find_video(table)
    if packed is None:
        return 0
    shown = PositionTable(node, dim, packed, isinstance(value_of(node).shape[dim], torch.SymInt))
    start, stop = packed.start, packed.start + math.prod(packed.grid)
    offset = 0
    for part, piece in zip(parts_of((joined,)), _pieces(joined), strict=True):
        if piece and not piece[0].parts and offset <= start and stop <= offset + part.size:
            around = (start - offset, offset + part.size - stop)
            return _split_packed(packed, around, table, shown, piece[0], context)
        offset += part.size
    return 0


def _split_packed(
    packed: Packed, around: tuple[int, int], table: torch.Tensor, shown: PositionTable, axis: Axis, context: PassContext
) -> int:
    """Split an axis into a video that its table shows, and the tokens around it."""
    doubt = None
    if packed.doubt and not shown.varies:
        times = table[packed.start :: packed.grid[1] * packed.grid[2], packed.columns[0]][: packed.grid[0]]
        doubt = _may_be_pictures(packed.grid[0], _numbers(times) if packed.numbers else "")
    context.seen.videos += doubt is None
    _split(axis, packed.grid, around, shown, doubt)
    return 1


def _split(axis: Axis, grid: Triple, around: tuple[int, int], table: PositionTable, doubt: Reason | None) -> None:
    """An axis is a grid with so many tokens in front of it and behind it."""
    factors = tuple(Axis(size, axis.source, axis) for size in grid)
    for factor in factors:
        factor.blank, factor.feature, factor.table, factor.conflict = axis.blank, axis.feature, table, doubt
    if not any(around):
        axis.factors = factors
        return
    pieces: list[Label] = [fresh(size, axis.source) for size in around]
    pieces.insert(1, factors)
    axis.parts = tuple(Part(piece, 0, size) for piece in pieces if (size := label_size(piece)))


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
    return _may_be_pictures(decoded.video[0], numbers) if may_be_pictures(decoded) and not varies else None


def _times(table: torch.Tensor, decoded: Decoded) -> str:
    """The numbers of pictures in brackets, where the table has numbers."""
    return _numbers(times_of(table, decoded)) if decoded.numbers and decoded.grid[0] > 1 else ""


def _numbers(times: torch.Tensor) -> str:
    return f" (numbers {', '.join(f'{t:g}' for t in times.tolist())})"


def _may_be_pictures(frames: int, numbers: str) -> Reason:
    few = f"only {frames} frames{numbers}"
    text = f"{few}, and nothing but positions says so: they may be pictures to be edited"
    return Reason("frames_or_pictures", text, IF_VIDEO)
