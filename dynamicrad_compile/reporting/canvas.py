"""What pictures are drawn on: pixels of pillow (extra "plot"), or shapes of SVG, which need nothing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol
from xml.sax.saxutils import escape

import numpy as np

from ..errors import PlanError
from ..files import whole_file, write_file
from ..optional import optional

Color = tuple[int, ...]
"""Red, green, blue, and opacity if there is a fourth; each 0 to 255."""
Point = tuple[float, float]

FONT, SMALL = 15, 13
PAPER = (255, 255, 255)
PIXELS = {
    "": "PNG",
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".gif": "GIF",
    ".bmp": "BMP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".pdf": "PDF",
}
"""Endings of file names and what pillow calls the kinds of pictures; ".svg" is the other one."""


class Canvas(Protocol):
    """Coordinates are pixels from the upper left corner; anchors of texts are pillow's, such as "la" or "mt"."""

    def cells(self, colors: np.ndarray, corner: Point, scale: int) -> None:
        """A grid [rows, columns, 3] of squares of `scale` pixels."""

    def line(self, begin: Point, end: Point, color: Color) -> None: ...

    def rectangle(self, begin: Point, end: Point, fill: Color | None = None, outline: Color | None = None) -> None: ...

    def text(self, at: Point, text: str, color: Color, anchor: str = "la", small: bool = False) -> None: ...

    def upward_text(self, at: Point, text: str, color: Color) -> None:
        """Text that reads upwards, its middle at `at`."""

    def width(self, text: str) -> float:
        """Width of a small text."""

    def save(self, path: str | os.PathLike[str]) -> None: ...


def canvas_for(path: str | os.PathLike[str], size: tuple[int, int]) -> Canvas:
    """An empty canvas for a picture of the kind that the path ends in; without an ending it is a PNG.

    Raises PlanError for an ending that is not known, and where pillow is needed and missing.
    """
    check_picture(path)
    return _Svg(size) if Path(path).suffix.lower() == ".svg" else _Pixels(size)


def check_picture(path: str | os.PathLike[str]) -> None:
    """Raises PlanError if no picture of the kind that the path ends in can be drawn here."""
    suffix = Path(path).suffix.lower()
    if suffix == ".svg":
        return
    if suffix not in PIXELS:
        known = ", ".join([".svg", *filter(None, PIXELS)])
        raise PlanError(f"{path}: the ending of the file says what kind of picture it is; known: {known}.")
    _pillow()


def _pillow() -> tuple[Any, Any, Any]:
    parts = ("PIL.Image", "PIL.ImageDraw", "PIL.ImageFont")
    image, draw, font = (optional(part, "plots need", "plot", PlanError) for part in parts)
    return image, draw, font


class _Pixels:
    """A canvas of pillow."""

    def __init__(self, size: tuple[int, int]) -> None:
        self._image, self._draw, fonts = _pillow()
        self.font, self.small = fonts.load_default(FONT), fonts.load_default(SMALL)
        self.image = self._image.new("RGB", size, PAPER)
        self.draw = self._draw.Draw(self.image, "RGBA")

    def cells(self, colors: np.ndarray, corner: Point, scale: int) -> None:
        rows, columns = colors.shape[:2]
        cells = self._image.fromarray(np.round(colors).astype(np.uint8))
        cells = cells.resize((columns * scale, rows * scale), self._image.Resampling.NEAREST)
        self.image.paste(cells, (round(corner[0]), round(corner[1])))

    def line(self, begin: Point, end: Point, color: Color) -> None:
        self.draw.line([begin, end], fill=color)

    def rectangle(self, begin: Point, end: Point, fill: Color | None = None, outline: Color | None = None) -> None:
        self.draw.rectangle([begin, end], fill=fill, outline=outline)

    def text(self, at: Point, text: str, color: Color, anchor: str = "la", small: bool = False) -> None:
        self.draw.text(at, text, fill=color, font=self.small if small else self.font, anchor=anchor)

    def upward_text(self, at: Point, text: str, color: Color) -> None:
        strip = self._image.new("RGB", (round(self.font.getlength(text)) + 4, 22), PAPER)
        self._draw.Draw(strip).text((strip.width / 2, 11), text, fill=color, font=self.font, anchor="mm")
        turned = strip.rotate(90, expand=True)
        self.image.paste(turned, (round(at[0] - turned.width / 2), round(at[1] - turned.height / 2)))

    def width(self, text: str) -> float:
        return float(self.small.getlength(text))

    def save(self, path: str | os.PathLike[str]) -> None:
        with whole_file(path) as partial:
            self.image.save(partial, format=PIXELS[Path(path).suffix.lower()])


ANCHORS = {"l": "start", "m": "middle", "r": "end"}
BASELINES = {"a": "hanging", "t": "hanging", "m": "central"}


class _Svg:
    """A canvas of shapes."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size
        self.shapes: list[str] = []

    def cells(self, colors: np.ndarray, corner: Point, scale: int) -> None:
        """One path a colour: a rectangle for each run of cells in a row."""
        paths: dict[tuple[int, ...], list[str]] = {}
        for y, row in enumerate(np.round(colors).astype(int)):
            starts = np.flatnonzero(np.append(True, (row[1:] != row[:-1]).any(-1)))
            for x, end in zip(starts, [*starts[1:], len(row)], strict=True):
                paths.setdefault(tuple(row[x].tolist()), []).append(f"M{x} {y}h{end - x}v1h{x - end}z")
        place = f"translate({corner[0]:g} {corner[1]:g}) scale({scale})"
        self.shapes.append(f'<g transform="{place}" shape-rendering="crispEdges">')
        self.shapes += [f'<path d="{"".join(runs)}"{_paint("fill", color)}/>' for color, runs in paths.items()]
        self.shapes.append("</g>")

    def line(self, begin: Point, end: Point, color: Color) -> None:
        x1, y1, x2, y2 = (f"{n:g}" for n in (*begin, *end))
        self.shapes.append(f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}"{_paint("stroke", color)}/>')

    def rectangle(self, begin: Point, end: Point, fill: Color | None = None, outline: Color | None = None) -> None:
        x, y, wide, high = (f"{n:g}" for n in (*begin, end[0] - begin[0], end[1] - begin[1]))
        paint = _paint("fill", fill) + _paint("stroke", outline)
        self.shapes.append(f'<rect x="{x}" y="{y}" width="{wide}" height="{high}"{paint}/>')

    def text(self, at: Point, text: str, color: Color, anchor: str = "la", small: bool = False) -> None:
        self._text(at, text, color, anchor, SMALL if small else FONT)

    def upward_text(self, at: Point, text: str, color: Color) -> None:
        self._text(at, text, color, "mm", FONT, f' transform="rotate(-90 {at[0]:g} {at[1]:g})"')

    def _text(self, at: Point, text: str, color: Color, anchor: str, size: int, more: str = "") -> None:
        places = f'text-anchor="{ANCHORS[anchor[0]]}" dominant-baseline="{BASELINES[anchor[1]]}"'
        shape = f'<text x="{at[0]:g}" y="{at[1]:g}" font-size="{size}" {places}{_paint("fill", color)}{more}>'
        self.shapes.append(f"{shape}{escape(text)}</text>")

    def width(self, text: str) -> float:
        return 0.55 * SMALL * len(text)

    def save(self, path: str | os.PathLike[str]) -> None:
        wide, high = self.size
        head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{wide}" height="{high}" viewBox="0 0 {wide} {high}"'
        paper = f'<rect width="{wide}" height="{high}"{_paint("fill", PAPER)}/>'
        write_file(path, "\n".join([f'{head} font-family="sans-serif">', paper, *self.shapes, "</svg>", ""]))


def _paint(what: str, color: Color | None) -> str:
    if color is None:
        return f' {what}="none"'
    opacity = f' {what}-opacity="{color[3] / 255:.2f}"' if len(color) > 3 else ""
    return f' {what}="#{"".join(f"{part:02x}" for part in color[:3])}"{opacity}'
