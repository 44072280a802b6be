"""Captioned video clips, drawn by a few formulas: coloured shapes that stand, slide, bounce, spin, behind a camera.

A clip is a function of (seed, index): the same pair gives the same caption and pixels on every machine, whatever else
is asked for. Motion is a function of time, so a longer clip is the shorter one continued. How much moves is known by
construction: each motion belongs to a regime, "low", "mid" or "high", in the sense of the motion router's labels
(dynamicrad_compile/routing/corpus.py), and captions use the words found there.

    A red circle stands still on a blue background.                                          low
    A striped yellow square slides left on a gray background behind a white bar.             mid
    A green triangle spins fast and darts right on a black background.                       high
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

SIZE = 32  # pixels, both sides
FRAMES = 16  # of a training clip
WORLD = 48.0  # a shape that has left the picture comes back after this many pixels
HELD_OUT_SEED = 10_007  # never trained on

COLORS = {
    "red": (0.95, 0.15, 0.12),
    "green": (0.20, 0.80, 0.25),
    "blue": (0.20, 0.35, 1.00),
    "yellow": (1.00, 0.88, 0.15),
    "purple": (0.75, 0.25, 0.90),
    "orange": (1.00, 0.55, 0.10),
    "white": (1.00, 1.00, 1.00),
}
BACKGROUNDS = {
    "black": (0.08, 0.08, 0.08),
    "gray": (0.45, 0.45, 0.45),
    "blue": (0.10, 0.16, 0.42),
    "green": (0.08, 0.34, 0.16),
}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
REGIMES = ("low", "mid", "high")
# Words of each motion; {d} is a direction out of the second entry.
MOTIONS = {
    "low": {
        "still": ("stands still", ()),
        "pulse": ("pulses slowly", ()),
        "drift": ("drifts slowly {d}", ("left", "right", "up", "down")),
    },
    "mid": {
        "slide": ("slides {d}", ("left", "right", "up", "down")),
        "grow": ("grows and shrinks", ()),
        "stretch": ("stretches and squashes", ()),
        "rotate": ("rotates", ()),
        "pan": ("stands as the camera pans {d}", ("left", "right")),
    },
    "high": {
        "bounce": ("bounces quickly", ()),
        "dart": ("spins fast and darts {d}", ("left", "right")),
        "flicker": ("flickers quickly", ()),
        "whip": ("stands as the camera pans fast {d}", ("left", "right")),
        "zoom": ("stands as the camera zooms fast", ()),
    },
}


@dataclass(frozen=True)
class Clip:
    """What is in a clip; `render` draws it. Lengths in pixels, time in frames, angles in radians."""

    shape: str
    color: str
    background: str
    regime: str
    motion: str
    direction: str
    striped: bool
    bar: str  # colour of a bar in front of the shape, or ""
    center: tuple[float, float]
    radius: float
    phase: float
    bar_at: float
    pattern_at: float

    @property
    def caption(self) -> str:
        """The sentence the model is trained on."""
        phrase = MOTIONS[self.regime][self.motion][0].format(d=self.direction)
        striped = "striped " if self.striped else ""
        bar = f" behind a {self.bar} bar" if self.bar else ""
        article = "An" if self.color == "orange" and not striped else "A"
        return f"{article} {striped}{self.color} {self.shape} {phrase} on a {self.background} background{bar}."


def clip(seed: int, index: int) -> Clip:
    """The clip number `index` of the data set `seed`."""
    rng = np.random.default_rng([seed, index])
    regime = REGIMES[rng.integers(len(REGIMES))]
    motions = list(MOTIONS[regime])
    motion = motions[rng.integers(len(motions))]
    striped = bool(rng.random() < 0.15)
    shapes = SHAPES[1:] if motion == "rotate" and not striped else SHAPES  # a plain circle does not seem to rotate
    shape = shapes[rng.integers(len(shapes))]
    color = list(COLORS)[rng.integers(len(COLORS))]
    backgrounds = [name for name in BACKGROUNDS if name != color]
    background = backgrounds[rng.integers(len(backgrounds))]
    bars = [name for name in COLORS if name not in (color, background)]
    bar = bars[rng.integers(len(bars))] if rng.random() < 0.2 else ""
    choices = MOTIONS[regime][motion][1]
    direction = choices[rng.integers(len(choices))] if choices else ""
    x, y = rng.uniform(10, SIZE - 10, 2)
    if motion in ("slide", "pan"):  # start where most of the way is in the picture
        sign = np.array(DIRECTIONS[direction]) * (1 if motion == "slide" else -1)
        x, y = np.where(sign == 0, (x, y), SIZE / 2 - sign * rng.uniform(8, 14))
    return Clip(
        shape, color, background, regime, motion, direction, striped, bar,
        center=(float(x), float(y)),
        radius=float(rng.uniform(6.0, 7.5)),
        phase=float(rng.uniform(0, 2 * np.pi)),
        bar_at=float(rng.uniform(10, SIZE - 10)),
        pattern_at=float(rng.uniform(0, 2 * np.pi)),
    )  # fmt: skip


def captions(count: int, seed: int = HELD_OUT_SEED, start: int = 0, regime: str | None = None) -> list[str]:
    """Captions of the first `count` clips from `start` on, of one regime if wanted."""
    found: list[str] = []
    while len(found) < count:
        item = clip(seed, start)
        start += 1
        if regime in (None, item.regime):
            found.append(item.caption)
    return found


def batch(seed: int, indices: Sequence[int], frames: int = FRAMES, size: int = SIZE) -> tuple[torch.Tensor, list[str]]:
    """Videos [batch, 3, frames, size, size], float32 in -1..1, and their captions."""
    clips = [clip(seed, index) for index in indices]
    return torch.from_numpy(np.stack([render(item, frames, size=size) for item in clips])), [
        item.caption for item in clips
    ]


def vocabulary() -> list[str]:
    """All words of the captions, sorted."""
    words = {"a", "an", "striped", "on", "background", "behind", "bar"}
    words |= {*COLORS, *BACKGROUNDS, *SHAPES, *DIRECTIONS}
    for motions in MOTIONS.values():
        for phrase, _ in motions.values():
            words |= set(phrase.replace("{d}", "").split())
    return sorted(words)


def render(item: Clip, frames: int = FRAMES, start: float = 0.0, size: int = SIZE) -> np.ndarray:
    """Pixels [3, frames, size, size] of a clip from the time `start` on, float32 in -1..1, anti-aliased.

    The scene is SIZE wide whatever the size: more pixels show the same in more detail.
    """
    time = (start + np.arange(frames, dtype=np.float32))[:, None, None]
    move = _movement(item, time)
    cell = SIZE / size
    pixel = (np.arange(size, dtype=np.float32) + 0.5) * cell - SIZE / 2
    x = pixel[None, None, :] / move["zoom"] + move["camera"] + SIZE / 2
    y = pixel[None, :, None] / move["zoom"] + SIZE / 2 + 0 * move["camera"]

    base = np.array(BACKGROUNDS[item.background], np.float32)[:, None, None, None]
    image = base + 0.07 * np.sin((x + y) * (2 * np.pi / 16) + item.pattern_at)

    u, v = _wrap(x - move["x"]), _wrap(y - move["y"])
    cos, sin = np.cos(move["angle"]), np.sin(move["angle"])
    u, v = (u * cos + v * sin) / move["stretch"], (v * cos - u * sin) * move["stretch"]
    edge = _distance(item.shape, u, v, item.radius * move["scale"])
    cover = np.clip(0.5 - edge * move["zoom"] / cell, 0, 1) * move["opacity"]
    light = 0.7 + 0.3 * np.sin(u * (2 * np.pi / 6)) if item.striped else 1.0
    color = np.array(COLORS[item.color], np.float32)[:, None, None, None] * light
    image = image + cover * (color - image)

    if item.bar:
        cover = np.clip(0.5 + (2.5 - np.abs(_wrap(x - item.bar_at)) * move["zoom"]) / cell, 0, 1)
        image = image + cover * (np.array(COLORS[item.bar], np.float32)[:, None, None, None] * 0.8 - image)
    return (np.clip(image, 0, 1) * 2 - 1).astype(np.float32)


def _movement(item: Clip, t: np.ndarray) -> dict[str, np.ndarray]:
    """Position, angle, scale, stretch and opacity of the shape, camera offset and zoom, at the times t."""
    zero, one = np.zeros_like(t), np.ones_like(t)
    move = {"x": zero + item.center[0], "y": zero + item.center[1], "camera": zero}
    move |= {"angle": zero, "scale": one, "stretch": one, "opacity": one, "zoom": one}

    def wave(period: float) -> np.ndarray:
        return np.sin(2 * np.pi * t / period + item.phase)

    dx, dy = DIRECTIONS.get(item.direction, (0.0, 0.0))
    if item.motion in ("drift", "slide"):
        speed = 0.25 if item.motion == "drift" else 1.25
        move |= {"x": move["x"] + speed * dx * t, "y": move["y"] + speed * dy * t}
    elif item.motion == "pulse":
        move["scale"] = 1 + 0.1 * wave(24)
    elif item.motion == "grow":
        move["scale"] = 1 + 0.4 * wave(16)
    elif item.motion == "stretch":
        move["stretch"] = np.exp(0.35 * wave(12))
    elif item.motion == "rotate":
        move["angle"] = item.phase + t * np.float32(np.pi / 15)
    elif item.motion in ("pan", "whip"):
        move["camera"] = (1.25 if item.motion == "pan" else 3.5) * dx * t
    elif item.motion == "bounce":
        move["y"] = SIZE - 9 - 15 * np.abs(np.sin(np.pi * t / 8 + item.phase / 2))
    elif item.motion == "dart":
        move |= {"x": move["x"] + 3.0 * dx * t, "angle": item.phase + dx * t * np.float32(np.pi / 6)}
    elif item.motion == "flicker":
        move["opacity"] = 0.55 + 0.45 * np.clip(3 * wave(4), -1, 1)
    elif item.motion == "zoom":
        move["zoom"] = 1.35 + 0.35 * wave(8)
    return move


def _wrap(offset: np.ndarray) -> np.ndarray:
    return (offset + WORLD / 2) % WORLD - WORLD / 2


def _distance(shape: str, u: np.ndarray, v: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Distance from the outline in pixels, negative inside; the area is about that of a circle of this radius."""
    if shape == "circle":
        return np.sqrt(u * u + v * v) - radius
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) - 0.88 * radius
    side = 0.866 * np.abs(u) - 0.5 * v  # triangle, pointing up
    return np.maximum(side, v) - 0.7 * radius
