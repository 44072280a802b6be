"""Masks that hide other keys from some queries than from others, where the graph makes them of numbers alone.

A block-causal mask lets the queries of a chunk of frames read the keys up to the end of that chunk. Queries that read
the same keys are a group: their attention is one without a mask, over these keys (see writing/chunks.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import _disable_current_modes

from dynamicrad_compile.plans.layout import MIN_FRAMES
from dynamicrad_compile.reporting.reason import NOTHING, REPORT_MODEL, Reason

from ..axes.positions import table_of
from ..graph import shape_hint
from ..operators.rules import masks
from ..operators.table import operator_of
from ..site import VIDEO, Group, Site, TextTokens
from ..values.runs import Runs, coarse
from .hiding import HIDDEN
from .known_values import KnownValues
from .layout import plain_shape
from .masks import not_key_padding
from .writes import is_rewritten

MAX_GROUPS = 64
"""Groups that are computed one by one: each is a launch of its own. No more than frames, and two for text."""


@dataclass(frozen=True)
class MaskGroups:
    """The groups of a mask.

    groups  none where there are more than MAX_GROUPS
    number  of groups
    value   the mask
    sizes   the symbolic sizes that it was computed for
    """

    groups: tuple[Group, ...]
    number: int
    value: Runs
    sizes: tuple[torch.SymInt, ...]


class Masks:
    """Reads the masks of one graph; a mask that many layers have is read once."""

    def __init__(self) -> None:
        self._known = KnownValues()
        self._found: dict[tuple[Any, ...], MaskGroups | None] = {}

    def obey(self, site: Site) -> Reason | None:
        """Why the mask of a video self-attention keeps it dense; None if it only hides keys, or gives it chunks."""
        call = site.call
        if call.mask is None or site.kv_length is None:
            return None
        padding = not_key_padding(call, site.kv_length)
        found = self._groups_of(site) if padding else None
        if found is None:
            return padding
        described = f"mask {list(shape_hint(call.mask) or ())} hides other keys from some queries than from others"
        most = min(MAX_GROUPS, (site.grid[0] if site.grid else 0) + 2)
        if found.number > most:
            text = f"{described}, {found.number} times; for these frames at most {most} are computed one by one"
            return Reason("mask_groups", text, f"{NOTHING}: it is a mask of the model itself")
        if not all(group.keys for group in found.groups):
            return Reason("mask_hides_all", f"{described}, and all keys from some", REPORT_MODEL)
        if table_of(site.grid_axes) is not None:
            text = f"{described}, and its grid, read from values of an input, may change from call to call"
            return Reason("mask_and_table", text, REPORT_MODEL)
        site.chunks = tuple(_chunk(site, group) for group in found.groups)
        site.mask_sizes = found.sizes
        return None

    def _groups_of(self, site: Site) -> MaskGroups | None:
        """Groups of a site's queries by the keys that its mask lets them read; None where that is not known."""
        call, queries, keys = site.call, plain_shape(site.call, 0), plain_shape(site.call, 1)
        assert call.mask is not None
        mask = _unrepeated(call.mask)
        value, sizes = self._known.of(mask, site.node)
        if value is None or queries is None or keys is None or not 2 <= value.dim() <= len(call.mask_layout):
            return None
        letters = call.mask_layout[-value.dim() :]
        shown = dict(zip(letters, value.shape, strict=True))
        if (shown.get("q"), shown.get("k")) != (queries[2], keys[2]):
            return None
        key = (id(value), letters, call.mask_is)
        if key not in self._found:
            with _disable_current_modes():
                self._found[key] = _groups(value, letters, call.mask_is, sizes)
        return self._found[key]


def _unrepeated(mask: fx.Node) -> fx.Node:
    """The mask before it was repeated for samples or heads: their number need not be known."""
    while operator_of(mask).mask is masks.repeat and not is_rewritten(mask):
        base, shape = mask.args[0], shape_hint(mask)
        inner = shape_hint(base) if isinstance(base, fx.Node) else None
        if not isinstance(base, fx.Node) or shape is None or inner is None or inner[-2:] != shape[-2:]:
            break
        if is_rewritten(base):
            break
        mask = base
    return mask


def _groups(value: Runs, letters: str, mask_is: str, sizes: tuple[torch.SymInt, ...]) -> MaskGroups | None:
    """The groups of a mask with these dimensions; None where it differs by sample or head, or does more than hide."""
    if any(len(end) != 1 for letter, end in zip(letters, value.ends, strict=True) if letter in "bh"):
        return None
    ends = [value.ends[letters.index(letter)] for letter in "qk"]
    kept = value.values.movedim([letters.index(letter) for letter in "qk"], (0, 1)).reshape(*map(len, ends))
    if mask_is == "drop":
        kept = ~kept
    elif kept.dtype != torch.bool:
        if mask_is != "bias" or not ((kept == 0) | (kept <= HIDDEN)).all():
            return None
        kept = kept == 0
    keep = coarse(kept, ends)
    rows, columns = (_ranges(end) for end in keep.ends)
    if len(rows) > MAX_GROUPS:
        return MaskGroups((), len(rows), value, sizes)
    groups = [
        Group(span, _glued([column for column, is_kept in zip(columns, row, strict=True) if is_kept]))
        for span, row in zip(rows, keep.values.tolist(), strict=True)
    ]
    return MaskGroups(tuple(groups), len(groups), value, sizes)


def _ranges(ends: torch.Tensor) -> list[tuple[int, int]]:
    stops = ends.tolist()
    return list(zip([0, *stops], stops, strict=False))


def _glued(ranges: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    out: list[tuple[int, int]] = []
    for start, stop in ranges:
        if out and out[-1][1] == start:
            out[-1] = (out[-1][0], stop)
        else:
            out.append((start, stop))
    return tuple(out)


def _chunk(site: Site, group: Group) -> Site:
    """The site of a group: its grid is that of the whole frames in the range of keys that holds its queries.

    Its other keys are read by all of them, as text is.
    """
    assert site.q_shape is not None
    assert site.grid is not None
    (first, last), shift = group.rows, site.queries[0] if site.queries else 0
    asked = (first + shift, last + shift)
    batch, heads, _, dim = site.q_shape
    keys = sum(stop - start for start, stop in group.keys)
    chunk = Site(site.node, site.call, site.path, (batch, heads, last - first, dim), keys)
    chunk.trace, chunk.role, chunk.group, chunk.of = site.trace, VIDEO, group, site
    frames, height, width = site.grid
    size, before = height * width, 0
    for start, stop in group.keys:
        if start <= asked[0] and asked[1] <= stop:
            origin = site.text.before
            low = max(0, -((origin - start) // size))
            high = min(frames, (stop - origin) // size)
            if high - low >= MIN_FRAMES:
                chunk.grid = (high - low, height, width)
                in_front = before + origin + low * size - start
                chunk.text = TextTokens(in_front, keys - in_front - (high - low) * size)
                queries = (before + asked[0] - start, before + asked[1] - start)
                chunk.queries = queries if queries != (0, keys) else None
                return chunk
        before += stop - start
    text = "its mask lets these queries read fewer than three frames with their own"
    chunk.reason = Reason("few_frames_read", text, f"{NOTHING}: so few frames have no motion for a plan to follow")
    return chunk
