"""The results of benchmarks/quality.py as tables of Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def page(found: dict[str, Any]) -> str:
    """All stages that are there, one after the other."""
    about = found["subject"]
    parts = [f"# Quality on {about['name']}\n\nblocks of {about['block']}; training: {about['training']}"]
    for name, write in (
        ("captured", _captured),
        ("methods", _methods),
        ("proxy", _proxy),
        ("proxy_clips", _proxy),
        ("routing", _routing),
        ("dense", _dense),
        ("heads", _heads),
        ("compensation", _compensation),
    ):
        if name in found:
            parts.append(f"## {name}\n\n" + "\n\n".join(write(found[name])))
    return "\n\n".join(parts) + "\n"


def table(head: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; numbers with three digits."""
    lines = ["| " + " | ".join(map(str, head)) + " |", "|" + "-|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(map(_cell, row)) + " |" for row in rows)])


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _by_point(rows: list[dict[str, Any]], column: str) -> str:
    points = sorted({row["wanted"] for row in rows})
    names = dict.fromkeys(row["method"] for row in rows)
    values = {(row["method"], row["wanted"]): row[column] for row in rows}
    shown = ([name, *(values.get((name, point)) for point in points)] for name in names)
    return table(["method", *(f"{point:.2f}" for point in points)], shown)


def _captured(found: dict[str, Any]) -> list[str]:
    parts = ["Attention error (relative L2, mean over the run):", _by_point(found["methods"], "error")]
    parts += ["Sparsity of the run:", _by_point(found["methods"], "sparsity")]
    columns = ("profile", "table", "low", "mid", "high")
    parts.append(table(columns, ([row[c] for c in columns] for row in found["routing"])))
    for name, values in found["places"].items():
        parts.append(table([name, *values], [["error", *values.values()]]))
    return parts


def _methods(found: dict[str, Any]) -> list[str]:
    video = [row for row in found["video"] if row["method"] not in ("dense", "real")]
    parts = []
    for column in ("rmse", "psnr", "ssim", "feature", "sparsity"):
        parts += [f"Video, {column}:", _by_point(video, column)]
    columns = ("motion", "flicker", "loop", "frechet_real")
    both = [row for row in found["video"] if row["method"] in ("dense", "real")]
    parts.append(table(["clips", *columns], ([row["method"], *(row[c] for c in columns)] for row in both)))
    return parts


def _proxy(found: dict[str, Any]) -> list[str]:
    def shown(rows: list[dict[str, Any]], key: str) -> str:
        cells = (
            [r[key], r["proxy"], r["against"], r["n"], r["rho"], f"{r['low']:.2f} to {r['high']:.2f}"] for r in rows
        )
        return table([key, "proxy", "against", "n", "Spearman", "95 %"], cells)

    return [shown(found["correlation"], "settings"), shown(found["by_regime"], "regime")]


def _routing(found: dict[str, Any]) -> list[str]:
    columns = ("profile", "name", "sparsity", "rmse", "low", "mid", "high")
    router = f"router: {found['router_accuracy']:.3f} of 300 held-out captions right"
    video = table(columns, ([row[c] for c in columns] for row in found["video"]))
    return [router, video]


def _dense(found: dict[str, Any]) -> list[str]:
    columns = ("kind", "steps", "first", "compensate", "sparsity", "rmse")
    return [table(columns, ([row[c] for c in columns] for row in found["rows"]))]


def _compensation(found: dict[str, Any]) -> list[str]:
    columns = ("block", "where", "rmse", "low", "mid", "high", "change", "standard_error")
    return [table(columns, ([row[c] for c in columns] for row in found["rows"]))]


def _heads(found: dict[str, Any]) -> list[str]:
    columns = ("mode", "regime", "heads", "without", "with", "helped")
    shares = []
    for name in ("own_frame", "same_place"):
        rows = ([n, *row] for n, row in enumerate(found[name]))
        shares.append(table([f"{name}, layer", *range(len(found[name][0]))], rows))
    return [table(columns, ([row[c] for c in columns] for row in found["rows"])), *shares]
