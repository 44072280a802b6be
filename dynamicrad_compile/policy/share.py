"""What one of several processes needs of a plan: its heads, dealt by their work, and the rows of its queries.

All processes must decide alike, since they exchange with each other what they compute. So whether sparse attention
pays, and in which order heads are dealt, is decided on the plan of all of them.
"""

from __future__ import annotations

from dataclasses import replace

from ..parallel.balance import WITHIN, deal_heads, imbalance, work
from ..passes import PlannedSite
from ..plans.own import OwnPlan
from ..plans.shares import rows_of, shard_of, whole_blocks


def share_of(whole: PlannedSite, own: OwnPlan | None) -> tuple[PlannedSite, str]:
    """A site with what this process needs of its plan, and a line on how even that is; own: the option plan."""
    found, line = (whole, "") if own is None else _heads(whole, own)
    site = found.video
    if not site.shard or site.queries is None:
        return found, line
    if found.spec is not None:
        table, asked = shard_of(found.spec, site.grid, site.text, site.queries)
    else:
        asked = whole_blocks(site.queries, found.table.plan.block_q, site.keys)
        table = rows_of(found.table, asked)
    return replace(found, table=table, asked=asked), line


def _heads(whole: PlannedSite, own: OwnPlan) -> tuple[PlannedSite, str]:
    """A site with the rows of this process's heads, and a line on how even that is; whole: with those of all.

    The order is found from the blocks of the whole plan alone, so that all processes find the same, as they must.
    """
    site, table = whole.video, whole.table
    if site.peers is None or table.plan.kv_counts.shape[1] == 1:
        return whole, ""
    ranks, costs = site.peers.size, table.plan.kv_counts.sum((0, 2))
    before = imbalance(work(costs, ranks))
    order = deal_heads(costs, ranks).tolist()
    after = imbalance(work(costs, ranks, order))
    line = ""
    if site.exchange is None or after >= before:
        order = list(range(len(order)))
        if before > WITHIN:
            why = ", and the graph does not let them be dealt by work" if after < before else ""
            line = f"heads on {ranks} ranks as they come{why}: ranks differ by {before:.1%}"
    else:
        line = f"heads dealt to {ranks} ranks by work: ranks differ by {after:.1%} (as they come: {before:.1%})"
    share = own.heads(table, order[slice(*site.heads)])
    head_order = tuple(order) if order != sorted(order) else None
    return replace(whole, table=share, head_order=head_order), line
