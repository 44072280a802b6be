"""When a label is a video grid: three axes, frames first, told apart by more than their sizes.

Any number is a product of three others, so three factors alone prove nothing. Axes are told apart if they began as
three different dimensions (of a latent, of position tables), or if one reshape split them off together, as an
unpatchify does. They are in raster order if no tensor had them in another order.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from torch import fx

from ._axes import Axis, Label, Part, coarsest, parts_of, resolve
from ._site import PassContext


def grid_axes(label: Label) -> Label:
    """Axes (frames, height, width) of a label that is their raster product, frames first; () if it is not."""
    axes = _three(label)
    if any(len(axis.parts or ()) > 1 for axis in axes):
        return ()
    return axes if not _why_no_grid(axes) else ()


def grid_of(label: Label) -> tuple[int, int, int] | None:
    """(frames, height, width) of a label, in tokens; None if it is no grid."""
    axes = grid_axes(label)
    return (axes[0].size, axes[1].size, axes[2].size) if axes else None


def joined_frames(label: Label) -> Label:
    """Axes of a label that would be a grid if its frames did not come from several sources; () if it is none."""
    axes = _three(label)
    if len(axes) != 3 or len(axes[0].parts or ()) < 2 or any(len(axis.parts or ()) > 1 for axis in axes[1:]):
        return ()
    return axes if not _why_no_grid(axes) else ()


def why_no_grid(label: Label) -> str:
    """Why a label is no grid, where that can be said; '' otherwise."""
    axes = resolve(label)
    if len(axes) > 3 and len(coarsest(label)) > 3:
        return f"its tokens are in a tiled order ({_sizes(axes)}), no frames x height x width"
    axes = _three(label)
    return _why_no_grid(axes) if len(axes) == 3 else ""


def shown_axes(gm: fx.GraphModule, context: PassContext) -> set[Axis]:
    """Axes of the tensors that the graph gives back."""
    shown: set[Axis] = set()
    for output in (node for node in gm.graph.nodes if node.op == "output"):
        for node in output.all_input_nodes:
            for label in context.node_labels.get(node, []):
                shown.update(resolve(label), coarsest(label))
                shown.update(axis for part in parts_of(label) if part.whole for axis in resolve(part.label))
    return shown


def denoised(segments: Sequence[Part], videos: Sequence[int], shown: set[Axis]) -> int | None:
    """Which of several videos in a sequence the graph gives back; None where that is not certain."""
    found = [i for i in videos if shown.issuperset(grid_axes(segments[i].label))]
    if len(found) != 1:
        return None
    extra = sum(segments[i].size for i in videos if i != found[0])
    return found[0] if 2 * extra <= segments[found[0]].size else None


def _three(label: Label) -> Label:
    axes = resolve(label)
    return coarsest(label) if len(axes) > 3 else axes


def _why_no_grid(axes: Label) -> str:
    if len(axes) != 3 or len(set(axes)) != 3:
        return "it has not three different axes"
    for a, b in itertools.combinations(axes, 2):
        if a.source.node == b.source.node and a.source.dim > b.source.dim:
            return f"{a.source} comes before {b.source}: no frames x height x width"
        for root in _roots(a) & _roots(b):
            if _position(a, root) > _position(b, root):
                return f"{root.source} ({root.size}) was put in another order: no frames x height x width"
    if any(len(set(choice)) == 3 for choice in itertools.product(*(_roots(axis) for axis in axes))):
        return ""
    for a, b in itertools.combinations(axes, 2):
        if _roots(a) == _roots(b) and len(_roots(a)) == 1 and not _births(a) & _births(b):
            return f"{_sizes(axes)} are factors of one axis that no single reshape shows"
    return ""


def _kinship(axis: Axis) -> set[Axis]:
    """The axis, those that turned out to be it, and those of which it is a factor."""
    found: set[Axis] = set()
    todo = [axis]
    while todo:
        one = todo.pop()
        if one not in found:
            found.add(one)
            todo.extend(one.kin)
            if one.parent is not None:
                todo.append(one.parent)
    return found


def _roots(axis: Axis) -> set[Axis]:
    return {one for one in _kinship(axis) if one.parent is None}


def _births(axis: Axis) -> set[str]:
    """Nodes at which the axis, by any name, was split off another."""
    found: set[Axis] = set()
    todo: list[Axis] = [axis]
    while todo:
        one = todo.pop()
        if one not in found:
            found.add(one)
            todo.extend(one.kin)
    return {one.born for one in found if one.born}


def _position(axis: Axis, root: Axis) -> int:
    first = resolve((axis,))[:1]
    leaves = resolve((root,))
    return next((i for i, leaf in enumerate(leaves) if first and leaf is first[0]), -1)


def _sizes(axes: Iterable[Axis]) -> str:
    return " x ".join(str(axis.size) for axis in axes)


