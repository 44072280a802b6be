"""What an attention is in which no video was found, or more than one: its role, and the reason why it stays dense."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dynamicrad_compile.reporting.reason import IF_VIDEO, NOTHING, REPORT_MODEL, Reason

from ..axes.concatenation import apart, parts_of, within
from ..axes.grids import Grids
from ..axes.kinship import inputs
from ..axes.labels import Axis, Label, Part, resolve
from ..context import PassContext
from ..site import CROSS, OTHER_SELF, SPATIAL, TEMPORAL, VIDEO, Site, Trace

NO_VIDEO_KEYS = f"{NOTHING}: its keys are a prompt or another short sequence, not video"
ONE_FRAME = f"{NOTHING}: attention within one frame has no frames to skip"
ONE_PLACE = f"{NOTHING}: attention across frames at one place is short"


def behind_break(why: str, asked: int, read: int) -> Reason:
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


def several_videos(site: Site, parts: Sequence[Part], videos: Sequence[int], grids: Grids) -> None:
    """Several videos in a sequence, of which none is known to be the one that is denoised."""
    sizes = ", ".join("x".join(map(str, grids.size(parts[i].label) or ())) for i in videos)
    site.role = VIDEO
    text = f"{len(videos)} videos in one sequence ({sizes}): which one is being denoised is not certain"
    site.reason = Reason("several_videos", text, REPORT_MODEL)


def classify_unequal(site: Site, trace: Trace, context: PassContext, grids: Grids) -> None:
    """Query and key sequences differ: cross-attention, self-attention with extra keys, or that is open."""
    q_parts, k_parts = parts_of(trace.query[-2]), parts_of(trace.key[-2])
    asked, read = length(q_parts), length(k_parts)
    found = [i for i, part in enumerate(q_parts) if any(within(part, k) for k in k_parts)]
    videos = [i for i in video_parts(q_parts, context.grid, grids) if i in found]
    if videos or (q_parts and len(found) == len(q_parts)):
        site.role, site.grid = (VIDEO, grids.size(q_parts[videos[0]].label)) if videos else (OTHER_SELF, None)
        text = f"its {asked} queries are arranged as some of its {read} keys; that they are the same tokens is unknown"
        site.reason = Reason("more_keys", text, REPORT_MODEL)
    elif trace.starts or (trace.same_tokens and not any(apart(a, b) for a in q_parts for b in k_parts)):
        site.reason = arranged_otherwise(trace, asked, read)
    elif read > 1 and all(any(within(k, q) for q in q_parts) for k in k_parts):
        site.role = OTHER_SELF
        text = f"its {read} keys are arranged as some of its {asked} queries"
        site.reason = Reason("some_keys", text, f"{NOTHING}: it reads few keys")
    elif trace.overlap and not any(apart(a, b) for a in q_parts for b in k_parts):
        site.reason = arranged_otherwise(trace, asked, read)
    elif trace.given and read > asked:
        site.reason = behind_break(context.continues, asked, read)
    else:
        site.role = CROSS
        text = f"queries ({asked}) and keys ({read}) are different tokens"
        site.reason = Reason("other_tokens", text, NO_VIDEO_KEYS)


def arranged_otherwise(trace: Trace, asked: int, read: int) -> Reason:
    """Why queries that are tokens of the keys, or in part may be, are left alone."""
    are = "are" if trace.starts or trace.same_tokens else "may in part be"
    text = f"its {asked} queries {are} tokens of its {read} keys; that they are arranged alike is unknown"
    return Reason("arranged_otherwise", text, REPORT_MODEL)


def classify_gridless(site: Site, trace: Trace, parts: tuple[Part, ...], grids: Grids) -> None:
    """Self-attention over a sequence in which no grid was found."""
    sequence = {axis for part in parts for axis in resolve(part.label)}
    split = _split_between(resolve(trace.query[0]), sequence)
    if split:
        rest = f"in the batch: attention over {length(parts)} tokens of {_describe(parts)}"
        if split == "frames":
            site.role, site.reason = SPATIAL, Reason("frames_in_batch", f"frames are {rest}", ONE_FRAME)
        else:
            site.role, site.reason = TEMPORAL, Reason("places_in_batch", f"height and width are {rest}", ONE_PLACE)
        return
    known = [axis.conflict or axis.why for axis in sequence] + [grids.why_none(part.label) for part in parts]
    site.role = OTHER_SELF
    text = f"no frames x height x width in its {length(parts)} tokens: {_describe(parts)}"
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


def video_parts(parts: tuple[Part, ...], user_grid: tuple[int, int, int] | None, grids: Grids) -> list[int]:
    """Positions of the pieces that are a whole video."""
    traced = [i for i, part in enumerate(parts) if part.whole and grids.size(part.label)]
    if user_grid is None or traced:
        return traced
    return [i for i, part in enumerate(parts) if part.size == math.prod(user_grid)]


def length(parts: Sequence[Part]) -> int:
    """Tokens of some pieces."""
    return sum(part.size for part in parts)


def describe(sequence: Label) -> str:
    """Where the pieces of a sequence come from."""
    return _describe(parts_of(sequence))


def _describe(parts: tuple[Part, ...]) -> str:

    def one(axis: Axis) -> str:
        return f"{axis.size} ({axis.source})"

    return " + ".join(" x ".join(one(a) for a in resolve(part.label)) or "1" for part in parts)
