"""The attentions of a report, and what each rank of a mesh has to do of them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from ..kernels.blocks import cdiv
from ..plans.plan import BlockPlan
from ..reporting.report import SiteReport
from . import balance

DENSE_BLOCK = 128
"""Block size in tokens by which dense attention is counted."""

WHOLE = ("cross_attention", "self_attention")
"""Roles whose keys every rank has whole (a prompt, an image): nothing is moved for them."""


@dataclass(frozen=True, eq=False)
class Attention:
    """An attention of a model.

    count     how many like it a call of the model has
    sharded   over a sequence that is sharded; else its keys are whole everywhere and its queries divided evenly
    replaced  block-sparse
    sparsity  share of dense attention that is skipped, all costs counted
    costs     float64 [P, H', q_len]: expected active blocks by query, in the model's order of tokens
    order     int64 [q_len]: token of each place, from which rows of block_q are cut; None: as they come
    """

    count: int
    batch: int
    heads: int
    q_len: int
    kv_len: int
    head_dim: int
    sharded: bool
    replaced: bool
    sparsity: float
    costs: np.ndarray
    order: np.ndarray | None
    block_q: int

    @property
    def dense_flops(self) -> float:
        """FLOPs of one of them, if dense."""
        return 4.0 * self.batch * self.heads * self.q_len * self.kv_len * self.head_dim

    @property
    def num_rows(self) -> int:
        """Mq."""
        return cdiv(self.q_len, self.block_q)

    def rows(self) -> np.ndarray:
        """float64 [P, H', Mq]: active blocks of each row."""
        ordered = self.costs if self.order is None else self.costs[..., self.order]
        return np.add.reduceat(ordered, np.arange(0, self.q_len, self.block_q), axis=-1)

    def work(self, ulysses: int, ring: int, dealt: bool) -> np.ndarray:
        """float64 [P, ulysses, ring]: active blocks of each rank, over all samples.

        Rank (i, j) has the i-th part of the heads and the j-th part of the queries: contiguous ones as they come, or
        dealt by the mean of the regimes. Where there are fewer rows than rings, queries are not dealt.
        """
        if dealt and 1 < ring <= self.num_rows:
            rows = self.rows()
            queries = balance.work(rows, ring, balance.deal_rows(rows.mean(0).sum(0), ring))
        else:
            queries = balance.work(self.costs, ring)
        if queries.shape[1] == 1:
            return self.batch * np.repeat(queries, ulysses, axis=1) * (self.heads / ulysses)
        order = balance.deal_heads(queries.mean(0).sum(-1), ulysses) if dealt else None
        return self.batch * np.moveaxis(balance.work(np.moveaxis(queries, 1, -1), ulysses, order), -1, 1)


def attentions_of(sites: Iterable[SiteReport]) -> list[Attention]:
    """The attentions of a report's sites, those alike together; sites whose shapes depend on data are left out."""
    found: dict[tuple[object, ...], Attention] = {}
    for site in sites:
        if site.shape is None or site.kv_length is None or len(site.shape) < 3:
            continue
        plans = [id(one.plan) for one in (site, *site.chunks)]
        key = (site.role, site.replaced, site.shape, site.kv_length, site.sparsity, *plans)
        known = found.get(key)
        found[key] = _attention(site) if known is None else replace(known, count=known.count + 1)
    return list(found.values())


def _attention(site: SiteReport) -> Attention:
    assert site.shape is not None
    assert site.kv_length is not None
    *batch, heads, q_len, head_dim = site.shape
    order = None if site.plan is None else site.plan.query_order
    return Attention(
        count=1,
        batch=math.prod(batch),
        heads=heads,
        q_len=q_len,
        kv_len=site.kv_length,
        head_dim=head_dim,
        sharded=site.role not in WHOLE,
        replaced=site.replaced,
        sparsity=site.sparsity,
        costs=_costs(site, q_len, site.kv_length),
        order=None if order is None else order[0].cpu().numpy(),
        block_q=DENSE_BLOCK if site.plan is None else site.plan.block_q,
    )


def _costs(site: SiteReport, q_len: int, kv_len: int) -> np.ndarray:
    """float64 [P, H', q_len]: active blocks by query. Groups of queries each count by the mean of their regimes."""
    if site.chunks:
        return _chunked(site, q_len)
    if site.plan is None:
        return np.full((1, 1, q_len), cdiv(kv_len, DENSE_BLOCK) / DENSE_BLOCK)
    return balance.token_costs(site.plan, expected_counts(site.plan, site.sparsity + site.overhead))


def expected_counts(plan: BlockPlan, sparsity: float) -> np.ndarray:
    """float64 [P, H', Mq]: blocks of each row, where `sparsity` of dense attention is skipped.

    They are the plan's, or where blocks are chosen when the graph runs, the same share of each row's candidates; rows
    that may read everything (text) keep it, unless all may.
    """
    counts = plan.kv_counts.cpu().numpy().astype(np.float64)
    compensation = 1.0 - plan.sparsity - counts.mean() / plan.num_kv_blocks
    wanted = max(1.0 - sparsity - compensation, 0.0) * plan.num_kv_blocks * counts.size
    full = counts == plan.num_kv_blocks
    if full.all() or wanted < counts[full].sum():
        full[:] = False
    some = counts[~full].sum()
    return np.where(full, counts, counts * ((wanted - counts[full].sum()) / some if some else 1.0))


def _chunked(site: SiteReport, q_len: int) -> np.ndarray:
    """float64 [1, H', q_len] of a site in groups of queries; those of no group read nothing."""
    parts = []
    for chunk in site.chunks:
        assert chunk.asks is not None
        assert chunk.kv_length is not None
        start, stop = chunk.asks
        parts.append((start, stop, _costs(chunk, stop - start, chunk.kv_length).mean(0)))
    costs = np.zeros((1, max(len(part) for _, _, part in parts), q_len))
    for start, stop, part in parts:
        costs[0, :, start:stop] = part
    return costs
