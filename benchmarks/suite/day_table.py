"""The short table of the day: goals, forms of the kernel, and what else was measured, in at most LINES lines."""

from __future__ import annotations

from typing import Any

from .runner import Values
from .tables import PLUMBING, _proposal, _times
from .variants import FORWARD

LINES, COLUMNS, FAILURES = 60, 150, 5


def short(content: Values, main: int, long: int, dims: tuple[int, ...], sparsity: float) -> str:
    """The table; long tails are cut, the page has them."""
    rows = {row["name"]: row for row in content["rows"]}
    count = {s: sum(row["status"] == s for row in rows.values()) for s in ("ok", "failed", "unsupported", "skipped")}
    lines = [f"{content['about']['chip']}: " + ", ".join(f"{n} {status}" for status, n in count.items() if n)]
    lines += [PLUMBING] * content["reduced"]
    lines += _goals(rows, main, long, dims[0], sparsity)
    for dim in dims:
        lines += _forms(content["rows"], main, dim)
    lines += [_proposal(item) for item in content.get("tile_proposal", [])]
    kept = [*lines, *_checks(content["rows"]), *_times_of(rows)]
    if len(kept) > LINES:
        kept = [*kept[: LINES - 1], f"... {len(kept) - LINES + 1} more lines: see the page"]
    return "\n".join(line[:COLUMNS] for line in kept)


def _goals(rows: dict[str, Values], main: int, long: int, dim: int, sparsity: float) -> list[str]:
    at = f"{main}/{dim}/{sparsity:g}"
    forward, flex = _ok(rows, f"forward/{at}"), _ok(rows, f"flex/{at}")
    step, long_step = (_ok(rows, f"step/{tokens}/static") for tokens in (main, long))
    select, covariance = _ok(rows, f"select/{at}/ratio"), _ok(rows, f"covariance/{at}")
    over_flex = flex["ms"] / forward["ms"] if flex and forward else None
    share = None
    if step and select and covariance:
        share = step["layers"] * (select["ms"] + covariance["ms"]) / step["ms"]
    figures = (
        ("TFLOP/s on active blocks", forward and forward["tflops"], 450.0, True, "{:.0f}"),
        ("over the best dense", forward and forward["gain"], 3.75, True, "{:.2f}x"),
        ("over FlexAttention", over_flex, 1.2, True, "{:.2f}x"),
        (f"step over dense step, {long:,} tokens", long_step and long_step["gain"], 2.0, True, "{:.2f}x"),
        ("selection and covariances in a step", share, 0.02, False, "{:.1%}"),
    )
    lines = [f"goals, {main:,} tokens, head_dim {dim}, {sparsity:.0%} sparse:"]
    for name, value, goal, above, form in figures:
        said = "not measured" if value is None else form.format(value)
        met = "" if value is None else "met" if (value >= goal) == above else "MISSED"
        lines.append(f"  {name:36} {said:>12}  goal {form.format(goal):>6}  {met}")
    return lines


def _forms(rows: list[Values], main: int, dim: int) -> list[str]:
    """The fastest tile of each form, or why there is none."""
    lines = [f"forms at {main:,} tokens, head_dim {dim}:"]
    for kernel in FORWARD:
        own = [r for r in rows if r["group"] == "tiles" and (r["kernel"], r["head_dim"]) == (kernel, dim)]
        timed = [row for row in own if row["status"] == "ok"]
        if timed:
            best = min(timed, key=lambda row: row["ms"])
            tile = f"{best['block_m']} x {best['block_n']}, {best['num_warps']} warps, {best['num_stages']} stages"
            lines.append(f"  {kernel:16} {best['ms']:8.3f} ms {best['tflops']:6.0f} TFLOP/s  {tile}, {len(timed)} of "
                         f"{len(own)} tiles timed")  # fmt: skip
        elif own:
            lines.append(f"  {kernel:16} {own[0]['status']}: {own[0]['why']}")
    return lines if len(lines) > 1 else []


def _times_of(rows: dict[str, Values]) -> list[str]:
    """One line for each row of the groups that hold figures, if it has some or failed."""
    lines = ["everything else:"]
    for name, row in rows.items():
        if row["group"] in ("dense", "forward", "flex", "backward", "overhead", "steps", "graphs"):
            if row["status"] == "ok":
                lines.append(f"  {name:36} {_figures(row)}")
            elif row["status"] == "failed":
                lines.append(f"  {name:36} FAILED: {row['why']}")
    return lines if len(lines) > 1 else []


def _figures(row: Values) -> str:
    parts: list[Any] = [f"{row['ms']:.3f} ms"] if "ms" in row else []
    parts += [f"{row['tflops']:.0f} TFLOP/s"] if row.get("tflops") else []
    parts += [f"{_times(row['gain'])} dense"] if row.get("gain") else []
    parts += [f"{row['share']:.1%} of the attention"] if row.get("share") is not None else []
    parts += [row["best"]] if "best" in row else []
    parts += [row["summary"]] if row.get("summary") else []
    return ", ".join(parts)


def _checks(rows: list[Values]) -> list[str]:
    """How many builds and checks passed, and the first that failed."""
    lines = []
    for group in ("builds", "correctness", "tries"):
        own = [row for row in rows if row["group"] == group]
        if own:
            lines.append(f"{group}: {sum(row['status'] == 'ok' for row in own)} of {len(own)} passed")
            lines += [f"  FAILED {row['name']}: {row['why']}" for row in own if row["status"] == "failed"][:FAILURES]
    return lines


def _ok(rows: dict[str, Values], name: str) -> Values | None:
    row = rows.get(name)
    return row if row and row["status"] == "ok" else None
