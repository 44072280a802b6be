"""When a label is a video grid: three axes, frames first, told apart by more than their sizes.

Any number is a product of three others, so three factors alone prove nothing. Axes are told apart if they began as
three different dimensions (of a latent, of position tables), or if an unpatchify split them off together and the
graph gives them back in that order. They are in raster order if no tensor had them in another order.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence

from torch import fx

from dynamicrad_compile.reporting.reason import KEEP_ORDER, SET_GRID, Reason

from .concatenation import parts_of
from .kinship import inputs, kinship, names, roots
from .labels import Axis, Label, Part, coarsest, resolve


class Grids:
    """Tells the grids of a traced graph; its outputs help to tell them."""

    def __init__(self, gm: fx.GraphModule, node_labels: Mapping[fx.Node, list[Label]]):
        self.labels = node_labels
        self.shown: list[tuple[fx.Node, dict[Axis, int]]] = []  # for each output, the dimension in which an axis is
        for output in (node for node in gm.graph.nodes if node.op == "output"):
            for node in output.all_input_nodes:
                dims: dict[Axis, int] = {}
                for d, label in enumerate(node_labels.get(node, [])):
                    parts = [axis for part in parts_of(label) if part.whole for axis in resolve(part.label)]
                    dims.update(dict.fromkeys((*resolve(label), *coarsest(label), *parts), d))
                self.shown.append((node, dims))

    def axes(self, label: Label) -> Label:
        """Axes (frames, height, width) of a label that is their raster product, frames first; () if it is not."""
        axes = _three(label)
        joined = any(len(axis.parts or ()) > 1 for axis in axes)
        return axes if len(axes) == 3 and not joined and not self._refusal(axes) else ()

    def size(self, label: Label) -> tuple[int, int, int] | None:
        """(frames, height, width) of a label, in tokens; None if it is no grid."""
        axes = self.axes(label)
        return (axes[0].size, axes[1].size, axes[2].size) if axes else None

    def joined_axes(self, label: Label) -> Label:
        """Axes of a label that would be a grid if its frames did not come from several sources; () if it is none."""
        axes = _three(label)
        if len(axes) != 3 or len(axes[0].parts or ()) < 2 or any(len(axis.parts or ()) > 1 for axis in axes[1:]):
            return ()
        return axes if not self._refusal(axes) else ()

    def is_one_video(self, label: Label) -> bool:
        """Whether frames that come from several sources, as from a cache, are those of one axis of positions."""
        axes = self.joined_axes(label)
        if not axes or any(len(resolve(part.label)) > 1 for part in parts_of(axes[:1])):
            return False
        return any(axis.parts is None for axis in names(axes[0]))

    def why_none(self, label: Label) -> Reason | None:
        """Why a label is no grid, where that can be said; None otherwise."""
        axes = resolve(label)
        if len(axes) == 4 and self.axes(axes[1:]):
            n, frames, height, width = (axis.size for axis in axes)
            text = f"{n} pieces of {frames}x{height}x{width} one behind the other: several videos, or one in pieces"
            advice = f"if it is one, set `grid` to ({n * frames}, {height}, {width}) and `override_grid`"
            return Reason("pieces_or_videos", text, advice)
        if len(axes) > 3 and len(coarsest(label)) > 3:
            text = f"its tokens are in a tiled order ({_sizes(axes)}), no frames x height x width"
            return Reason("tiled_order", text, KEEP_ORDER)
        axes = _three(label)
        return self._refusal(axes) if len(axes) == 3 else None

    def contradiction(self, label: Label, grid: tuple[int, int, int]) -> str:
        """The sizes of a label's axes, where it is certain that its tokens are no such grid; "" where it is not.

        Axes may be products of the grid's, as in a latent with all frames below each other.
        """
        axes = self.axes(label) or self.joined_axes(label)
        sizes = [axis.size for axis in axes]
        for axis in () if axes else _three(label):
            if axes and not self._are_two(axes[-1], axis):
                sizes[-1] *= axis.size
            else:
                sizes.append(axis.size)
            axes = (*axes, axis)
        allowed = {math.prod(grid[d:]) for d in range(3)}
        fits = all(math.prod(sizes[d:]) in allowed for d in range(len(sizes)))
        return "" if fits else " x ".join(map(str, sizes))

    def _are_two(self, a: Axis, b: Axis) -> bool:
        """Whether it is certain that neighbours in a sequence are two axes, and not one that a reshape cut up."""
        return not (a.conflict or b.conflict) and (roots(a) != roots(b) or self._told_apart(a, b))

    def given_back(self, axes: Label) -> bool:
        """Whether one output of the graph has all these axes."""
        return bool(axes) and any(all(axis in dims for axis in axes) for _, dims in self.shown)

    def unproven(self, axes: Label) -> Reason | None:
        """Why it is not certain that frames come first, where the output that would show it can't be followed.

        Tables that the graph makes itself count rows and columns just as they count frames.
        """
        origins = [{one.source for one in kinship(axis)} for axis in axes]
        latents = [{of.node for of in sources if of.kind == "input" and of.rank > 3} for sources in origins]
        seen = any(axis.table is not None for axis in axes) or bool(set.intersection(*latents))
        if seen or self.given_back(axes):
            return None
        for node, dims in self.shown:
            if len(self.labels.get(node, ())) > 3 and not set(axes) & set(dims):
                text = f"nothing but tables shows {_sizes(axes)}, and not how {node.name} puts them in order"
                return Reason("order_not_shown", text, SET_GRID)
        return None

    def denoised(self, segments: Sequence[Part], videos: Sequence[int]) -> int | None:
        """Which of several videos in a sequence the graph gives back; None where that is not certain."""
        found = [i for i in videos if self.given_back(self.axes(segments[i].label))]
        if len(found) != 1:
            return None
        extra = sum(segments[i].size for i in videos if i != found[0])
        return found[0] if 2 * extra <= segments[found[0]].size else None

    def disorder(self, label: Label) -> Reason | None:
        """Why the tokens of a label are in no raster order at all, whatever its grid is; None where they may be."""
        axes = resolve(label)
        if len(set(axes)) != len(axes):
            return Reason("repeated_axis", f"{_sizes(axes)} are not different axes", KEEP_ORDER)
        if any(map(_is_reversed, axes)):
            text = f"its tokens ({_sizes(axes)}) are, some or all, in reverse order"
            return Reason("reversed_order", text, KEEP_ORDER)
        return None

    def _refusal(self, axes: Label) -> Reason | None:
        disorder = self.disorder(axes)
        if disorder:
            return disorder
        for a, b in itertools.combinations(axes, 2):
            swapped = _swapped(a, b)
            if swapped:
                return Reason("axes_swapped", f"{swapped}: no frames x height x width", SET_GRID)
            if any(a in dims and b in dims and dims[a] > dims[b] for _, dims in self.shown):
                text = f"the graph gives back {b.size} ({b.source}) before {a.size} ({a.source}): another order"
                return Reason("output_order", text, SET_GRID)
            for root in roots(a) & roots(b):
                if _position(a, root) > _position(b, root):
                    text = f"{root.source} ({root.size}) was put in another order: no frames x height x width"
                    return Reason("reordered", text, SET_GRID)
        if any(len(set(choice)) == 3 for choice in itertools.product(*(roots(axis) for axis in axes))):
            return None
        for a, b in itertools.combinations(axes, 2):
            if roots(a) == roots(b) and not self._told_apart(a, b):
                text = f"nothing but a reshape says that {a.size * b.size} ({a.source}) are {a.size} x {b.size}"
                return Reason("only_a_reshape", text, SET_GRID)
        return None

    def _told_apart(self, a: Axis, b: Axis) -> bool:
        """Whether factors of one axis are known as axes: read from a table, or made by one reshape and given back."""
        if a.table is not None and b.table is not None:
            return True
        return bool(_births(a) & _births(b)) and any(
            a in dims and b in dims and dims[a] < dims[b] for _, dims in self.shown
        )


def _three(label: Label) -> Label:
    axes = resolve(label)
    return coarsest(label) if len(axes) > 3 else axes


def _swapped(a: Axis, b: Axis) -> str:
    """Which dimension comes before which, if an input, or what the axes are named for, has `b` before `a`; else ""."""
    if a.source.node == b.source.node and a.source.dim > b.source.dim:
        return f"{a.source} comes before {b.source}"
    for node in sorted({source.node for source in inputs(a)}):
        of_a, of_b = ({source.dim for source in inputs(axis) if source.node == node} for axis in (a, b))
        if of_b and min(of_a) > max(of_b):
            return f"dim {min(of_a)} of {node} comes before dim {max(of_b)}"
    return ""


def _is_reversed(axis: Axis) -> bool:
    """Whether its rows are those of an input in reverse order, or a mixture of both orders."""
    for one in kinship(axis):
        mirrored = (one.mirror, *resolve((one.mirror,))) if one.mirror is not None else ()
        inputs = any(other.source.kind == "input" for axis in mirrored for other in kinship(axis))
        if one.reversed and (inputs or not mirrored):
            return True
    return False


def _births(axis: Axis) -> set[str]:
    """Nodes at which the axis, by any name, was split off another."""
    return {one.born for one in names(axis) if one.born}


def _position(axis: Axis, root: Axis) -> int:
    first = resolve((axis,))[:1]
    leaves = resolve((root,))
    return next((i for i, leaf in enumerate(leaves) if first and leaf is first[0]), -1)


def _sizes(axes: Iterable[Axis]) -> str:
    return " x ".join(str(axis.size) for axis in axes)
