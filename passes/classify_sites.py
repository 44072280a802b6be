"""Say what each attention is: video self-attention over a grid, or something to leave alone, and why.

Before:  site.trace = sequence of the query and of the key as axes
After:   site.role, and for video self-attention site.grid = (frames, height, width) and site.text;
         site.reason is set where the site must stay dense; context.videos are those that need not

A sequence is video if one of its pieces is the row-major product of three axes, frames first. Two axes are an image
or one frame, one axis is text or time: those stay dense. Of several videos (a history before the video that is being
denoised) it is the one that the graph gives back; the others are extra tokens, as text is. Every doubt stays dense.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import fx

from dynamicrad_compile.errors import GridError
from dynamicrad_compile.plans.layout import MIN_FRAMES, Range
from dynamicrad_compile.reporting.reason import KEEP_ORDER, REPORT_MODEL, Reason

from .axes.among import asked_keys, cut, frames_apart, overlaps, with_earlier
from .axes.concatenation import parts_of, same, segments_of
from .axes.grids import Grids
from .axes.labels import Label, Part, label_size, mixed, resolve
from .axes.positions import is_of_shard, is_read_at_run_time
from .axes.windows import windows
from .context import PassContext
from .graph import value_of
from .reading.heads import head_exchange
from .reading.mask_groups import Masks
from .reading.not_video import (
    NO_VIDEO_KEYS,
    arranged_otherwise,
    behind_break,
    classify_gridless,
    classify_unequal,
    length,
    several_videos,
    video_parts,
)
from .reading.sharding import exchanged, heads_among
from .reading.support import UNRECORDED, few_frames, unsupported
from .reading.user_grid import check_fit, check_user_grid, grid_message
from .site import CROSS, OTHER_SELF, UNKNOWN, VIDEO, Site, TextTokens, Trace, VideoSite


def classify_sites(gm: fx.GraphModule, context: PassContext) -> int:
    """Fill role, grid, text and reason of every site; returns the number of video self-attentions.

    Raises GridError if the user's grid fits no sequence of the graph that could be video, or none that is shows it.
    """
    grids, misfits, masks = Grids(gm, context.node_labels), list[GridError](), Masks()
    for site in context.sites:
        try:
            _classify(site, context, grids)
        except GridError as error:
            misfits.append(error)
            site.role, site.grid, site.grid_axes = UNKNOWN, None, ()
            site.reason = Reason("grid_contradicted", str(error), KEEP_ORDER)
        if site.call.refusal and site.role in (VIDEO, OTHER_SELF, UNKNOWN):
            site.reason = site.call.refusal
        if site.role == VIDEO and not site.reason:
            site.reason = unsupported(site) or masks.obey(site)
        if site.role == VIDEO and not site.reason:
            videos = [_video_site(one) for one in site.chunks or (site,) if not one.reason]
            if None in videos:
                site.reason = UNRECORDED
            context.videos += [video for video in videos if video is not None]
    if context.grid is not None:
        check_user_grid(context.grid, context.sites, misfits)
    return sum(site.role == VIDEO for site in context.sites)


def _video_site(site: Site) -> VideoSite | None:
    """The site with what is known of every video."""
    if site.trace is None or site.grid is None or site.q_shape is None or len(site.q_shape) != 4:
        return None
    batch, heads, tokens, dim = site.q_shape
    query, peers = value_of(site.call.query), heads_among(site.call)
    agreed = None if is_of_shard(site.grid_axes) else peers  # else some may read no grid from their rows of a table
    return VideoSite(
        site=site,
        grid=site.grid,
        text=site.text,
        shape=(batch, heads, tokens, dim),
        dtype=site.call.dtype or query.dtype,
        device=query.device,
        trace=site.trace,
        axes=site.grid_axes,
        queries=site.queries,
        shard=site.queries is not None and any(axis.shard for axis in resolve(site.trace.query[-2])),
        peers=peers,
        exchange=None if agreed is None else head_exchange(site, agreed),
    )


def _classify(site: Site, context: PassContext, grids: Grids) -> None:
    trace, user_grid = site.trace, context.grid
    if trace is None:
        site.reason = Reason(
            "not_traced",
            "the axis trace did not reach it (sizes depend on data)",
            "see the report's notes for the operation that could not be traced; option `dump` writes the graph",
        )
        return
    query, key = trace.query[-2], trace.key[-2]
    parts, alike = _pieces(query, site), same(query, key)
    why = mixed(query) or mixed(key)
    if why and label_size(query) == label_size(key):
        if user_grid and context.override_grid and math.prod(user_grid) == label_size(query):
            _set_video(site, (Part(query, 0, label_size(query)),), 0, context, grids)
        else:
            site.reason = why
        return
    if not alike:
        site.reason = exchanged(site.call, query, key)
        if site.reason:
            return
    unknown = trace.given and not (alike and trace.same_tokens)
    if unknown and label_size(query) == label_size(key):
        padded_alike = [part.size for part in parts_of(query)] == [part.size for part in parts_of(key)]
        vouched = (user_grid and padded_alike) or (alike and context.continues)
        if not (vouched and video_parts(parts, user_grid, grids)):
            site.reason = behind_break(context.continues, length(parts), length(parts))
            return
    elif not alike:
        site.queries = asked_keys(query, key, trace.starts)
        if why and site.queries is None:  # nothing is proven of them: no prompt, either
            site.reason = replace(why, advice=REPORT_MODEL)
        elif site.queries is None:
            classify_unequal(site, trace, context, grids)
        else:
            _classify_among(site, trace, site.queries, context, grids)
        return
    elif trace.overlap and not trace.same_tokens:
        site.reason = arranged_otherwise(trace, length(parts), length(parts))
        return
    elif not trace.same_tokens:
        site.role = CROSS
        text = f"queries and keys are different tokens ({length(parts)}) in the same arrangement"
        site.reason = Reason("other_tokens_alike", text, NO_VIDEO_KEYS)
        return
    windowed = windows(trace.query[0], query)
    if windowed:
        site.role, site.reason = OTHER_SELF, windowed
        return
    joined = [part for part in parts_of(query) if part.whole and grids.joined_axes(part.label)]
    if joined and grids.given_back(grids.joined_axes(joined[0].label)):
        parts = parts_of(query)
        _set_video(site, parts, parts.index(joined[0]), context, grids)
        return
    videos = video_parts(parts, user_grid, grids)
    chosen = videos[0] if len(videos) == 1 and not joined else grids.denoised(parts, videos)
    if chosen is not None:
        _set_video(site, parts, chosen, context, grids)
    elif videos:
        several_videos(site, parts, videos, grids)
    else:
        classify_gridless(site, trace, parts, grids)


def _pieces(sequence: Label, site: Site) -> tuple[Part, ...]:
    """The pieces of a sequence; where its sizes are fixed, some frames of a video are a video of their own."""
    sizes = [size for n in (site.call.query, site.call.key) for size in value_of(n).shape]
    parts = segments_of(sequence)
    return frames_apart(parts) if all(isinstance(size, int) for size in sizes) else parts


def _set_video(site: Site, parts: tuple[Part, ...], at: int, context: PassContext, grids: Grids) -> None:
    user_grid = context.grid
    axes = grids.axes(parts[at].label) or grids.joined_axes(parts[at].label)
    sizes = (axes[0].size, axes[1].size, axes[2].size) if axes else None
    conflicts = [axis.conflict for axis in resolve(parts[at].label) if axis.conflict]
    site.role = VIDEO
    site.grid = user_grid or sizes
    # A grid that is the traced one follows the graph as that does: other sizes, and what a table shows.
    site.grid_axes = axes if site.grid == sizes and not (user_grid and conflicts) else ()
    site.text = _around(parts, at)
    if user_grid:
        check_fit(context, parts[at], site, grids)
        site.reason = None if context.override_grid else grids.disorder(parts[at].label)
    elif conflicts:
        site.reason = conflicts[0]
    elif grids.unproven(axes):
        site.reason = grids.unproven(axes)
    elif axes[0].size < MIN_FRAMES and not _may_grow(axes, context):
        site.reason = few_frames(axes[0].size)
        if len(axes[0].parts or ()) == 1:  # of a longer video
            site.role = OTHER_SELF


def _around(parts: Sequence[Part], at: int) -> TextTokens:
    """Tokens before and after a piece."""
    return TextTokens(length(parts[:at]), length(parts[at + 1 :]))


def _classify_among(site: Site, trace: Trace, asked: Range, context: PassContext, grids: Grids) -> None:
    """Self-attention whose queries are some of its keys: the video behind a prompt, frames behind a cache of others.

    Keys that are not on the grid, as those of a cache of which nothing is known, are read by all queries. The user's
    grid may be that of the queries' video, or of all frames that end with it.
    """
    windowed = windows(trace.query[0], trace.query[-2])
    if windowed:
        site.role, site.reason = OTHER_SELF, windowed
        return
    user_grid, parts = context.grid, _pieces(trace.key[-2], site)
    if any(axis.shard for axis in resolve(trace.query[-2])):  # all processes say the same, also one that has text alone
        asked = (0, length(parts))
    videos = [i for i in video_parts(parts, None, grids) if overlaps(parts, i, asked)]
    joined = parts_of(trace.key[-2])
    with_cache = [
        i for i, p in enumerate(joined) if p.whole and grids.is_one_video(p.label) and overlaps(joined, i, asked)
    ]
    if with_cache and (user_grid is None or math.prod(user_grid) == joined[with_cache[0]].size):
        parts, videos = joined, with_cache
    if not videos:
        parts = cut(trace.key[-2], asked)
        videos = [i for i in video_parts(parts, user_grid, grids) if overlaps(parts, i, asked)]
    chosen = videos[0] if len(videos) == 1 else grids.denoised(parts, videos)
    if user_grid and (chosen is None or parts[chosen].size != math.prod(user_grid)):
        pieces = cut(trace.key[-2], asked)
        span = with_earlier(pieces, asked, user_grid, [grids.size(p.label) if p.whole else None for p in pieces])
        if span is not None:
            site.role, site.grid = VIDEO, user_grid
            site.text = TextTokens(span[0], length(parts) - span[1])
            return
        if chosen is not None:
            raise GridError(grid_message(user_grid, parts[chosen].size, site) + f" {_or_all_keys(length(parts))}")
    if chosen is None and videos:
        several_videos(site, parts, videos, grids)
    elif chosen is None:
        classify_gridless(site, trace, _pieces(trace.query[-2], site), grids)
    else:
        _set_video(site, parts, chosen, context, grids)
        if site.reason and site.reason.code == "few_frames" and sum(site.text):
            text = f"only {site.grid[0] if site.grid else 0} frames ask, and nothing is known of the other keys"
            site.reason = Reason(
                "few_frames_ask", text, f"set `grid` if they are a video. {_or_all_keys(length(parts))}"
            )


def _or_all_keys(keys: int) -> str:
    return f"Where they are the last frames of its {keys} keys, as behind a cache, `grid` may be that of all frames."


def _may_grow(axes: Label, context: PassContext) -> bool:
    """Whether few frames of a grid may be many when the graph runs again."""
    return is_read_at_run_time(axes) or isinstance(context.size_of(axes[0]), torch.SymInt)
