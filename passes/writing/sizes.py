"""Symbolic sizes of a graph: which of them a plan rests on, and where the graph holds them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import fx

from ..axes.concatenation import parts_of
from ..axes.labels import Axis, resolve
from ..axes.positions import PositionTable, is_of_shard, table_of
from ..context import Dense, PassContext
from ..graph import depends_on_data, hint, specialise, value_of
from ..reading.layout import operands_of, token_dim
from ..site import CROSS, AttentionCall, VideoSite

if TYPE_CHECKING:
    import sympy

Symbol: TypeAlias = fx.Node | tuple[fx.Node, int]


@dataclass(frozen=True)
class Formula:
    """A size by an expression of symbols, each a node that is the size or has it as a dimension."""

    expression: sympy.Expr
    symbols: Mapping[sympy.Symbol, Symbol]


Home: TypeAlias = tuple[fx.Node, int] | int | Formula
"""Where a size is: a dimension of a node, a number that the graph was compiled for, or a formula of others."""


def symbolic_inputs(gm: fx.GraphModule, context: PassContext) -> list[torch.SymInt]:
    """Symbolic sizes among the graph's inputs that may change a plan.

    All but those that are only batch sizes, or lengths of prompts that are not part of a video's sequence.
    """
    harmless: set[Axis] = set()
    for site in context.sites:
        if site.trace is not None and site.role == CROSS:
            harmless.update(resolve(site.trace.key[-2]))
    traces = [video.trace for video in context.videos]
    for trace in traces:
        harmless.update(resolve(trace.query[0]))
    for trace in traces:
        for sequence in (trace.query[-2], trace.key[-2]):
            for label in (sequence, *(part.label for part in parts_of(sequence))):
                harmless.difference_update(resolve(label))
    sizes = list(_input_sizes(gm, context))
    free = {str(size) for size, axes in sizes if axes and harmless.issuperset(axes)}
    return [size for size, _ in sizes if str(size) not in free]


def _input_sizes(gm: fx.GraphModule, context: PassContext) -> Iterator[tuple[torch.SymInt, set[Axis]]]:
    """(size, axes) of each symbolic dimension of an input; no axes for inputs that are sizes themselves."""
    for node in gm.graph.find_nodes(op="placeholder"):
        value = value_of(node)
        if isinstance(value, torch.SymInt):
            yield value, set()
        elif isinstance(value, torch.Tensor):
            labels = context.node_labels.get(node, [()] * value.dim())
            for size, label in zip(value.shape, labels, strict=True):
                if isinstance(size, torch.SymInt):
                    yield size, set(resolve(label))


def make_constant(sizes: list[torch.SymInt]) -> None:
    """Guard sizes to their present values: other values compile again."""
    for size in sizes:
        specialise(size)


def marked_dynamic(gm: fx.GraphModule, context: PassContext, ranged: bool = False) -> set[Any]:
    """Symbols of sizes that the user marked as dynamic: a graph that made one a constant would be refused.

    ranged: only those with a smallest or a largest value, which no guard may narrow.
    """
    found: set[Any] = set()
    for node, given in zip(gm.graph.find_nodes(op="placeholder"), context.example_inputs, strict=False):
        value, ranges = value_of(node), getattr(given, "_dynamo_dynamic_range", ())
        bounded = {one.dim for one in ranges if (one.min, one.max) != (None, None)}
        for dim in bounded if ranged else getattr(given, "_dynamo_dynamic_indices", ()):
            if isinstance(value, torch.Tensor) and isinstance(size := value.shape[dim], torch.SymInt):
                found |= size.node.expr.free_symbols
    return found


def hold_decisions(gm: fx.GraphModule, context: PassContext) -> None:
    """Guard what was decided by the number of tokens, where that is symbolic and the user has set it no bounds."""
    bounded = marked_dynamic(gm, context, ranged=True)
    for video, decision in zip(context.videos, context.decisions.sites, strict=True):
        tokens = tokens_of(video.call)
        limit = decision.below if isinstance(decision, Dense) else decision.at_least
        if limit is None or not isinstance(tokens, torch.SymInt) or depends_on_data(tokens):
            continue
        if video.site.group is not None:  # a share of the queries, which stays the same
            limit = limit * hint(tokens) // video.tokens
        if bounded.isdisjoint(tokens.node.expr.free_symbols):
            bool(tokens < limit)


def vary(where: RuntimeSizes, call: AttentionCall) -> bool:
    """Whether a plan may change from call to call: a size of the grid, or the length of the sequence, is symbolic."""
    homes: tuple[Home, ...] = where.grid if isinstance(where.grid, tuple) else ((where.grid.node, where.grid.dim),)
    sizes = [value_of(home[0]).shape[home[1]] for home in homes if isinstance(home, tuple)]
    formulas = any(isinstance(home, Formula) for home in homes)
    return formulas or any(isinstance(size, torch.SymInt) for size in (*sizes, tokens_of(call), tokens_of(call, 1)))


def tokens_of(call: AttentionCall, which: int = 0) -> Any:
    """The length of a call's queries (0) or keys (1), as the graph has it."""
    length = value_of(operands_of(call)[which]).shape[token_dim(call, which)]
    return length // call.sequences if "t" in call.layouts[which] and call.sequences else length


@dataclass(frozen=True)
class RuntimeSizes:
    """Where a graph holds the sizes of one site.

    grid     frames, height and width; or a table whose values show them
    before   axes whose products are the pieces in front of the video; None: whatever the video leaves of the sequence
    """

    grid: tuple[Home, Home, Home] | PositionTable
    before: tuple[tuple[Home, ...], ...] | None = ()


def runtime_sizes(video: VideoSite, context: PassContext) -> RuntimeSizes | None:
    """Where the sizes of a site can be read when the graph runs; None if an axis is in no shape.

    Of an axis that only a later reshape shows, the size that it has there is computed from those of earlier nodes.
    """
    if video.shard or is_of_shard(video.axes):
        return None  # where they begin is in no shape
    homes: dict[Axis, Home] = {}
    symbols: dict[sympy.Symbol, Symbol] = {}
    is_earlier = True
    for node in video.node.graph.nodes:
        value = value_of(node)
        is_earlier = is_earlier and node is not video.node
        if is_earlier and isinstance(value, torch.SymInt) and value.node.expr.is_Symbol:
            symbols.setdefault(value.node.expr, node)
        if not isinstance(value, torch.Tensor) or node is video.node:
            continue
        for dim, (label, size) in enumerate(zip(context.node_labels.get(node, []), value.shape, strict=False)):
            axes = resolve(label)
            if is_earlier and isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                symbols.setdefault(size.node.expr, (node, dim))
            home: Home | None = (node, dim) if is_earlier else _size_from(size, symbols)
            if len(axes) == 1 and home is not None:
                homes.setdefault(axes[0], home)
    grid: tuple[Home, Home, Home] | PositionTable
    table = table_of(video.axes)
    if len(video.axes) == 3 and all(axis in homes for axis in video.axes):
        frames, height, width = (homes[axis] for axis in video.axes)
        grid = (frames, height, width)
    elif table is not None:
        grid = table
    else:
        return None
    # What a table shows are frames and what is around them: references, or all of a packed sequence.
    references = table.shown.tokens_around if grid is table and table is not None else (0, 0)
    asked = video.queries
    if asked is not None and asked[1] != video.keys and asked[0] != video.text.before - references[0]:
        return None  # where they begin is in no shape
    if video.text.before == references[0]:
        return RuntimeSizes(grid)
    if video.text.after == references[1]:
        return RuntimeSizes(grid, None)
    parts = parts_of((video.trace.query if asked is None else video.trace.key)[-2])
    at = next((i for i, part in enumerate(parts) if resolve(part.label) == resolve(video.axes)), 0)
    pieces: list[tuple[Home, ...]] = []
    for part in parts[: at - bool(references[0])]:
        axes = resolve(part.label)
        if not part.whole or any(axis not in homes for axis in axes):
            return None
        pieces.append(tuple(homes[axis] for axis in axes))
    return RuntimeSizes(grid, tuple(pieces)) if at else None


def _size_from(size: Any, symbols: Mapping[sympy.Symbol, Symbol]) -> Home | None:
    """A size as a number or as a formula of these symbols; None where it is of others, too."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    expression = size.node.expr
    return Formula(expression, symbols) if expression.free_symbols <= symbols.keys() else None
