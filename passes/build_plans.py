"""Give each video self-attention its block plan.

Before:  site.role is video_self_attention with a grid and nothing against it
After:   site.plan, or a reason why the site stays dense (too few tokens, first layers, ...)

What plan is wanted is decided by the caller (`context.build_plan`, `context.plan_control`): options and profile are
not known here.
"""

from __future__ import annotations

from torch import fx

from dynamicrad_compile.plans.plan import BlockPlan
from dynamicrad_compile.plans.table import PlanTable

from .site import VIDEO, PassContext


def build_plans(gm: fx.GraphModule, context: PassContext) -> int:
    """Fill `site.plan`; returns the number of plans."""
    for site in context.sites:
        if site.role != VIDEO or site.reason:
            continue
        plan = context.build_plan(site)
        site.plan = PlanTable.of(plan) if isinstance(plan, BlockPlan) else plan
    context.control = context.plan_control(context.conditions)
    return sum(site.plan is not None for site in context.sites)
