"""The loss curve."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from ..files import write_file
from ..reporting.figure import new_figure

COLORS = {"flow": "#2a78b5", "distill": "#d9822b", "held_out": "#b5322a"}
NAMES = {
    "flow": "flow matching",
    "distill": "distance to the dense teacher",
    "held_out": "held out, with standard error",
}


def plot_losses(lines: list[dict[str, Any]], path: Path, title: str) -> None:
    """Losses against steps from a journal's lines: dots, their running mean, and the loss on held-out clips."""
    figure, (axis,) = new_figure("", (8, 4.2), 1, 1, "lora")
    for key in ("flow", "distill"):
        points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
        if not points:
            continue
        steps, values = zip(*points, strict=True)
        axis.plot(steps, values, ".", color=COLORS[key], alpha=0.25, markersize=4)
        axis.plot(steps, running_mean(values, max(1, len(values) // 20)), color=COLORS[key], label=NAMES[key])
    held = [(line["step"], *line["held_out"]) for line in lines if "held_out" in line]
    if held:
        steps, means, errors = zip(*held, strict=True)
        axis.errorbar(steps, means, errors, color=COLORS["held_out"], marker="o", capsize=3, label=NAMES["held_out"])
    axis.set_yscale("log")
    axis.set_xlabel("step")
    axis.set_ylabel("mean squared error")
    axis.set_title(title)
    axis.grid(alpha=0.25)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120, format="png")
    write_file(path, buffer.getvalue())


def running_mean(values: tuple[float, ...], width: int) -> list[float]:
    """Mean of the last `width` values at each place, of those there are at the start."""
    return [sum(values[max(0, i + 1 - width) : i + 1]) / min(width, i + 1) for i in range(len(values))]
