"""The first hours on a GPU as stages: what each runs, how, for how long, and what keeps a row from running.

Builds, then checks, then the forward at the length that matters most, by every form and tile; the rest with the forms
that were fastest. A form that failed a check at a head_dim is not timed at it, a tile whose build or own check failed
is not timed at all.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import autotune_tiles
import torch

from dynamicrad_compile.kernels import tiles as table
from dynamicrad_compile.kernels.tiles import Tile

from . import attention, builds, graphs, overheads, steps, tile_rows, variant_checks, variants
from .bench import SHAPES, Bench
from .machine import Peak, peak_of
from .roofline import Ceilings, measure_ceilings
from .runner import Journal, Row, Values
from .timing import Clock

MAIN = 32760
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Day:
    """What a process needs to know to make the rows of a run.

    clock_ms  time that the repeats of one measurement take together
    settled   the fastest tiles of the run take the place of the table's
    threads   of PyTorch on the CPU, 0 for its own choice
    """

    device: str
    reduced: bool
    codegen: bool
    dtype: str
    arch: int
    sparsity: float
    layers: int
    clock_ms: float = 250.0
    settled: bool = False
    threads: int = 0

    @property
    def main(self) -> int:
        """Tokens of the rows that matter most."""
        return 512 if self.reduced else MAIN

    @property
    def long(self) -> int:
        """Tokens of the step whose goal the arithmetic allows: at MAIN no more than 1.7x is possible."""
        return 1012 if self.reduced else 69120

    @property
    def dims(self) -> tuple[int, ...]:
        """head_dims, the first is the one that matters most."""
        return (64,) if self.reduced else (128, 64)


@dataclass(frozen=True)
class Stage:
    """Some rows of the day.

    share   seconds of a budget of 450; what is left of it goes to the stages after it
    groups  the rows; those of a group share a process
    spread  groups run side by side, on all cores
    """

    name: str
    share: float
    groups: Callable[[Bench, Day], Iterable[Iterable[Row]]]
    limit: float = 40.0
    clock_ms: float = 250.0
    spread: bool = False
    settled: bool = True


def _alone(rows: Iterable[Row]) -> list[list[Row]]:
    return [[row] for row in rows]


def _tiles(day: Day, dim: int) -> list[Tile]:
    return variants.candidates(day.arch, dim, few=day.reduced)


def _machine(bench: Bench, day: Day) -> list[list[Row]]:
    run = lambda: measure_ceilings(bench.device, bench.clock, bench.reduced)[1]  # noqa: E731
    return [[Row("machine/ceilings", "machine", run, 8.0)]]


def _builds(bench: Bench, day: Day) -> list[list[Row]]:
    return _alone(row for dim in day.dims for row in builds.rows(day.arch, dim, _tiles(day, dim)))


def _first_checks(bench: Bench, day: Day) -> list[list[Row]]:
    """Two cases of each form: one that hangs or crashes is found before it is tried on everything else."""
    rows = variant_checks.rows(bench.device, bench.reduced)
    first = [
        row for row in rows if row.facts["case"] in ("even", "ragged") and row.facts["kernel"].startswith("forward")
    ]
    return _alone(first)


def _checks(bench: Bench, day: Day) -> list[list[Row]]:
    """The tiles that are timed next, then all cases."""
    return _alone([*_tries(bench, day, day.dims[0]), *variant_checks.rows(bench.device, bench.reduced)])


def _tries(bench: Bench, day: Day, dim: int) -> list[Row]:
    return list(tile_rows.tries(bench, day.main, dim, day.sparsity, _tiles(day, dim)))


def _timed(bench: Bench, day: Day, dim: int) -> list[list[Row]]:
    """The tiles of a form share a process."""
    rows = list(tile_rows.rows(bench, day.main, dim, day.sparsity, _tiles(day, dim)))
    return [[row for row in rows if row.facts["kernel"] == kernel] for kernel in variants.FORWARD]


def _headline(bench: Bench, day: Day, dim: int) -> list[list[Row]]:
    """The op with the fastest tile, dense and FlexAttention, one after the other in one process."""
    main, s = day.main, day.sparsity
    rows = [attention.dense_row(bench, main, dim), attention.forward_row(bench, main, dim, s)]
    rows += attention.flex_rows(bench, main, dim, (s,))
    return [[*rows, *(attention.forward_row(bench, main, dim, other) for other in (0.9, 0.5, 0.0))]]


def _lengths(bench: Bench, day: Day) -> list[list[Row]]:
    lengths = sorted(bench.shapes)[1:] if day.reduced else [69120, 142080, 8320]
    assert day.reduced or set(lengths) < set(SHAPES)
    return [
        [row for n in lengths for row in (attention.dense_row(bench, n, dim),
                                          attention.forward_row(bench, n, dim, day.sparsity))]
        for dim in day.dims
    ]  # fmt: skip


def _beside(bench: Bench, day: Day) -> list[list[Row]]:
    rows = list(overheads.rows(bench, day.main, day.dims[0], day.sparsity))
    first = ("covariance", "select", "order", "search")
    return [sorted(rows, key=lambda row: not row.name.startswith(first))]


def _steps(bench: Bench, day: Day) -> list[list[Row]]:
    """The step at both lengths, then with blocks by content, then one block; each in a process of its own."""
    long = list(steps.rows(bench, day.long, day.sparsity, day.layers))[1]
    block, static, dynamic = steps.rows(bench, day.main, day.sparsity, day.layers)
    return [[long], [static], [dynamic], [block]]


def _backward(bench: Bench, day: Day, dim: int) -> list[Row]:
    """The op's and dense ones, then its kernels by each form."""
    op = attention.backward_row(bench, day.main, dim, day.sparsity)
    return [op, *attention.backward_form_rows(bench, day.main, dim, day.sparsity)]


STAGES = (
    Stage("machine", 12, _machine, settled=False),
    Stage("builds", 25, _builds, spread=True, settled=False),
    Stage("first checks", 20, _first_checks, limit=25, spread=True, settled=False),
    Stage("checks", 55, _checks, spread=True, settled=False),
    Stage("forms", 35, lambda b, d: _timed(b, d, d.dims[0]), limit=20, clock_ms=60, settled=False),
    Stage("headline", 40, lambda b, d: _headline(b, d, d.dims[0])),
    Stage("checks 64", 15, lambda b, d: _alone(_tries(b, d, d.dims[-1])), spread=True, settled=False),
    Stage("forms 64", 30, lambda b, d: _timed(b, d, d.dims[-1]), limit=20, clock_ms=60, settled=False),
    Stage("headline 64", 20, lambda b, d: _headline(b, d, d.dims[-1])),
    Stage("lengths", 30, _lengths),
    Stage("beside", 45, _beside),
    Stage("step", 80, lambda b, d: _steps(b, d)[:2], limit=100),
    Stage("backward", 25, lambda b, d: [_backward(b, d, dim) for dim in d.dims]),
    Stage("graphs", 18, lambda b, d: [list(graphs.rows(b, d.main, d.dims[0]))]),
    Stage("more steps", 0, lambda b, d: _steps(b, d)[2:], limit=100),
)


def bench_of(day: Day, content: Values) -> Bench:
    """The bench of a run whose journal holds `content`."""
    clock = Clock(day.device, 5.0 if day.reduced else day.clock_ms, min_repeats=3 if day.reduced else 5)
    peak = peak_of(content["about"]["chip"]) or Peak(1.0, 1.0, 1, 1.0)
    ceilings = Ceilings(peak.tensor, peak.memory, peak.exp_rate, peak.l2, 5.0)  # should they not have been measured
    if "ceilings" in content:
        ceilings = Ceilings(**content["ceilings"]["ceilings"])
    journal = Journal(None, content)  # type: ignore[arg-type] # read, never written
    return Bench(day.device, day.reduced, day.codegen, DTYPES[day.dtype], clock, journal, ceilings)


def groups_of(stage: Stage, day: Day, content: Values) -> list[list[Row]]:
    """The rows of a stage."""
    pace = 0.1 if day.reduced else 1.0
    groups = stage.groups(bench_of(day, content), day)
    return [[replace(row, seconds=pace * row.seconds) for row in group] for group in groups]


def make(day: Day, content: Values) -> list[Row]:
    """Every row, in the process that is to run some; with the fastest tiles in the table, once they are known."""
    if day.threads:
        torch.set_num_threads(day.threads)
    if day.settled and day.device == "cuda" and content.get("tile_proposal"):
        autotune_tiles.update(table.table(), content, margin=0.02)
    return [row for stage in STAGES for group in groups_of(stage, day, content) for row in group]


def jobs_of(stage: Stage) -> int:
    """Processes of a stage at a time."""
    return max(2, (os.cpu_count() or 2) - 2) if stage.spread else 1
