"""A step of a model on many GPUs, on paper: work, bytes moved, memory and time of each layout of ranks.

world = ulysses x ring ranks. Of each sharded attention over n queries and m keys, in 16-bit numbers,

    work     rank (i, j) has the i-th part of the heads and the j-th part of the queries (`attentions.Attention.work`)
    moved    Ulysses: q, k, v and the output, (2 n + 2 m) / world x heads x head_dim, of which (ulysses - 1) / ulysses
             leave the rank; ring: the keys and values of the rank's heads, 2 m x heads / ulysses x head_dim, of which
             (ring - 1) / ring come from others. A rank sends as much as it receives
    memory   q, k, v and output of one layer, (2 n + 2 m) / world x heads x head_dim, and with a ring the gathered keys
             and values, 2 m x heads / ulysses x head_dim. Weights, activations and buffers of the exchange come on top
    time     FLOPs / (share of the peak that dense attention reaches)          (`chips`)
             / expected dense time / sparse time on that chip                  (`plans.crossover.expected_gain`)
             x the part of the work that the busiest rank has: each layer waits for it

Besides, moving takes bytes / link speed, with nothing overlapped and no latency; all other products FLOPs / (0.75 of
the peak) / world; attention to a prompt is divided evenly and moves nothing. Not counted: norms and other elementwise
work, choosing blocks when the graph runs (1 % of dense attention, `plans.cost.SELECTION`), and that smaller pieces are
less efficient. So every figure is an estimate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import OptionsError
from ..reporting.report import Report
from . import balance
from .attentions import Attention, attentions_of
from .chips import Chip, chip
from .step import Step, on_one
from .table import as_table

MAX_RANKS = 64
DEVICE = "h100"
ITEM_BYTES = 2
"""Bytes of a number: float16 or bfloat16."""


@dataclass(frozen=True)
class Estimate:
    """One layout of the ranks. Times in ms a step, bytes and blocks a rank.

    dealt         heads and rows go to the ranks by their work (`balance`); else contiguous parts as they come
    blocks_*      active blocks of sharded attention: the sum over layers of the least, the mean, the most of a rank
    imbalance     blocks_max / blocks_mean - 1
    moved_bytes   sent to other ranks, and as many received
    memory_bytes  of the layer that needs most
    over_dense    dense step on one GPU / this step; over_sparse: sparse step on one GPU / this step
    """

    ulysses: int
    ring: int
    dealt: bool
    blocks_min: float
    blocks_mean: float
    blocks_max: float
    imbalance: float
    moved_bytes: int
    memory_bytes: int
    attention_ms: float
    moving_ms: float
    rest_ms: float
    step_ms: float
    over_dense: float
    over_sparse: float

    @property
    def name(self) -> str:
        """ "ulysses 4 x ring 2", without what is 1."""
        parts = [f"{name} {n}" for name, n in (("ulysses", self.ulysses), ("ring", self.ring)) if n > 1]
        return (" x ".join(parts) or "one GPU") + ", dealt" * self.dealt


@dataclass(frozen=True)
class Simulation:
    """Layouts of a number of ranks: those of contiguous parts, each followed by the dealt one where that evens out.

    dense_ms, sparse_ms  step on one GPU
    source               where the expected speed-up of sparse attention is from
    left_out             attentions whose shapes depend on data
    """

    ranks: int
    chip: Chip
    link: float
    dense_ms: float
    sparse_ms: float
    source: str
    left_out: int
    layouts: tuple[Estimate, ...]

    @property
    def best(self) -> Estimate:
        """The fastest layout of contiguous parts, as sequence-parallel libraries shard."""
        return min((one for one in self.layouts if not one.dealt), key=lambda one: one.step_ms)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        values = {name: value for name, value in vars(self).items() if name not in ("chip", "layouts")}
        layouts = [{**asdict(one), "best": one is self.best} for one in self.layouts]
        return {**values, "device": self.chip.name, "measured": False, "layouts": layouts}

    def __str__(self) -> str:
        return as_table(self)


def simulate_ranks(
    report: Report, ranks: int, *, link: float | None = None, device: str = DEVICE, rest_flops: float = 0.0
) -> Simulation:
    """What a step of the model of a report is expected to be on `ranks` GPUs, in each layout that its heads allow.

    ranks       1..64
    link        GB/s between GPUs, each way; None: NVLink, or PCIe 4.0 where the device has none
    device      a100, h100, h200, b200, 3090, 4090, 5090
    rest_flops  FLOPs of a step outside of attention; 0: attention alone

    Raises OptionsError for values out of range, or if the report has no attention over a sequence that is sharded;
    CrossoverError if the table of expected speed-ups can't be read.
    """
    target, link = check(ranks, link, device)
    if not (math.isfinite(rest_flops) and rest_flops >= 0):
        raise OptionsError(f"rest_flops must be a number of at least 0, got {rest_flops!r}.")
    sites = report.sites
    attentions = attentions_of(sites)
    if not any(one.sharded for one in attentions):
        raise OptionsError(
            "nothing to simulate: the report has no softmax attention over a video whose shape is known. "
            "What it found instead stands in the report."
        )
    step = on_one(attentions, target, rest_flops)
    layouts: list[Estimate] = []
    for ulysses, ring in meshes(ranks, attentions):
        for dealt in (False, True):
            one = _estimate(step, ulysses, ring, dealt, link)
            if not dealt or one.imbalance < layouts[-1].imbalance - balance.WITHIN / 10:
                layouts.append(one)
    if not layouts:
        raise OptionsError(f"{ranks} ranks are more than the shortest video attention has heads and tokens for.")
    left_out = len(sites) - sum(one.count for one in attentions)
    return Simulation(ranks, target, link, step.dense_ms, step.sparse_ms, step.source, left_out, tuple(layouts))


def check(ranks: int, link: float | None, device: str) -> tuple[Chip, float]:
    """The chip, and the link's speed in GB/s. Raises OptionsError for what is out of range."""
    if isinstance(ranks, bool) or not isinstance(ranks, int) or not 1 <= ranks <= MAX_RANKS:
        raise OptionsError(f"ranks must be an integer in 1..{MAX_RANKS}, got {ranks!r}.")
    target = chip(device)
    if link is None:
        return target, target.link
    if not (math.isfinite(link) and link > 0):
        raise OptionsError(f"link must be a positive number of GB/s, got {link!r}.")
    return target, float(link)


def meshes(ranks: int, attentions: Sequence[Attention]) -> Iterator[tuple[int, int]]:
    """(ulysses, ring) whose product is `ranks`, the largest ulysses first; it divides the heads of all attentions."""
    sharded = [one for one in attentions if one.sharded]
    heads = math.gcd(*(one.heads for one in sharded))
    shortest = min(one.q_len for one in sharded)
    for ulysses in range(ranks, 0, -1):
        if ranks % ulysses == 0 and heads % ulysses == 0 and ranks // ulysses <= shortest:
            yield ulysses, ranks // ulysses


def _estimate(step: Step, ulysses: int, ring: int, dealt: bool, link: float) -> Estimate:
    """Figures of one layout, by the formulas of this file; link: GB/s each way."""
    world = ulysses * ring
    least = mean = most = moved = memory = attention_ms = 0.0
    for one, ms in zip(step.attentions, step.each_ms, strict=True):
        if not one.sharded:
            attention_ms += one.count * ms / world
            continue
        blocks = max(
            one.work(ulysses, ring, dealt), key=lambda of_regime: balance.imbalance(of_regime.ravel())
        )  # of the worst regime
        least += one.count * blocks.min()
        mean += one.count * blocks.mean()
        most += one.count * blocks.max()
        attention_ms += one.count * ms / world * (1.0 + balance.imbalance(blocks.ravel()))
        bytes_moved, bytes_held = _bytes(one, ulysses, ring)
        moved += one.count * bytes_moved
        memory = max(memory, bytes_held)
    moving_ms = moved / (link * 1e9) * 1e3
    step_ms = attention_ms + moving_ms + step.rest_ms / world
    return Estimate(
        ulysses=ulysses,
        ring=ring,
        dealt=dealt,
        blocks_min=least,
        blocks_mean=mean,
        blocks_max=most,
        imbalance=most / mean - 1.0 if mean else 0.0,
        moved_bytes=round(moved),
        memory_bytes=round(memory),
        attention_ms=attention_ms,
        moving_ms=moving_ms,
        rest_ms=step.rest_ms / world,
        step_ms=step_ms,
        over_dense=step.dense_ms / step_ms,
        over_sparse=step.sparse_ms / step_ms,
    )


def _bytes(one: Attention, ulysses: int, ring: int) -> tuple[float, float]:
    """Bytes that a rank sends, and receives, for one attention; and bytes that it holds."""
    token = one.batch * one.heads * one.head_dim * ITEM_BYTES
    own = (2 * one.q_len + 2 * one.kv_len) * token / (ulysses * ring)
    gathered = 2 * one.kv_len * token / ulysses
    moved = own * (ulysses - 1) / ulysses + gathered * (ring - 1) / ring
    return moved, own + (gathered if ring > 1 else 0.0)
