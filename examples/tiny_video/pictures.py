"""Videos as files: contact sheets, animations, the loss curve. Needs pillow; the curve needs matplotlib."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch


def to_uint8(video: torch.Tensor) -> np.ndarray:
    """[3, frames, height, width] in -1..1 to [frames, height, width, 3] bytes."""
    scaled = (video.detach().float().cpu().clamp(-1, 1) + 1) * 127.5
    return scaled.round().byte().permute(1, 2, 3, 0).numpy()


def contact_sheet(videos: torch.Tensor, captions: Sequence[str], path: str | os.PathLike[str], every: int = 2) -> None:
    """PNG with a row of frames, every second one, for each video [batch, 3, frames, height, width], caption above."""
    from PIL import Image, ImageDraw

    scale, gap, text = 3, 3, 14
    rows = [to_uint8(video)[::every] for video in videos]
    height, width = rows[0].shape[1] * scale, rows[0].shape[2] * scale
    sheet = Image.new("RGB", (len(rows[0]) * (width + gap), len(rows) * (height + text + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (frames, caption) in enumerate(zip(rows, captions, strict=True)):
        top = i * (height + text + gap)
        draw.text((2, top + 1), caption, fill="black")
        for j, frame in enumerate(frames):
            picture = Image.fromarray(frame).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(picture, (j * (width + gap), top + text))
    sheet.save(path)


def animation(columns: Sequence[Sequence[Any]], path: str | os.PathLike[str], scale: int = 4, fps: int = 8) -> None:
    """Animation (.gif or .webp) with the videos [3, frames, height, width] of each column below one another."""
    from PIL import Image

    stacked = np.concatenate([np.concatenate([to_uint8(v) for v in column], axis=1) for column in columns], axis=2)
    stacked = stacked.repeat(scale, axis=1).repeat(scale, axis=2)
    pictures = [Image.fromarray(frame) for frame in stacked]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=1000 // fps, loop=0)


def comparison(
    columns: dict[str, torch.Tensor],
    captions: Sequence[str],
    path: str | os.PathLike[str],
    scale: int = 5,
    fps: int = 8,
) -> None:
    """Animation (.gif or .webp): a named column for each set of videos, a row for each caption, all in step.

    columns: name to videos [batch, 3, frames, height, width] in -1..1, all of one shape.
    """
    from PIL import Image, ImageDraw

    gap, text = 4, 16
    clips = {name: [to_uint8(video) for video in videos] for name, videos in columns.items()}
    frames, height, width = next(iter(clips.values()))[0].shape[:3]
    height, width = height * scale, width * scale
    size = (max(len(clips) * (width + gap), 6 * max(map(len, captions)) + gap), text + len(captions) * (height + text))
    pictures = []
    for i in range(frames):
        picture = Image.new("RGB", size, "white")
        draw = ImageDraw.Draw(picture)
        for x, (name, videos) in enumerate(clips.items()):
            draw.text((x * (width + gap) + 2, 2), name, fill="black")
            for y, video in enumerate(videos):
                frame = Image.fromarray(video[i]).resize((width, height), Image.Resampling.NEAREST)
                picture.paste(frame, (x * (width + gap), text + y * (height + text) + text))
        for y, caption in enumerate(captions):
            draw.text((2, text + y * (height + text) + 2), caption, fill="black")
        pictures.append(picture)
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=1000 // fps, loop=0)


def side_by_side(
    left: torch.Tensor,
    right: torch.Tensor,
    titles: tuple[str, str],
    notes: tuple[Sequence[str], Sequence[str]],
    footers: tuple[str, str],
    path: str | os.PathLike[str],
    fps: int = 8,
) -> None:
    """Animation (.gif or .webp) of two sets of the same clips, and one of its last frames as a PNG beside it.

    left, right  videos [batch, 3, frames, height, width] in -1..1; clips are about 190 pixels wide
    titles       above each set; footers: below it
    notes        a line or two below each clip of a set
    """
    from PIL import Image, ImageDraw, ImageFont

    sets = [[to_uint8(video) for video in videos] for videos in (left, right)]
    count, frames, size = len(left), left.shape[2], 192
    across = math.ceil(math.sqrt(count))
    down = math.ceil(count / across)
    gap, note, title, middle = 8, 34, 34, 28
    block = across * (size + gap) - gap
    shape = (2 * block + middle + 2 * gap, title + down * (size + note) + title)
    large, small = ImageFont.load_default(18), ImageFont.load_default(11)
    pictures = []
    for frame in range(frames):
        picture = Image.new("RGB", shape, "white")
        draw = ImageDraw.Draw(picture)
        for side, clips in enumerate(sets):
            x = gap + side * (block + middle)
            draw.text((x, 6), titles[side], fill="black", font=large)
            draw.text((x, shape[1] - title + 4), footers[side], fill="black", font=large)
            for i, clip in enumerate(clips):
                corner = (x + i % across * (size + gap), title + i // across * (size + note))
                shown = Image.fromarray(clip[frame]).resize((size, size), Image.Resampling.BICUBIC)
                picture.paste(shown, corner)
                lines = textwrap.wrap(notes[side][i], 36)[:2]
                draw.multiline_text((corner[0], corner[1] + size + 2), "\n".join(lines), fill="#444", font=small)
        pictures.append(picture)
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=1000 // fps, loop=0, quality=80)
    pictures[-2].save(Path(path).with_suffix(".png"))


def loss_curve(rows: Sequence[dict[str, float]], path: str | os.PathLike[str]) -> None:
    """PNG of the training loss (smoothed) and the validation loss over the steps, from the rows of log.jsonl."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    train = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    held_out = [(row["step"], row["held_out"]) for row in rows if "held_out" in row]
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for points, label in ((train, "training (mean of 20 steps)"), (held_out, "held out, EMA weights")):
        if points:
            axes.plot(*zip(*points, strict=True), label=label, linewidth=1.2)
    axes.set(xlabel="step", ylabel="flow-matching loss", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    partial = Path(path).with_suffix(".partial.png")
    figure.savefig(partial, dpi=110)
    partial.replace(path)
