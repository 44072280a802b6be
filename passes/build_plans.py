"""Give each video self-attention its block plan.

Before:  context.videos
After:   context.planned, and a reason at each site that stays dense (too few tokens, first layers, ...)

What plan is wanted is decided by the caller (`context.decide`): options and profile are not known here.
"""

from __future__ import annotations

from torch import fx

from .context import Dense, PassContext


def build_plans(gm: fx.GraphModule, context: PassContext) -> int:
    """Fill `context.planned`; returns the number of plans."""
    context.decisions = context.decide(context.videos, context.conditions)
    for video, decision in zip(context.videos, context.decisions.sites, strict=True):
        if isinstance(decision, Dense):
            video.site.reason = decision.reason
        else:
            context.planned.append(decision)
    return len(context.planned)
