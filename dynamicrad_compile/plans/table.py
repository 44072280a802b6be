"""Plan tables: what a graph needs to know of its plans, for every regime that it may be in.

A `PlanSpec` says how plans are made, the grid apart; a `PlanTable` is what it gives for one grid. Static regimes are
candidates of which all are forced, so one table serves both modes and a regime can be switched on the device.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..errors import PlanError
from ..profiles.parameters import AdaSpa, Table
from .cost import blocks_to_skip
from .layout import Layout, Range
from .order import Box, inverse
from .patterns import PATTERNS
from .plan import ORDERS, BlockPlan, Candidates
from .ratios import ratios_for, uneven
from .stages import ONE_STAGE, Stages

KEEP_ALL = {"threshold": -float("inf"), "mass": 1.0, "ratio": 1.0}
"""Threshold that keeps every candidate, by criterion of select_blocks."""


@dataclass(frozen=True)
class RegimeSpec:
    """How the plan of one regime is made.

    name        "low", "mid", "high", or "" where there is but one
    parameters  of the pattern, of its candidates where there is a criterion
    criterion   by which select_blocks thins it when the graph runs; "": a static plan
    near, far   its thresholds; None: the shares of blocks that meet `sparsity`
    rank        what it goes by: "mass" or "error"
    balance     how these shares are divided between near and far blocks, see `ratios_for`
    sparsity    share of dense attention that is skipped after a selection by "ratio"; None: whatever near and far give
    weight      how many of a run's steps the plan holds for, relative to the others
    """

    name: str
    parameters: Table
    criterion: str = ""
    near: float | None = None
    far: float | None = None
    sparsity: float | None = None
    balance: float = 0.0
    rank: str = "mass"
    weight: float = 1.0

    @property
    def box(self) -> Box | None:
        """(frames, height, width) of a block; None in raster order."""
        found: Box | None = getattr(self.parameters, "box_sizes", None)
        return found


@dataclass(frozen=True)
class PlanSpec:
    """How plan tables are made. Raises PlanError for parameters of another pattern, or a choice that it can't have.

    regimes  one for each plan: of the first regime those of all stages, then of the second
    stages   which of a regime's plans a step reads
    """

    pattern: str
    block_size: int
    regimes: tuple[RegimeSpec, ...]
    stages: Stages = ONE_STAGE

    def __post_init__(self) -> None:
        pattern = PATTERNS[self.pattern]
        for regime in self.regimes:
            if not isinstance(regime.parameters, pattern.parameters):
                found, wanted = type(regime.parameters).__name__, pattern.parameters.__name__
                raise PlanError(f"pattern {self.pattern!r} has parameters of type {wanted}, got {found}.")
            if regime.criterion and pattern.needs != "selection":
                raise PlanError(
                    f"blocks of pattern {self.pattern!r} can't be chosen by {regime.criterion!r}: it is static."
                )

    @property
    def criteria(self) -> tuple[tuple[str, str], ...]:
        """Criterion and rank of all regimes, each pair once; none where nothing is to be selected."""
        return tuple(dict.fromkeys((regime.criterion, regime.rank) for regime in self.regimes if regime.criterion))

    @property
    def number_of_regimes(self) -> int:
        """Regimes that the router chooses among."""
        return len(self.regimes) // self.stages.number

    @property
    def follows_grid(self) -> bool:
        """Whether the table of another grid has tensors of the same shapes, and nothing is kept from step to step.

        How long a cycle is depends on the grid; what a search has found is kept.
        """
        return not self.stages.is_cycle and PATTERNS[self.pattern].needs != "search"

    @property
    def orders(self) -> int:
        """Orders of tokens in a table: none in raster order, one where all regimes have the same, else one for each."""
        boxes = {regime.box for regime in self.regimes}
        return 0 if boxes == {None} else 1 if len(boxes) == 1 else len(self.regimes)

    def build(
        self, grid: tuple[int, int, int], text_before: int, text_after: int, queries: Range | None = None
    ) -> PlanTable:
        """The table for a grid (frames, height, width) with text around it; built once, then remembered.

        queries: (start, stop) of the tokens that ask, None: all (`layout.Layout`).
        """
        return _build(self, grid, text_before, text_after, queries)

    def to_json(self) -> str:
        """The specification as text, for a graph's constant argument."""
        regimes = [{**vars(regime), "parameters": regime.parameters.model_dump()} for regime in self.regimes]
        return json.dumps({**vars(self), "regimes": regimes, "stages": vars(self.stages)})

    @staticmethod
    def from_json(text: str) -> PlanSpec:
        """Reverse of `to_json`."""
        values = json.loads(text)
        parameters = PATTERNS[values["pattern"]].parameters
        regimes = [RegimeSpec(**{**r, "parameters": parameters(**r["parameters"])}) for r in values["regimes"]]
        stages = Stages(**{**values["stages"], "starts": tuple(values["stages"]["starts"])})
        return PlanSpec(**{**values, "regimes": tuple(regimes), "stages": stages})


@dataclass(frozen=True, eq=False)
class PlanTable:
    """Candidates of all regimes, and the thresholds that thin them.

    candidates  P plans, in the order of the specification's regimes
    thresholds  fp32 [P, 3 K]: near, far, and 1 where the regime goes by this criterion, for each of K criteria
    criteria    criterion and rank of select_blocks; empty where nothing is to be selected
    weights     of the plans in a run (`RegimeSpec.weight`); none: all count the same
    searches    how blocks are searched when the graph runs; the plan then holds those that are read in any case
    """

    candidates: Candidates
    thresholds: torch.Tensor
    criteria: tuple[tuple[str, str], ...]
    weights: tuple[float, ...] = ()
    searches: AdaSpa | None = None

    @staticmethod
    def of(plan: BlockPlan) -> PlanTable:
        """The table of a plan from which nothing is to be selected."""
        return PlanTable(
            Candidates.forced(plan), torch.zeros(len(plan.kv_counts), 0, dtype=torch.float32, device="cpu"), ()
        )

    @property
    def plan(self) -> BlockPlan:
        """The static plans of all regimes."""
        return self.candidates.plan

    @property
    def sparsity(self) -> float:
        """Share of dense attention that is skipped, the mean over all plans by their weight, compensation counted.

        By criterion "ratio" as the op will choose; other criteria may choose all candidates.
        """
        plan = self.plan
        if self.searches is not None:
            return self.searches.sparsity
        counts, forced, near = plan.kv_counts, self.candidates.kv_forced, self.candidates.kv_near
        thinned = counts < plan.num_kv_blocks
        for place, (criterion, _) in enumerate(self.criteria):
            if criterion == "ratio":
                shares = self.thresholds[:, 3 * place : 3 * place + 3, None, None].unbind(1)
                kept = forced + torch.ceil(shares[0] * (near - forced)) + torch.ceil(shares[1] * (counts - near))
                counts = torch.where(thinned & (shares[2] != 0), kept.to(torch.int32), counts)
        plan = replace(plan, kv_counts=counts, check_values=False)
        weights = self.weights or (1.0,) * len(counts)
        return sum(plan.one(i).sparsity * weight for i, weight in enumerate(weights)) / sum(weights)

    @property
    def to_skip(self) -> float:
        """Share of the blocks that a search skips, so that the sparsity is reached with what means cost."""
        plan = self.plan
        return (
            0.0
            if self.searches is None
            else blocks_to_skip(self.searches.sparsity, plan.block_kv, max(plan.compensate))
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a graph reads, by name: counts and indices; forced, near and thresholds where something is to be
        selected; the orders of keys and of queries and their inverses where they have one.
        """
        plan = self.plan
        found = {"counts": plan.kv_counts, "indices": plan.kv_indices}
        if self.criteria:
            forced, near = self.candidates.kv_forced, self.candidates.kv_near
            found |= {"forced": forced, "near": near, "thresholds": self.thresholds}
        if plan.order is not None:
            found |= {"order": plan.order, "inverse": inverse(plan.order)}
        q_order = plan.query_order
        if q_order is not None:
            back = found["inverse"] if q_order is plan.order else inverse(q_order)
            found |= {"q_order": q_order, "q_inverse": back}
        return found


@functools.lru_cache(maxsize=64)
def _build(
    spec: PlanSpec, grid: tuple[int, int, int], text_before: int, text_after: int, queries: Range | None
) -> PlanTable:
    rows: list[Candidates] = []
    thresholds: list[list[float]] = []
    pattern = PATTERNS[spec.pattern]
    for regime in spec.regimes:
        layout = Layout(grid, spec.block_size, text_before, text_after, regime.box, queries)
        near, far = regime.near, regime.far
        if regime.criterion:
            found = pattern.candidates(layout, regime.parameters)
            if regime.sparsity is not None:
                found = uneven(found, regime.sparsity, torch.from_numpy(layout.own_blocks()))
                near, far = ratios_for(found, regime.sparsity, regime.balance)
        else:
            found = Candidates.forced(pattern.plan(layout, regime.parameters))
        rows.append(found)
        row: list[float] = []
        for criterion, rank in spec.criteria:
            keep_all = KEEP_ALL[criterion]
            own = (criterion, rank) == (regime.criterion, regime.rank) and near is not None and far is not None
            row += [near, far, 1.0] if own else [keep_all, keep_all, 0.0]  # type: ignore[list-item]
        thresholds.append(row)
    whole = Candidates.stack(rows)
    if whole.plan.order is not None:  # of boxes that differ but give this grid one order, a row each all the same
        orders: dict[str, Any] = {
            name: x.expand(spec.orders, -1).contiguous()
            for name in ORDERS
            if (x := getattr(whole.plan, name)) is not None
        }
        whole = replace(whole, plan=replace(whole.plan, **orders, check_values=False), check_values=False)
    weights = tuple(regime.weight for regime in spec.regimes)
    parameters = spec.regimes[0].parameters
    searches = parameters if isinstance(parameters, AdaSpa) else None
    made = torch.tensor(thresholds, dtype=torch.float32, device="cpu")
    return PlanTable(whole, made, spec.criteria, weights, searches)
