"""The passes, in order. Each is `(graph module, context) -> count` and lives in a file of its own.

gather_ring         an attention over all keys beside each that context parallelism unrolled
find_attention      every attention call becomes a site
trace_grid          what each site's sequence is made of
decode_positions    the same from the values of a RoPE table, where no shape shows it
classify_sites      video self-attention or not, and why not
find_conditions     timestep and prompt among the inputs
build_plans         which blocks are kept
replace_attention   the rewrite

All but the last only look; a graph in which nothing is replaced is handed on as it came. Checkpointed layers and
nested regions are opened for the passes and closed again (see writing/checkpoints).
"""

from __future__ import annotations

import time

from torch import fx

from .build_plans import build_plans
from .classify_sites import classify_sites
from .context import Conditions, Control, Decisions, Dense, Earlier, Pass, PassContext, Seen
from .decode_positions import decode_positions
from .find_attention import find_attention
from .find_conditions import find_conditions
from .gather_ring import gather_ring
from .reading.support import few_frames
from .replace_attention import replace_attention
from .site import AttentionCall, PlannedSite, Site, TextTokens, VideoSite
from .trace_grid import trace_grid
from .writing.checkpoints import close_regions, open_regions

PASSES: tuple[Pass, ...] = (
    gather_ring,
    find_attention,
    trace_grid,
    decode_positions,
    classify_sites,
    find_conditions,
    build_plans,
    replace_attention,
)

__all__ = [
    "PASSES",
    "AttentionCall",
    "Conditions",
    "Control",
    "Decisions",
    "Dense",
    "Earlier",
    "PassContext",
    "PlannedSite",
    "Seen",
    "Site",
    "TextTokens",
    "VideoSite",
    "few_frames",
    "run_passes",
]


def run_passes(gm: fx.GraphModule, context: PassContext) -> int:
    """Run all passes on a graph, in place; returns the number of replaced sites.

    Raises GridError if the user's grid does not fit, or the graph shows another one.
    """
    context.watch("captured", gm, context)
    regions = open_regions(gm)
    count = 0
    for step in PASSES:
        start = time.perf_counter()
        count = step(gm, context)
        context.seconds[step.__name__] = time.perf_counter() - start
        context.watch(step.__name__, gm, context)
    close_regions(gm, regions, context.training)
    if regions:
        context.watch("regions_closed", gm, context)
    if count or regions:
        gm.graph.lint()
        gm.recompile()
    return count
