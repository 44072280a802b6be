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
from dynamicrad_compile.reporting.reason import IF_VIDEO, KEEP_ORDER, NOTHING, REPORT_MODEL, Reason

from .axes.among import asked_keys, cut, frames_apart, overlaps, with_earlier
from .axes.concatenation import apart, parts_of, same, segments_of, within
from .axes.grids import Grids
from .axes.kinship import inputs
from .axes.labels import Axis, Label, Part, label_size, mixed, resolve
from .axes.positions import is_read_at_run_time
from .axes.windows import windows
from .graph import value_of
from .reading.mask_groups import Masks
from .reading.sharding import exchanged
from .reading.support import UNRECORDED, few_frames, unsupported
from .reading.user_grid import check_fit, check_user_grid, grid_message
from .site import (
    CROSS,
    OTHER_SELF,
    SPATIAL,
    TEMPORAL,
    UNKNOWN,
    VIDEO,
    PassContext,
    Site,
    TextTokens,
    Trace,
    VideoSite,
)

NO_VIDEO_KEYS = f"{NOTHING}: its keys are a prompt or another short sequence, not video"
ONE_FRAME = f"{NOTHING}: attention within one frame has no frames to skip"
ONE_PLACE = f"{NOTHING}: attention across frames at one place is short"


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
    query = value_of(site.call.query)
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
        site.reason = exchanged(site.call)
        if site.reason:
            return
    unknown = trace.given and not (alike and trace.same_tokens)
    if unknown and label_size(query) == label_size(key):
        padded_alike = [part.size for part in parts_of(query)] == [part.size for part in parts_of(key)]
        vouched = (user_grid and padded_alike) or (alike and context.continues)
        if not (vouched and _video_parts(parts, user_grid, grids)):
            site.reason = _given(context.continues, _length(parts), _length(parts))
            return
    elif not alike:
        site.queries = asked_keys(query, key, trace.starts)
        if why and site.queries is None:  # nothing is proven of them: no prompt, either
            site.reason = replace(why, advice=REPORT_MODEL)
        elif site.queries is None:
            _classify_unequal(site, trace, context, grids)
        else:
            _classify_among(site, trace, site.queries, context, grids)
        return
    elif not trace.same_tokens:
        site.role = CROSS
        text = f"queries and keys are different tokens ({_length(parts)}) in the same arrangement"
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
    videos = _video_parts(parts, user_grid, grids)
    chosen = videos[0] if len(videos) == 1 and not joined else grids.denoised(parts, videos)
    if chosen is not None:
        _set_video(site, parts, chosen, context, grids)
    elif videos:
        _several_videos(site, parts, videos, grids)
    else:
        _classify_gridless(site, trace, parts, grids)


def _pieces(sequence: Label, site: Site) -> tuple[Part, ...]:
    """The pieces of a sequence; where its sizes are fixed, some frames of a video are a video of their own."""
    sizes = [size for n in (site.call.query, site.call.key) for size in value_of(n).shape]
    parts = segments_of(sequence)
    return frames_apart(parts) if all(isinstance(size, int) for size in sizes) else parts


def _given(why: str, asked: int, read: int) -> Reason:
    """Why queries and keys that come from outside are left alone, where neither a grid nor a table vouches for them.

    why  the graph goes on where another one ended; "" where it does not
    """
    where, cure = "come from other graphs", "mend the graph break"
    if not why:
        where, cure = "are inputs of the graph", "compile what computes them together with it"
    sizes = f"queries and keys ({asked})" if asked == read else f"queries ({asked}) and keys ({read})"
    text = f"its {sizes} {where}, so that nothing tells whose tokens they are{why and ': '}{why}"
    believed = "set `grid` if it is the video's self-attention, or " if asked == read else ""
    return Reason("behind_graph_break", text, f"{believed}{cure}")


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
    return TextTokens(_length(parts[:at]), _length(parts[at + 1 :]))


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
    videos = [i for i in _video_parts(parts, None, grids) if overlaps(parts, i, asked)]
    joined = parts_of(trace.key[-2])
    with_cache = [
        i for i, p in enumerate(joined) if p.whole and grids.is_one_video(p.label) and overlaps(joined, i, asked)
    ]
    if with_cache and (user_grid is None or math.prod(user_grid) == joined[with_cache[0]].size):
        parts, videos = joined, with_cache
    if not videos:
        parts = cut(trace.key[-2], asked)
        videos = [i for i in _video_parts(parts, user_grid, grids) if overlaps(parts, i, asked)]
    chosen = videos[0] if len(videos) == 1 else grids.denoised(parts, videos)
    if user_grid and (chosen is None or parts[chosen].size != math.prod(user_grid)):
        pieces = cut(trace.key[-2], asked)
        span = with_earlier(pieces, asked, user_grid, [grids.size(p.label) if p.whole else None for p in pieces])
        if span is not None:
            site.role, site.grid = VIDEO, user_grid
            site.text = TextTokens(span[0], _length(parts) - span[1])
            return
        if chosen is not None:
            raise GridError(grid_message(user_grid, parts[chosen].size, site) + f" {_or_all_keys(_length(parts))}")
    if chosen is None and videos:
        _several_videos(site, parts, videos, grids)
    elif chosen is None:
        _classify_gridless(site, trace, _pieces(trace.query[-2], site), grids)
    else:
        _set_video(site, parts, chosen, context, grids)
        if site.reason and site.reason.code == "few_frames" and sum(site.text):
            text = f"only {site.grid[0] if site.grid else 0} frames ask, and nothing is known of the other keys"
            site.reason = Reason(
                "few_frames_ask", text, f"set `grid` if they are a video. {_or_all_keys(_length(parts))}"
            )


def _or_all_keys(keys: int) -> str:
    return f"Where they are the last frames of its {keys} keys, as behind a cache, `grid` may be that of all frames."


def _several_videos(site: Site, parts: Sequence[Part], videos: Sequence[int], grids: Grids) -> None:
    sizes = ", ".join("x".join(map(str, grids.size(parts[i].label) or ())) for i in videos)
    site.role = VIDEO
    text = f"{len(videos)} videos in one sequence ({sizes}): which one is being denoised is not certain"
    site.reason = Reason("several_videos", text, REPORT_MODEL)


def _may_grow(axes: Label, context: PassContext) -> bool:
    """Whether few frames of a grid may be many when the graph runs again."""
    return is_read_at_run_time(axes) or isinstance(context.size_of(axes[0]), torch.SymInt)


def _classify_unequal(site: Site, trace: Trace, context: PassContext, grids: Grids) -> None:
    """Query and key sequences differ: cross-attention, self-attention with extra keys, or that is open."""
    q_parts, k_parts = parts_of(trace.query[-2]), parts_of(trace.key[-2])
    asked, read = _length(q_parts), _length(k_parts)
    found = [i for i, part in enumerate(q_parts) if any(within(part, k) for k in k_parts)]
    videos = [i for i in _video_parts(q_parts, context.grid, grids) if i in found]
    if videos or (q_parts and len(found) == len(q_parts)):
        site.role, site.grid = (VIDEO, grids.size(q_parts[videos[0]].label)) if videos else (OTHER_SELF, None)
        text = f"its {asked} queries are arranged as some of its {read} keys; that they are the same tokens is unknown"
        site.reason = Reason("more_keys", text, REPORT_MODEL)
    elif trace.starts or (trace.same_tokens and not any(apart(a, b) for a in q_parts for b in k_parts)):
        text = f"its {asked} queries are tokens of its {read} keys; that they are arranged alike is unknown"
        site.reason = Reason("arranged_otherwise", text, REPORT_MODEL)
    elif read > 1 and all(any(within(k, q) for q in q_parts) for k in k_parts):
        site.role = OTHER_SELF
        text = f"its {read} keys are arranged as some of its {asked} queries"
        site.reason = Reason("some_keys", text, f"{NOTHING}: it reads few keys")
    elif trace.given and read > asked:
        site.reason = _given(context.continues, asked, read)
    else:
        site.role = CROSS
        text = f"queries ({asked}) and keys ({read}) are different tokens"
        site.reason = Reason("other_tokens", text, NO_VIDEO_KEYS)


def _classify_gridless(site: Site, trace: Trace, parts: tuple[Part, ...], grids: Grids) -> None:
    """Self-attention over a sequence in which no grid was found."""
    sequence = {axis for part in parts for axis in resolve(part.label)}
    split = _split_between(resolve(trace.query[0]), sequence)
    if split:
        rest = f"in the batch: attention over {_length(parts)} tokens of {_describe(parts)}"
        if split == "frames":
            site.role, site.reason = SPATIAL, Reason("frames_in_batch", f"frames are {rest}", ONE_FRAME)
        else:
            site.role, site.reason = TEMPORAL, Reason("places_in_batch", f"height and width are {rest}", ONE_PLACE)
        return
    known = [axis.conflict or axis.why for axis in sequence] + [grids.why_none(part.label) for part in parts]
    site.role = OTHER_SELF
    text = f"no frames x height x width in its {_length(parts)} tokens: {_describe(parts)}"
    no_grid = Reason("no_grid", text, f"{NOTHING} if these are text or an image; {IF_VIDEO}")
    site.reason = next((why for why in known if why), no_grid)


def _split_between(batch: Label, sequence: set[Axis]) -> str:
    """What of one input is in the batch while the rest of it is in the sequence: "frames", "places", or "" for none."""
    for node in sorted({source.node for axis in sequence for source in inputs(axis) if source.rank >= 4}):
        dims = [{s.dim for s in inputs(axis) if s.node == node} for axis in sequence]
        outer = {s.dim for axis in batch for s in inputs(axis) if s.node == node and (s.dim or s.rank == 4)}
        if outer and all(dims):
            return "frames" if min(outer) < min(map(min, dims)) else "places"
    return ""


def _video_parts(parts: tuple[Part, ...], user_grid: tuple[int, int, int] | None, grids: Grids) -> list[int]:
    """Positions of the pieces that are a whole video."""
    traced = [i for i, part in enumerate(parts) if part.whole and grids.size(part.label)]
    if user_grid is None or traced:
        return traced
    return [i for i, part in enumerate(parts) if part.size == math.prod(user_grid)]


def _length(parts: Sequence[Part]) -> int:
    return sum(part.size for part in parts)


def describe(sequence: Label) -> str:
    """Where the pieces of a sequence come from."""
    return _describe(parts_of(sequence))


def _describe(parts: tuple[Part, ...]) -> str:

    def one(axis: Axis) -> str:
        return f"{axis.size} ({axis.source})"

    return " + ".join(" x ".join(one(a) for a in resolve(part.label)) or "1" for part in parts)
