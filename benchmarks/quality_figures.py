"""Pictures and the statistic of benchmarks/quality.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dynamicrad_compile.quality.pictures import COLORS, figure

DPI = 110


def _style(name: str) -> dict[str, Any]:
    base = name.split(" + ")[0].split(",")[0]
    style: dict[str, Any] = {"color": COLORS.get(base, "#444444"), "label": name, "marker": "o", "markersize": 4}
    style["linestyle"] = ":" if "," in name else "-." if "covar" in name else "--" if "+" in name else "-"
    return style


def _lines(axis: Any, rows: Sequence[dict[str, Any]], column: str) -> None:
    for name in dict.fromkeys(row["method"] for row in rows):
        if name in ("dense", "real"):
            continue
        found = sorted((row["sparsity"], row[column]) for row in rows if row["method"] == name)
        axis.plot(*zip(*found, strict=True), **_style(name))
    axis.set_xlabel("share of the whole run's attention that is skipped")
    axis.legend(fontsize=7)


def attention(rows: list[dict[str, Any]], path: Path) -> None:
    """(a): attention error against sparsity, without compensation and with it."""
    made, axes = figure(2, "Attention error of a trained model at equal sparsity", height=4.6)
    for axis, with_it, title in zip(axes, (False, True), ("without compensation", "with compensation"), strict=True):
        _lines(axis, [row for row in rows if ("+" in row["method"]) == with_it], "error")
        axis.set_title(title, fontsize=10)
        axis.set_ylabel("relative L2 error, mean over the run")
    top = max(axis.get_ylim()[1] for axis in axes)
    for axis in axes:
        axis.set_ylim(0, top)
    made.savefig(path, dpi=DPI)


def methods(video: list[dict[str, Any]], path: Path) -> None:
    """(a): error of clips against sparsity."""
    made, axes = figure(2, "Clips of a trained model at equal sparsity", height=4.6)
    _lines(axes[0], video, "rmse")
    _lines(axes[1], video, "feature")
    for axis, label in zip(axes, ("RMSE to the dense clip", "feature distance to the dense clip"), strict=True):
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
    made.savefig(path, dpi=DPI)


def spearman(x: np.ndarray, y: np.ndarray, resamples: int) -> dict[str, float]:
    """Rank correlation with a 95 % interval by bootstrap over the settings (percentiles)."""
    from scipy.stats import rankdata

    rows = np.random.default_rng(0).integers(len(x), size=(resamples, len(x)))
    rows = np.concatenate([np.arange(len(x))[None], rows])
    a, b = (rankdata(values[rows], axis=1) for values in (x, y))
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    with np.errstate(invalid="ignore"):
        rho = (a * b).sum(1) / np.sqrt((a * a).sum(1) * (b * b).sum(1))
    low, high = np.nanpercentile(rho[1:], [2.5, 97.5])
    return {"rho": float(rho[0]), "low": float(low), "high": float(high), "n": len(x)}


def proxy(
    means: dict[str, np.ndarray],
    weights: np.ndarray,
    table: list[dict[str, Any]],
    pairs: list[tuple[str, str]],
    path: Path,
) -> None:
    """(b): every setting as a dot; what might predict against what should be predicted."""
    labels = {"published": "published proxy", "video": "video proxy", "captured": "attention error, 3 prompts"}
    labels |= {"attention": "attention error, 3 other prompts", "clip": "video error"}
    rows = len({against for _, against in pairs})
    pairs = sorted(pairs, key=lambda pair: pair[1])[: len(pairs) - len(pairs) % rows]
    made, axes = figure(len(pairs) // rows, "Does it predict the real thing? One dot a setting, sparsity 0.8", rows)
    for axis, (name, against) in zip(axes, pairs, strict=True):
        for group, color in ((weights == 0, "#d9822b"), (weights > 0, "#2a78b5")):
            label = "with compensation" if color == "#2a78b5" else "without"
            axis.plot(means[name][group], means[against][group], "o", color=color, alpha=0.7, markersize=4, label=label)
        rho = next(r for r in table if (r["settings"], r["proxy"], r["against"]) == ("all", name, against))
        axis.set_title(f"rho {rho['rho']:.2f} [{rho['low']:.2f}, {rho['high']:.2f}]", fontsize=10)
        axis.set_xlabel(labels[name])
        axis.set_ylabel(labels[against])
        axis.set_xscale("log")
        axis.set_yscale("log")
    axes[0].legend(fontsize=8)
    made.savefig(path, dpi=DPI)


def routing(rows: list[dict[str, Any]], path: Path) -> None:
    """(c): video error by regime of the prompt, one group of bars a configuration."""
    made, (axis,) = figure(1, "Routed regimes against one fixed regime", height=4.5)
    made.set_size_inches(16, 4.5)
    for place, column in enumerate(("low", "mid", "high", "rmse")):
        x = np.arange(len(rows)) + 0.2 * (place - 1.5)
        axis.bar(x, [row[column] for row in rows], 0.18, label="all" if column == "rmse" else f"{column} motion")
    axis.set_xticks(
        range(len(rows)),
        [f"{row['profile']}, {row['name']}\n{row['sparsity']:.3f} skipped" for row in rows],
        fontsize=7,
    )
    axis.set_ylabel("RMSE to the dense clip")
    axis.legend(fontsize=8)
    made.savefig(path, dpi=DPI)


def dense(rows: list[dict[str, Any]], path: Path) -> None:
    """(d): video error with dense first steps or layers at equal sparsity, and by the part that is sparse."""
    made, axes = figure(4, "Which steps and layers need dense attention?")
    for weight, color, label in ((0.0, "#d9822b", "without compensation"), (1.0, "#2a78b5", "with")):
        mine = [row for row in rows if row["compensate"] == weight]
        equal = [row for row in mine if row["kind"] == "equal"]
        for axis, own, other in ((axes[0], "steps", "first"), (axes[1], "first", "steps")):
            found = sorted((row[own], row["rmse"]) for row in equal if row[other] == 0)
            axis.plot(*zip(*found, strict=True), "o-", color=color, label=label)
        if weight:
            continue
        parts = [row for row in mine if row["kind"] == "steps"]
        axes[2].plot([row["steps"] for row in parts], [row["rmse"] for row in parts], "o-", color=color, label=label)
        parts = [row for row in mine if row["kind"] == "layer"]
        axes[3].plot([row["first"] for row in parts], [row["rmse"] for row in parts], "o-", color=color, label=label)
    titles = (
        "first steps dense, whole run 0.6 skipped",
        "first layers dense, whole run 0.6 skipped",
        "only these steps sparse (from), 0.8",
        "only this layer sparse, 0.8",
    )
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=9)
        axis.set_ylabel("RMSE to the dense clip")
        axis.legend(fontsize=7)
        axis.set_ylim(bottom=0)
    made.savefig(path, dpi=DPI)


def heads(
    own: torch.Tensor,
    same: torch.Tensor,
    points: dict[str, tuple[torch.Tensor, torch.Tensor]],
    layer: torch.Tensor,
    path: Path,
) -> None:
    """(e): what heads look at, and their error without against with compensation."""
    made, axes = figure(2 + len(points), "Compensation by head, sparsity 0.8")
    top = float(torch.maximum(own, same).max())
    for axis, share, title in zip(
        axes, (own, same), ("in the own frame", "at the own place, other frames"), strict=False
    ):
        image = axis.imshow(share.numpy(), vmin=0, vmax=top, cmap="viridis")
        axis.grid(False)
        axis.set_xlabel("head")
        axis.set_ylabel("layer")
        axis.set_title(f"attention {title}\nover that of uniform attention", fontsize=10)
        made.colorbar(image, ax=axis)
    for axis, (mode, (without, with_it)) in zip(axes[2:], points.items(), strict=True):
        dots = axis.scatter(without.flatten(), with_it.flatten(), c=own[layer].flatten(), s=8, vmin=0, vmax=top)
        end = float(torch.maximum(without, with_it).max())
        axis.plot([0, end], [0, end], color="grey", linewidth=0.8)
        axis.set_title(f"{mode}, one dot a captured head", fontsize=10)
        axis.set_xlabel("relative error without compensation")
        axis.set_ylabel("with")
    made.colorbar(dots, ax=axes[-1], label="own frame over uniform")
    made.savefig(path, dpi=DPI)
