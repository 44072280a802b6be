"""Say what each attention is: video self-attention over a grid, or something to leave alone, and why.

Before:  site.labels = sequence of the query and of the key as axes
After:   site.role, and for video self-attention site.grid = (frames, height, width) and site.text;
         site.reason is set where the site must stay dense

A sequence is video if exactly one of its pieces is the row-major product of three axes, frames first. Two axes
are an image or one frame, one axis is text or time: those stay dense. So does every doubt.
"""

from __future__ import annotations

import math

import torch
from torch import fx

from dynamicrad_compile.errors import GridError

from ._axes import Axis, Label, Part, coarsest, parts_of, resolve, same, same_part
from ._graph import shape_hint, value_of
from ._site import CROSS, OTHER_SELF, SPATIAL, TEMPORAL, VIDEO, PassContext, Site, TextTokens

MAX_HEAD_DIM = 256


def classify_sites(gm: fx.GraphModule, context: PassContext) -> int:
    """Fill role, grid, text and reason of every site; returns the number of video self-attentions.

    Raises GridError if the user's grid fits no sequence of the graph that could be video.
    """
    for site in context.sites:
        _classify(site, context.grid)
        if site.role == VIDEO and not site.reason:
            site.reason = unsupported(site)
    if context.grid is not None:
        _check_user_grid(context)
    return sum(site.role == VIDEO for site in context.sites)


def _classify(site: Site, user_grid: tuple[int, int, int] | None) -> None:
    if site.labels is None:
        site.reason = "the axis trace did not reach it (sizes depend on data)"
        return
    query, key = site.labels[0][-2], site.labels[1][-2]
    q_parts, k_parts = parts_of(query), parts_of(key)
    if not same(query, key):
        _classify_unequal(site, q_parts, k_parts, user_grid)
        return
    videos = _video_parts(q_parts, user_grid)
    if len(videos) == 1:
        _set_video(site, q_parts, videos[0], user_grid)
    elif videos:
        site.role, site.reason = VIDEO, f"{len(videos)} video segments in one sequence are not supported yet"
    else:
        _classify_gridless(site, query, q_parts)


def _set_video(site: Site, parts: tuple[Part, ...], at: int, user_grid: tuple[int, int, int] | None) -> None:
    traced = grid_of(parts[at].label)
    site.role = VIDEO
    site.grid = user_grid or traced
    site.grid_axes = () if user_grid else grid_axes(parts[at].label)
    site.text = TextTokens(sum(p.size for p in parts[:at]), sum(p.size for p in parts[at + 1 :]))
    axes = resolve(parts[at].label)
    conflicts = [axis.conflict for axis in axes if axis.conflict]
    if user_grid is None and conflicts:
        site.reason = conflicts[0]
    if user_grid and math.prod(user_grid) != parts[at].size:
        raise GridError(_grid_message(user_grid, parts[at].size, site))


def _classify_unequal(
    site: Site, q_parts: tuple[Part, ...], k_parts: tuple[Part, ...], user_grid: tuple[int, int, int] | None
) -> None:
    """Query and key sequences differ: cross-attention, or self-attention with extra keys."""
    videos = _video_parts(q_parts, user_grid)
    if any(any(same_part(q_parts[i], k) for k in k_parts) for i in videos):
        site.role, site.grid = VIDEO, grid_of(q_parts[videos[0]].label)
        site.reason = f"keys are {_length(k_parts)} tokens, queries {_length(q_parts)}: not supported yet"
        return
    site.role = CROSS
    site.reason = f"queries ({_length(q_parts)}) and keys ({_length(k_parts)}) are different tokens"


def _classify_gridless(site: Site, query: Label, parts: tuple[Part, ...]) -> None:
    """Self-attention over a sequence in which no grid was found."""
    assert site.labels is not None
    sequence = {axis for part in parts for axis in resolve(part.label)}
    inputs = {axis.source.node for axis in sequence if axis.source.kind == "input" and axis.source.rank >= 4}
    batch = [a for a in resolve(site.labels[0][0]) if a.source.node in inputs]
    if batch and sequence and all(axis.source.node in inputs for axis in sequence):
        frames_in_batch = min(a.source.dim for a in batch) < min(a.source.dim for a in sequence)
        site.role = SPATIAL if frames_in_batch else TEMPORAL
        missing = "frames are" if frames_in_batch else "height and width are"
        site.reason = f"{missing} in the batch: attention over {_length(parts)} tokens of {_describe(parts)}"
        return
    conflicts = [axis.conflict for axis in sequence if axis.conflict]
    site.role = OTHER_SELF
    site.reason = (
        conflicts[0] if conflicts else f"no frames x height x width in its {_length(parts)} tokens: {_describe(parts)}"
    )


def grid_axes(label: Label) -> Label:
    """Axes (frames, height, width) of a label that is their raster product, frames first; () if it is not."""
    axes = resolve(label)
    if len(axes) > 3:
        axes = coarsest(label)
    if len(axes) != 3 or len(set(axes)) != 3 or any(len(axis.parts or ()) > 1 for axis in axes):
        return ()
    dims = [axis.source.dim for axis in axes]
    if len({axis.source.node for axis in axes}) == 1 and axes[0].source.kind == "input" and dims != sorted(dims):
        return ()
    return axes


def grid_of(label: Label) -> tuple[int, int, int] | None:
    """(frames, height, width) of a label, in tokens; None if it is no grid."""
    axes = grid_axes(label)
    return (axes[0].size, axes[1].size, axes[2].size) if axes else None


def _video_parts(parts: tuple[Part, ...], user_grid: tuple[int, int, int] | None) -> list[int]:
    """Positions of the pieces that are a whole video."""
    traced = [i for i, part in enumerate(parts) if part.whole and grid_of(part.label)]
    if user_grid is None or traced:
        return traced
    return [i for i, part in enumerate(parts) if part.size == math.prod(user_grid)]


def unsupported(site: Site) -> str:
    """Why a video self-attention can't be replaced; '' if it can."""
    call = site.call
    shape = site.q_shape
    if shape is None or len(shape) != 4:
        return (
            f"the query has {len(shape) if shape else 'unknown'} dimensions; [batch, heads, tokens, head_dim] expected"
        )
    if shape[-1] > MAX_HEAD_DIM:
        return f"head_dim {shape[-1]} is larger than {MAX_HEAD_DIM}"
    value_shape = shape_hint(call.value)
    if value_shape is None or value_shape[-1] != shape[-1]:
        return f"values have another head_dim ({value_shape}) than queries ({shape})"
    if call.is_causal is not False:
        return "causal attention"
    if call.dropout_p not in (0, 0.0):
        return f"attention dropout ({call.dropout_p})"
    if call.mask is not None and not is_key_padding(call.mask):
        mask = value_of(call.mask)
        return f"mask {getattr(mask, 'dtype', '?')} {shape_hint(call.mask)} is not a key padding mask [B, 1, 1, S]"
    return ""


def is_key_padding(mask: fx.Node) -> bool:
    """Whether a mask is bool [B, 1, 1, S]: the same keys for every query."""
    value, shape = value_of(mask), shape_hint(mask)
    return (
        isinstance(value, torch.Tensor)
        and value.dtype == torch.bool
        and shape is not None
        and len(shape) == 4
        and shape[1:3] == (1, 1)
    )


def _check_user_grid(context: PassContext) -> None:
    """The user's grid must fit some sequence, unless the graph holds only much shorter ones (text)."""
    assert context.grid is not None
    if any(site.role == VIDEO for site in context.sites):
        return
    tokens = math.prod(context.grid)
    selfs = [s for s in context.sites if s.role in (OTHER_SELF, SPATIAL, TEMPORAL) and s.q_shape]
    longest = max(selfs, key=lambda s: s.q_shape[-2] if s.q_shape else 0, default=None)
    if longest is not None and longest.q_shape and 4 * longest.q_shape[-2] >= tokens:
        raise GridError(_grid_message(context.grid, longest.q_shape[-2], longest))


def _grid_message(grid: tuple[int, int, int], length: int, site: Site) -> str:
    shape = " x ".join(map(str, grid))
    return (
        f"grid {shape} = {math.prod(grid)} tokens does not fit the {length} video tokens of the attention at "
        f"{site.path or site.node.name}. Give the latent grid after patchifying (frames, height, width), "
        "or leave `grid` out to have it traced."
    )


def _length(parts: tuple[Part, ...]) -> int:
    return sum(part.size for part in parts)


def _describe(parts: tuple[Part, ...]) -> str:
    """Where the pieces of a sequence come from, for a reason."""

    def one(axis: Axis) -> str:
        return f"{axis.size} ({axis.source})"

    return " + ".join(" x ".join(one(a) for a in resolve(part.label)) or "1" for part in parts)
