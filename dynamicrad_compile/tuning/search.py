"""The search: for each regime and mode, ask the optimizer, evaluate, tell; then let the winners meet."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..errors import DynamicRadError, OptionsError
from ..executors import Workers
from ..profiles import REGIMES
from ..profiles.parameters import MODES
from .choosing import KEEP_ALL
from .journal import Journal
from .objective import Evaluation, Objective, Parameters
from .optimizer import Optimizer
from .space import DEFAULTS, Space
from .task import CHOICES, EXCHANGED, Task

Tick = Callable[[str], None]
# Sparsities at which the winners are looked at for the picture of error against sparsity.
SWEEP = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)


@dataclass(frozen=True)
class Job:
    """One evaluation: of a point, or of a table's parameters (`point` is then empty)."""

    task: Task
    stage: str
    regime: str
    mode: str
    index: int
    point: list[float] = field(default_factory=list)
    parameters: Parameters | None = None


_building = threading.Lock()
_built: tuple[tuple[Task, str, bool], Objective] | None = None


def _objective(*wanted: Any) -> Objective:
    """The objective of (task, regime, held_out). Its draws are kept in this process until another one is asked for."""
    global _built
    with _building:  # threads of one process share it
        if _built is None or _built[0] != wanted:
            _built = None  # the tables of both would need twice the memory
            _built = (wanted, Objective(*wanted))
        return _built[1]


def run_job(job: Job) -> Evaluation:
    """Evaluate in this process. A job holds all that decides the result; captures are files that are read here."""
    objective = _objective(job.task, job.regime, job.stage == "held_out")
    if job.parameters is not None:
        return objective.evaluate(job.mode, job.parameters)
    return Space(job.task, job.mode).evaluate(objective, job.point)


class Runner:
    """Has the jobs that the journal does not know yet done by the workers; `tick` is told of each that is done."""

    def __init__(self, journal: Journal, workers: Workers, tick: Tick) -> None:
        self.journal = journal
        self.workers = workers
        self.tick = tick

    def run(self, jobs: list[Job]) -> list[Evaluation]:
        """Evaluations of the jobs, in their order; each is in the journal as soon as it is known."""
        found: dict[int, Evaluation] = {}
        missing: list[int] = []
        for place, job in enumerate(jobs):
            earlier = self.journal.find(job.stage, job.regime, job.mode, job.index)
            if earlier is None:
                missing.append(place)
                continue
            point, found[place] = earlier
            if any(abs(a - b) > 1e-9 for a, b in zip(point, job.point, strict=True)):
                raise OptionsError(
                    f"{self.journal.path}: the search can't be continued: evaluation {job.index} of {job.regime} "
                    f"{job.mode} was at another point. Was it begun with another version of nevergrad? "
                    "Its first line says which; use that one, or another output."
                )
            self._tick(job, found[place])
        todo = [jobs[place] for place in missing]
        for number, evaluation in self.workers.run(run_job, todo, _name):
            place, job = missing[number], todo[number]
            self.journal.write(job.stage, job.regime, job.mode, job.index, job.point, evaluation)
            found[place] = evaluation
            self._tick(job, evaluation)
        return [found[place] for place in range(len(jobs))]

    def _tick(self, job: Job, evaluation: Evaluation) -> None:
        shown = f"loss {evaluation.loss:.3g}" if evaluation.status == "ok" else evaluation.status
        self.tick(f"{job.regime} {job.mode} {shown if job.stage == 'search' else job.stage}")


def _name(job: Job) -> str:
    return f"evaluation {job.index} of {job.regime} {job.mode} ({job.stage})"


@dataclass(frozen=True)
class Winners:
    """The best evaluation of every search, by (regime, mode), the same on what no search saw, and the sweeps.

    Regimes of which all was searched on are not in `held_out`.
    """

    tuned: dict[tuple[str, str], Evaluation]
    held_out: dict[tuple[str, str], Evaluation]
    sweeps: dict[tuple[str, str], list[Evaluation]]


def anything(task: Task) -> Winners:
    """What a search of the task might give, in form: to check what is made of it before it runs."""
    static, dynamic = ({**DEFAULTS, **Space(task, mode).fixed, "sparsity": task.sparsity} for mode in MODES)
    tables = {"static_ratio": static, "dynamic_threshold": {"criterion": "ratio", **dynamic, "near": 1.0, "far": 1.0}}
    found = {(regime, mode): Evaluation(tables[mode], "ok", loss=0.0) for regime, mode in task.searches}
    return Winners(found, found, {})


def count_evaluations(task: Task) -> int:
    """Evaluations of a whole run of `search`."""
    held_out = sum(task.holds_out(regime) for regime, _ in task.searches)
    return len(task.searches) * (task.budget + len(SWEEP)) + held_out


def search(task: Task, runner: Runner) -> Winners:
    """Run all searches of a task. Raises OptionsError if a search has no valid point at all."""
    best: dict[tuple[str, str], Evaluation] = {}
    for regime, mode in task.searches:
        best[regime, mode] = _search_one(task, runner, regime, mode, best.get((regime, "static_ratio")))
    before = dict(best)
    sweeps, held_out = {}, {}
    for regime in REGIMES:
        for mode in task.modes:
            best[regime, mode] = _exchange(task, runner, regime, mode, before, best)
        for mode in task.modes:
            table = best[regime, mode].parameters
            jobs = []
            for index, sparsity in enumerate(SWEEP):
                scaled = {**table, "sparsity": _swept(table["sparsity"], task.sparsity, sparsity)}
                jobs.append(Job(task, "sweep", regime, mode, index, parameters=scaled))
            sweeps[regime, mode] = runner.run(jobs)
    for regime, mode in task.searches:
        if task.holds_out(regime):
            (held_out[regime, mode],) = runner.run(
                [Job(task, "held_out", regime, mode, 0, parameters=best[regime, mode].parameters)]
            )
    return Winners(best, held_out, sweeps)


def _swept(table: float, target: float, wanted: float) -> float:
    """The plan's sparsity, moved from the target to another one; a table's own may be that of a larger set."""
    return round(min(1.0, max(0.0, 1.0 - (1.0 - table) * (1.0 - wanted) / (1.0 - target))), 6)


def check_optimizer(task: Task) -> None:
    """Raises OptionsError if the optimizer can't search the spaces of a task, and DynamicRadError without nevergrad."""
    for regime, mode in task.searches[: len(task.modes)]:
        try:
            _optimizer(task, regime, mode, None)
        except DynamicRadError:
            raise
        except Exception as error:  # Nevergrad's own, for a space or a number of workers that it can't have
            raise OptionsError(f"optimizer {task.optimizer!r} can't be used here: {error}") from None


def _optimizer(task: Task, regime: str, mode: str, static: Evaluation | None) -> Optimizer:
    """The optimizer of one search, which begins at known points."""
    space = Space(task, mode)
    known = space.known_points(static.parameters if static else None)
    seed = task.seed * 1000 + 10 * REGIMES.index(regime) + (mode == "dynamic_threshold")
    return Optimizer(task.optimizer, len(space.dimensions), task.budget - EXCHANGED, seed, task.batch, known)


def _search_one(task: Task, runner: Runner, regime: str, mode: str, static: Evaluation | None) -> Evaluation:
    """The optimizer's part of one search: the budget without the points that are kept for the exchange."""
    budget = task.budget - EXCHANGED
    optimizer = _optimizer(task, regime, mode, static)
    results: list[Evaluation] = []
    while len(results) < budget:
        asked = [optimizer.ask() for _ in range(min(task.batch, budget - len(results)))]
        jobs = [Job(task, "search", regime, mode, len(results) + i, point) for i, (_, point) in enumerate(asked)]
        for (candidate, _), evaluation in zip(asked, runner.run(jobs), strict=True):
            optimizer.tell(candidate, evaluation.loss)
            results.append(evaluation)
    winner = min(results, key=lambda found: found.loss)
    if winner.status != "ok":
        reasons = sorted({found.reason for found in results})
        raise OptionsError(f"{regime} {mode}: every point was pruned. {' '.join(reasons)}")
    return winner


def _exchange(
    task: Task,
    runner: Runner,
    regime: str,
    mode: str,
    before: dict[tuple[str, str], Evaluation],
    now: dict[tuple[str, str], Evaluation],
) -> Evaluation:
    """The last points of a budget: the other regimes' winners, so that none of them is better here than our own.

    In dynamic_threshold also the static winner's plan, as candidates that are all kept.
    """
    tables: list[Parameters] = [before[other, mode].parameters for other in REGIMES if other != regime]
    if mode == "dynamic_threshold":
        static: dict[str, Any] = now[regime, "static_ratio"].parameters
        choice = {"criterion": "ratio", "rank": "mass"} | {
            name: task.fixed[name] for name in CHOICES if name in task.fixed
        }
        near, far = KEEP_ALL[choice["criterion"]]
        tables.append({**static, **choice, "near": near, "far": far})
    else:
        tables.append(Space(task, mode).without_compensation(before[regime, mode].parameters))
    first = task.budget - EXCHANGED
    jobs = [Job(task, "search", regime, mode, first + i, parameters=table) for i, table in enumerate(tables)]
    return min([before[regime, mode], *runner.run(jobs)], key=lambda found: found.loss)
