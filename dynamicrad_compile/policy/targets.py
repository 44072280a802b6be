"""Whether a plan skips what it was meant to skip."""

from __future__ import annotations

from dataclasses import replace

from ..passes import PlannedSite
from ..plans.plan import ORDERS, BlockPlan

LACKING = 0.005
"""A target is reached where no more of it is lacking."""


def regime_plan(plan: BlockPlan, number: int) -> BlockPlan:
    """The plan of one regime alone."""
    own = slice(number, number + 1)
    weights = plan.compensate if len(plan.compensate) == 1 else plan.compensate[own]
    orders = {name: x if x is None or len(x) == 1 else x[own] for name in ORDERS for x in [getattr(plan, name)]}
    counts, indices = plan.kv_counts[own], plan.kv_indices[own]
    return replace(plan, kv_counts=counts, kv_indices=indices, compensate=weights, **orders, check_values=False)


def unreached(planned: PlannedSite) -> str:
    """Which target sparsity can't be reached on the grid, and what is; '' if all are."""
    if planned.spec is None:
        return ""
    table, found = planned.table, []
    for number, regime in enumerate(planned.spec.regimes):
        wanted = regime.sparsity if regime.criterion else getattr(regime.parameters, "sparsity", None)
        if wanted is None:  # by fixed thresholds, or a pattern without a budget
            continue
        plan = regime_plan(table.plan, number)
        if regime.criterion:  # a selection keeps what is forced
            plan = replace(plan, kv_counts=table.candidates.kv_forced[number : number + 1], check_values=False)
        if plan.sparsity < wanted - LACKING:
            found.append(f"{wanted:g} ({regime.name} motion) but {plan.sparsity:.3f}")
    if not found:
        return ""
    grid, plan = "x".join(map(str, planned.video.grid)), table.plan
    why = f"of {plan.num_kv_blocks} blocks of {plan.block_kv} tokens every row always reads some"
    if any(plan.compensate):
        why += ", and the means of dropped ones count: compensate=0 skips more"
    else:
        why += ": a smaller block_size can skip more"
    return f"the target sparsity is not reached over {grid}: not {', not '.join(found)}; {why}"
