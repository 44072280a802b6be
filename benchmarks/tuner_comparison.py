"""Which optimizer finds the best parameters in 30 evaluations? Nevergrad's, Optuna's TPE and random search.

    OMP_NUM_THREADS=1 python benchmarks/tuner_comparison.py --workers 2

Every optimizer gets the same budget, points of the same unit cube, the same objective and the same seeds. A row is
an optimizer; a figure is the geometric mean over the seeds of the best loss found. "warm" starts from the known
points that `drad.tune` suggests first, "cold" has none. The last columns are geometric means over the tasks.
Optuna is needed for the row "Optuna TPE" only.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dynamicrad_compile.tuning.objective import Objective
from dynamicrad_compile.tuning.optimizer import Optimizer, Point
from dynamicrad_compile.tuning.output import package_versions
from dynamicrad_compile.tuning.space import Space
from dynamicrad_compile.tuning.task import Task

OPTIMIZERS = (
    "Optuna TPE",
    "random",
    "NGOpt",
    "NgIohTuned",
    "BO",
    "CMA",
    "DiagonalCMA",
    "TwoPointsDE",
    "LhsDE",
    "QODE",
    "PSO",
    "OnePlusOne",
    "MetaModel",
    "MetaModelOnePlusOne",
    "ScrHammersleySearch",
    "Cobyla",
)
# (grid, regime, mode, proxy): small grids at the settings of the published figures.
TASKS = (
    ((12, 15, 16), "low", "static_ratio", "published"),
    ((24, 10, 12), "low", "static_ratio", "published"),
    ((24, 10, 12), "mid", "static_ratio", "published"),
    ((12, 15, 16), "mid", "dynamic_threshold", "published"),
    ((12, 15, 16), "mid", "static_ratio", "video"),
    ((12, 15, 16), "high", "dynamic_threshold", "video"),
)
RESULTS = Path(__file__).parent / "results"


@functools.lru_cache(maxsize=1)
def objective_of(number: int, rows: int) -> Objective:
    """The objective of a task."""
    grid, regime, _, proxy = TASKS[number]
    return Objective(Task(grid, 32, heads=4, head_dim=64, proxies=(proxy,), rows=rows), regime)


def best_loss(number: int, name: str, seed: int, warm: bool, budget: int, rows: int) -> float:
    """Best loss after `budget` evaluations."""
    torch.set_num_threads(1)
    objective = objective_of(number, rows)
    space = Space(objective.task, TASKS[number][2])
    known = space.known_points() if warm else []
    evaluate = functools.partial(_loss, space, objective)
    if name == "random":
        points = np.random.RandomState(seed).rand(budget, len(space.dimensions)).tolist()
        return min(evaluate(point) for point in (known + points)[:budget])
    if name == "Optuna TPE":
        return _optuna(space, evaluate, known, seed, budget)
    optimizer = Optimizer(name, len(space.dimensions), budget, seed, 1, known)
    best = math.inf
    for _ in range(budget):
        candidate, point = optimizer.ask()
        loss = evaluate(point)
        optimizer.tell(candidate, loss)
        best = min(best, loss)
    return best


def _loss(space: Space, objective: Objective, point: Point) -> float:
    return space.evaluate(objective, point).loss


def _optuna(space: Space, evaluate: Any, known: list[Point], seed: int, budget: int) -> float:
    """TPE on the same cube; whole-numbered dimensions are integers or categories to it, as they would be in use."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))

    def steps(name: str) -> int:
        low, high, kind = space.dimensions[name]
        return int(high - low) + 1 if kind == "whole" else 0

    for point in known:
        named = zip(space.dimensions, point, strict=True)
        study.enqueue_trial({name: int(u * steps(name)) if steps(name) else u for name, u in named})
    best = math.inf
    for _ in range(budget):
        trial = study.ask()
        point = []
        for name in space.dimensions:
            if name in space.options:
                point.append((trial.suggest_categorical(name, list(range(steps(name)))) + 0.5) / steps(name))
            elif steps(name):
                point.append((trial.suggest_int(name, 0, steps(name) - 1) + 0.5) / steps(name))
            else:
                point.append(trial.suggest_float(name, 0.0, 1.0))
        loss = evaluate(point)
        study.tell(trial, math.log(min(loss, 1e5) + 1e-9))
        best = min(best, loss)
    return best


def geometric(values: list[float]) -> float:
    """Geometric mean."""
    return math.exp(sum(map(math.log, values)) / len(values))


def table(losses: dict[tuple[int, str, bool], list[float]], names: list[str], numbers: list[int]) -> str:
    """Markdown, best in the mean of the warm tasks first."""
    columns = [(number, warm) for warm in (True, False) for number in numbers if (number, names[0], warm) in losses]
    starts = list(dict.fromkeys(warm for _, warm in columns))
    mean = {
        (name, warm): geometric([geometric(losses[n, name, w]) for n, w in columns if w == warm])
        for name in names
        for warm in starts
    }
    heads = [f"{'warm' if w else 'cold'} {n + 1}" for n, w in columns] + [
        f"mean {'warm' if warm else 'cold'}" for warm in starts
    ]
    lines = ["| optimizer | " + " | ".join(heads) + " |", "|-" * (len(heads) + 1) + "|"]
    for name in sorted(names, key=lambda name: mean[name, starts[0]]):
        cells = [f"{geometric(losses[n, name, w]):.3g}" for n, w in columns]
        cells += [f"**{mean[name, warm]:.3g}**" for warm in starts]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines.append("")
    for number in numbers:
        grid, regime, mode, proxy = TASKS[number]
        lines.append(f"{number + 1}. {'x'.join(map(str, grid))}, {regime} motion, {mode}, {proxy} proxy")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict[tuple[int, str, bool], list[float]]:
    """Run the comparison, print the table; returns all best losses by (task, optimizer, warm)."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS))
    parser.add_argument("--tasks", type=int, nargs="+", default=list(range(1, len(TASKS) + 1)), help="numbers from 1")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--budget", type=int, default=30)
    parser.add_argument("--rows", type=int, default=360, help="sampled query rows of a head (360)")
    parser.add_argument("--starts", nargs="+", choices=["warm", "cold"], default=["warm", "cold"])
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--save", metavar="NAME", help="write benchmarks/results/NAME.json and .md")
    arguments = parser.parse_args(argv)
    numbers = [number - 1 for number in arguments.tasks]
    jobs = [
        (number, name, seed, start == "warm", arguments.budget, arguments.rows)
        for number in numbers
        for start in arguments.starts
        for name in arguments.optimizers
        for seed in range(arguments.seeds)
    ]
    begin = time.perf_counter()
    losses: dict[tuple[int, str, bool], list[float]] = {}
    if arguments.workers > 1:
        pool = ProcessPoolExecutor(arguments.workers, mp_context=multiprocessing.get_context("spawn"))
        results = pool.map(best_loss, *zip(*jobs, strict=True))
    else:
        results = map(best_loss, *zip(*jobs, strict=True))
    for (number, name, seed, warm, *_), loss in zip(jobs, results, strict=True):
        losses.setdefault((number, name, warm), []).append(loss)
        print(
            f"{time.perf_counter() - begin:6.0f} s  task {number + 1} {name} seed {seed}: {loss:.4g}", file=sys.stderr
        )
    text = table(losses, arguments.optimizers, numbers)
    print(f"Best loss after {arguments.budget} evaluations, geometric mean over {arguments.seeds} seeds\n\n{text}")
    if arguments.save:
        RESULTS.mkdir(exist_ok=True)
        rows = [{"task": k[0] + 1, "optimizer": k[1], "warm": k[2], "losses": v} for k, v in losses.items()]
        content = {"packages": package_versions(), "budget": arguments.budget, "rows": rows}
        (RESULTS / f"{arguments.save}.json").write_text(json.dumps(content, indent=1) + "\n")
        (RESULTS / f"{arguments.save}.md").write_text(text + "\n")
    return losses


if __name__ == "__main__":
    main()
