"""Pictures of an evaluation: clips side by side as a GIF, and error against sparsity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import DynamicRadError
from ..files import whole_file
from ..optional import optional
from ..reporting.figure import new_figure, save_figure
from .harness import Results
from .metrics import check_clips

COLORS = {
    "dense": "#444444",
    "radial": "#d9822b",
    "static_ratio": "#2a78b5",
    "dynamic_threshold": "#2f9e44",
    "random": "#999999",
    "oracle": "#9c36b5",
}
LABEL = 14  # pixels above each clip


def figure(columns: int, title: str, rows: int = 1, height: float = 4.0) -> tuple[Any, list[Any]]:
    """A figure of `height` inches a row and its axes, with a faint grid. Raises DynamicRadError without matplotlib."""
    made, axes = new_figure(title, (5.0 * columns, height * rows), rows, columns, "eval")
    for axis in axes:
        axis.grid(alpha=0.25)
    return made, axes


def save_pareto(results: Results, path: str | Path) -> None:
    """Quality against sparsity, one line a method: PSNR and feature distance to dense, Frechet distance to real."""
    panels = [("psnr", "PSNR to dense, dB"), ("feature", "feature distance to dense")]
    real = any(row.frechet_real == row.frechet_real and row.method == "dense" for row in results.rows)
    panels.append(
        ("frechet_real", "Frechet distance to real") if real else ("frechet_dense", "Frechet distance to dense")
    )
    made, axes = figure(len(panels), f"{results.subject}, {len(results.seeds)} clips")
    names = [n for n in dict.fromkeys(row.method for row in results.rows) if n not in ("real", "dense")]
    for axis, (column, label) in zip(axes, panels, strict=True):
        for name in names:
            found = sorted((row.sparsity, getattr(row, column)) for row in results.rows if row.method == name)
            axis.plot(*zip(*found, strict=True), "o-", color=COLORS.get(name), label=name)
        for row in results.rows:
            if row.method == "dense" and column == "frechet_real":
                axis.axhline(row.frechet_real, color=COLORS["dense"], linestyle=":", label="dense")
        axis.set_xlabel("share of the whole run's attention that is skipped")
        axis.set_ylabel(label)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize=8)
    save_figure(made, path)


def save_gif(
    clips: Mapping[str, Tensor], path: str | Path, *, titles: Sequence[str] = (), scale: int = 4, fps: float = 8.0
) -> None:
    """An endless GIF: a column for each label, a row for each clip; `titles`, one a row, stand above the rows.

    clips: float [N, F, C, H, W] in 0..1, equal shapes. Frames are enlarged `scale` times. Raises DynamicRadError.
    """
    Image, ImageDraw = (optional(f"PIL.{name}", "GIFs need", "eval") for name in ("Image", "ImageDraw"))
    columns = {name: check_clips(clip, name) for name, clip in clips.items()}
    shapes = {tuple(clip.shape) for clip in columns.values()}
    if len(shapes) != 1:
        raise DynamicRadError(f"clips side by side must have equal shapes, got {sorted(shapes)}.")
    rows, frames, _, height, width = shapes.pop()
    above = LABEL if titles else 0
    wide, high = width * scale + 4, height * scale + 4 + above
    pictures = []
    for frame in range(frames):
        sheet = Image.new("RGB", (wide * len(columns) + 4, high * rows + LABEL), "white")
        draw = ImageDraw.Draw(sheet)
        for column, (name, clip) in enumerate(columns.items()):
            draw.text((column * wide + 4, 1), name, fill="black")
            for row in range(rows):
                pixels = (clip[row, frame].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
                pixels = np.repeat(pixels, 3, 2) if pixels.shape[2] == 1 else pixels
                tile = Image.fromarray(pixels).resize((width * scale, height * scale), Image.Resampling.NEAREST)
                sheet.paste(tile, (column * wide + 4, row * high + LABEL + above))
        for row, title in enumerate(titles[:rows]):
            draw.text((4, row * high + LABEL + 1), title, fill="gray")
        pictures.append(sheet)
    with whole_file(path) as partial:
        pictures[0].save(
            partial, format="GIF", save_all=True, append_images=pictures[1:], duration=round(1000 / fps), loop=0
        )


def read_clip(path: str | Path) -> Tensor:
    """The frames of a GIF, WebP or PNG animation as float [1, F, 3, H, W]. Raises DynamicRadError if it is none."""
    import torch

    image, sequence = (optional(f"PIL.{name}", "reading clips needs", "eval") for name in ("Image", "ImageSequence"))
    try:
        with image.open(path) as picture:
            frames = [np.asarray(frame.convert("RGB")) for frame in sequence.Iterator(picture)]
    except image.UnidentifiedImageError:
        raise DynamicRadError(f"{path} is not a picture that Pillow can read; expected a GIF, WebP or APNG.") from None
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)[None].float() / 255.0
