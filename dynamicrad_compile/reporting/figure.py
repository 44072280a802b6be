"""Figures of matplotlib that need no display."""

from __future__ import annotations

from typing import Any

from ..optional import optional


def new_figure(title: str, size: tuple[float, float], rows: int, columns: int, extra: str) -> tuple[Any, list[Any]]:
    """A figure of `size` inches in all, and its rows x columns axes, row by row.

    Raises DynamicRadError without matplotlib, which the extra `extra` installs.
    """
    canvas = optional("matplotlib.backends.backend_agg", "pictures need", extra)
    figure = optional("matplotlib.figure", "pictures need", extra).Figure(figsize=size, layout="constrained")
    canvas.FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flatten())
