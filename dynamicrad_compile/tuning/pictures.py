"""Two pictures of a search. Need matplotlib (extra `tune`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..profiles import REGIMES
from ..reporting.figure import new_figure, save_figure
from .journal import Journal
from .objective import Evaluation
from .task import Task

COLORS = {"low": "#2a78b5", "mid": "#d9822b", "high": "#b5322a"}
MARKS = {"static_ratio": ("o", "-"), "dynamic_threshold": ("^", "--")}


def _figure(task: Task, title: str, columns: int) -> tuple[Any, list[Any]]:
    grid = "x".join(map(str, task.grid))
    full = f"{title}: {grid}, blocks of {task.block_size}, {task.optimizer}, {' + '.join(task.proxies)} proxy"
    return new_figure(full, (5.2 * columns, 4.2), 1, columns, "tune")


def plot_convergence(journal: Journal, task: Task, path: Path) -> None:
    """Best loss so far against the number of evaluations, one line for each regime and mode; dots are evaluations."""
    figure, axes = _figure(task, "Convergence", len(REGIMES))
    for axis, regime in zip(axes, REGIMES, strict=True):
        for mode in task.modes:
            found = _of(journal, "search", regime, mode)
            losses = [e.loss if e.status == "ok" else float("nan") for e in found]
            best: list[float] = []
            for evaluation in found:
                best.append(min(evaluation.loss, best[-1] if best else float("inf")))
            mark, line = MARKS[mode]
            number = range(1, len(found) + 1)
            axis.plot(number, losses, mark, color=COLORS[regime], alpha=0.3, markersize=4)
            axis.step(number, best, line, where="post", color=COLORS[regime], label=mode)
        _finish(axis, regime, "evaluations", "loss (1000 x normalised MSE + penalty)")
        axis.set_yscale("log")
    save_figure(figure, path)


def plot_pareto(journal: Journal, task: Task, path: Path) -> None:
    """Error against sparsity: all evaluated points, and the winners at other sparsities as lines."""
    figure, axes = _figure(task, "Error against sparsity", len(REGIMES))
    for axis, regime in zip(axes, REGIMES, strict=True):
        for mode in task.modes:
            mark, line = MARKS[mode]
            points = [e for e in _of(journal, "search", regime, mode) if e.status == "ok"]
            x, y = [e.sparsity for e in points], [e.error for e in points]
            axis.plot(x, y, mark, color=COLORS[regime], alpha=0.35, markersize=4)
            swept = [e for e in _of(journal, "sweep", regime, mode) if e.status == "ok"]
            swept.sort(key=lambda e: e.sparsity)
            axis.plot(
                [e.sparsity for e in swept],
                [e.error for e in swept],
                line,
                color=COLORS[regime],
                label=f"{mode} winner",
            )
        axis.axvline(task.sparsity, color="grey", linewidth=0.8, linestyle=":")
        _finish(axis, regime, "share of dense attention skipped", "normalised MSE")
        axis.set_yscale("log")
    save_figure(figure, path)


def _of(journal: Journal, stage: str, regime: str, mode: str) -> list[Evaluation]:
    found = [(place[3], e) for place, e in journal.evaluations(stage) if place[1:3] == (regime, mode)]
    return [evaluation for _, evaluation in sorted(found, key=lambda item: item[0])]


def _finish(axis: Any, regime: str, x: str, y: str) -> None:
    axis.set_title(f"{regime} motion")
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8)
