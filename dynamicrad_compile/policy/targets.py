"""Whether a plan skips what it was meant to skip."""

from __future__ import annotations

from dataclasses import replace

from ..passes import PlannedSite

LACKING = 0.005
"""A target is reached where no more of it is lacking."""


def unreached(planned: PlannedSite) -> str:
    """Which target sparsity can't be reached on the grid, and what is; '' if all are."""
    if planned.spec is None:
        return ""
    table, found = planned.table, []
    for number, regime in enumerate(planned.spec.regimes):
        wanted = regime.sparsity if regime.criterion else getattr(regime.parameters, "sparsity", None)
        if wanted is None:  # by fixed thresholds, or a pattern without a budget
            continue
        plan = table.plan.one(number)
        if regime.criterion:  # a selection keeps what is forced
            plan = replace(plan, kv_counts=table.candidates.kv_forced[number : number + 1], check_values=False)
        if plan.sparsity < wanted - LACKING:
            found.append(f"{wanted:g} ({regime.name} motion) but {plan.sparsity:.3f}")
    found = list(dict.fromkeys(found))
    if not found:
        return ""
    grid, plan = "x".join(map(str, planned.video.grid)), table.plan
    why = f"of {plan.num_kv_blocks} blocks of {plan.block_kv} tokens every row always reads some"
    if any(plan.compensate):
        why += ", and the means of dropped ones count: compensate=0 skips more"
    else:
        why += ": a smaller block_size can skip more"
    return f"the target sparsity is not reached over {grid}: not {', not '.join(found)}; {why}"
