"""Figures of matplotlib that need no display."""

from __future__ import annotations

import os
from typing import Any

from ..files import whole_file
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


def save_figure(figure: Any, path: str | os.PathLike[str]) -> None:
    """Write a figure as a picture of the kind that the path ends in, whole or not at all."""
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=120)
