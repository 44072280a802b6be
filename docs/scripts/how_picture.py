"""docs/images/how.svg: the way of a graph through the passes, and the rooms that each of them asks."""

from __future__ import annotations

from html import escape
from pathlib import Path

PAGE = Path(__file__).parents[1] / "images" / "how.svg"

PASSES = (
    ("gather_ring", "rings of several GPUs"),
    ("find_attention", "each call is a site"),
    ("trace_grid", "what each axis is"),
    ("decode_positions", "the same from a RoPE table"),
    ("classify_sites", "a video, or why not"),
    ("find_conditions", "timestep and prompt"),
    ("build_plans", "which blocks are read"),
    ("replace_attention", "the rewrite"),
)
"""Names of the passes, in order, and what each one finds or does."""

ROOMS = (
    (1, 1, "reading", "spellings, masks"),
    (2, 3, "operators, axes", "how tokens move"),
    (4, 4, "reporting", "reasons, advice"),
    (6, 6, "policy, plans", "options + profile"),
    (7, 7, "kernels, runtime", "ops; clock, regimes"),
)
"""First and last pass that asks a room, the room's name, and what it knows."""

WIDTH, LEFT, RIGHT = 520, 270, 200  # of the picture, of the column of passes and of the column of rooms
STEP, BOX = 52, 42  # from one box to the next, and the height of a box
TOP = 2 * STEP + 10


def page() -> str:
    """The picture."""
    bottom = TOP + len(PASSES) * STEP
    parts = [_box(0, 8, LEFT, BOX, "torch.compile(model)", 'backend="dynamicrad"', "#e8eaf6")]
    parts += [_box(0, 8 + STEP, LEFT, BOX, "Dynamo", "captures a graph of the model", "#e8eaf6")]
    parts += [_box(0, TOP + n * STEP, LEFT, BOX, *texts, "#fff3e0") for n, texts in enumerate(PASSES)]
    parts += [_box(0, bottom, LEFT, BOX, "the same graph, rewritten", "attention reads a plan's blocks", "#fff3e0")]
    parts += [_box(0, bottom + STEP, LEFT, BOX, "Inductor", "or another inner compiler", "#e8eaf6")]
    parts += [_arrow(8 + n * STEP + BOX) for n in range(1)]
    parts += [_arrow(TOP + n * STEP + BOX) for n in range(-1, len(PASSES) + 1)]
    for first, last, name, knows in ROOMS:
        top, height = TOP + first * STEP, (last - first) * STEP + BOX
        parts.append(_box(WIDTH - 20 - RIGHT, top, RIGHT, height, name, knows, "#e0f2f1"))
        parts += [_line(TOP + n * STEP + BOX // 2) for n in range(first, last + 1)]
    size = f'viewBox="0 0 {WIDTH} {bottom + 2 * STEP + 6}"'
    style = "text{font:14px system-ui,sans-serif;fill:#222}.s{font-size:12px;fill:#555}path{stroke:#888;fill:none}"
    title = "<title>A graph on its way through the passes, and the rooms that each of them asks</title>"
    back = '<rect width="100%" height="100%" rx="6" fill="#fff"/>'
    return "\n".join(
        (f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{title}', f"<style>{style}</style>", back, *parts, "</svg>\n")
    )


def _box(x: int, y: int, width: int, height: int, name: str, text: str, colour: str) -> str:
    middle, line = x + 10 + width // 2, y + height // 2
    rect = f'<rect x="{x + 10}" y="{y}" width="{width}" height="{height}" rx="5" fill="{colour}"/>'
    first = f'<text x="{middle}" y="{line - 3}" text-anchor="middle">{escape(name)}</text>'
    return f'{rect}{first}<text class="s" x="{middle}" y="{line + 13}" text-anchor="middle">{escape(text)}</text>'


def _arrow(y: int) -> str:
    x = 10 + LEFT // 2
    return f'<path d="M{x} {y}v{STEP - BOX}m-3 -4l3 4l3 -4"/>'


def _line(y: int) -> str:
    return f'<path stroke-dasharray="3" d="M{10 + LEFT} {y}H{WIDTH - 10 - RIGHT}"/>'
