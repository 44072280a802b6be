"""What the search reaches on the published proxy, at the settings of the published figures.

    OMP_NUM_THREADS=1 python benchmarks/tuner_goals.py --workers 2

Two geometries, 12 frames of 240 tokens and 24 of 120, 2 heads of 64, blocks of 32, at least 80 % of dense attention
skipped with compensation counted, 30 evaluations for each regime and mode. Losses are means over 3 draws that no
search saw, for each regime's own profile and for the two others'; "published" is the best that the published search
space gives (Optuna TPE, 30 trials, 3 seeds), without compensation.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from dynamicrad_compile.executors import Workers
from dynamicrad_compile.profiles import REGIMES
from dynamicrad_compile.tuning.journal import Journal
from dynamicrad_compile.tuning.objective import Objective
from dynamicrad_compile.tuning.search import Runner, Winners, search
from dynamicrad_compile.tuning.task import DEFAULT_OPTIMIZER, MODES, Task

GRIDS = ((12, 15, 16), (24, 10, 12))
GOALS = {GRIDS[0]: (0.8, 10.0, 15.0), GRIDS[1]: (0.7, 12.0, 15.0)}
PUBLISHED = {GRIDS[0]: (0.8, 93.0, 524.0), GRIDS[1]: (0.63, 134.0, 435.0)}


def run(task: Task, workers: int) -> tuple[Winners, float]:
    """The winners of a task, and the seconds of the search itself."""
    with tempfile.TemporaryDirectory() as folder:
        processes = Workers(processes=workers, goes_on="the same command")
        journal = Journal(Path(folder) / "goals.jsonl", task, {}, resume=False)
        begin = time.perf_counter()
        try:
            return search(task, Runner(journal, processes, lambda text: None)), time.perf_counter() - begin
        finally:
            processes.close()


def cross_losses(task: Task, winners: Winners) -> dict[tuple[str, str, str], tuple[float, float]]:
    """Held-out (loss, sparsity) by (regime of the draws, regime of the profile, mode)."""
    found = {}
    for regime in REGIMES:
        objective = Objective(task, regime, held_out=True)
        for profile in REGIMES:
            for mode in task.modes:
                evaluation = objective.evaluate(mode, winners.tuned[profile, mode].parameters)
                found[regime, profile, mode] = (evaluation.loss, evaluation.sparsity)
    return found


def main(argv: list[str] | None = None) -> None:
    """Search and print one table for each geometry."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--optimizer", default=DEFAULT_OPTIMIZER)
    parser.add_argument("--budget", type=int, default=30)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plain", action="store_true", help="without compensation")
    parser.add_argument("--grids", type=int, nargs="+", choices=[1, 2], default=[1, 2], help="1: 12x240, 2: 24x120")
    arguments = parser.parse_args(argv)
    for grid in (GRIDS[number - 1] for number in arguments.grids):
        task = Task(
            grid,
            32,
            heads=2,
            head_dim=64,
            proxies=("published",),
            optimizer=arguments.optimizer,
            budget=arguments.budget,
            seed=arguments.seed,
            batch=arguments.workers,
            fixed={"compensate": 0.0} if arguments.plain else {},
        )
        winners, seconds = run(task, arguments.workers)
        losses = cross_losses(task, winners)
        kind = "without compensation" if arguments.plain else "compensation allowed"
        print(f"\n{grid[0]} frames of {grid[1] * grid[2]} tokens, {kind}, {task.optimizer}: {seconds:.0f} s\n")
        print("| regime | mode | loss | sparsity | low's profile | mid's | high's | goal | published |")
        print("|-|-|-|-|-|-|-|-|-|")
        for place, regime in enumerate(REGIMES):
            for mode in MODES:
                loss, sparsity = losses[regime, regime, mode]
                cross = " | ".join(f"{losses[regime, profile, mode][0]:.3f}" for profile in REGIMES)
                goal, published = GOALS[grid][place], PUBLISHED[grid][place]
                print(f"| {regime} | {mode} | {loss:.3f} | {sparsity:.4f} | {cross} | {goal:g} | {published:g} |")


if __name__ == "__main__":
    main()
