"""Stage (b) of benchmarks/quality.py: does a proxy's error predict attention error and video error?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import quality_attention as attention
import quality_bench as sizes
import quality_figures as figures
import torch
from quality_bench import BLOCK, Bench
from tqdm import tqdm

import dynamicrad_compile as drad
from dynamicrad_compile.profiles import REGIMES
from dynamicrad_compile.quality import Dense, Hooked, rmse
from dynamicrad_compile.quality.methods import fixed
from dynamicrad_compile.tuning.objective import Objective
from dynamicrad_compile.tuning.space import Space
from dynamicrad_compile.tuning.task import Task


def proxy(bench: Bench, images: Path, clips: bool = False) -> dict[str, Any]:
    """(b): random settings of static_ratio at sparsity 0.8, half of them with compensation, judged in several ways.

    published, video   the proxies' error
    captured           attention error on the captured prompts 0 to 2
    attention          attention error on the other captured prompts
    clip               error of a clip, with `clips`
    """
    settings = _settings(bench)
    weights = np.array([params["compensate"] for params in settings])
    plans = [drad.make_plan("dynamicrad", bench.subject.grid, BLOCK, **params) for params in settings]
    columns = {name: _proxy_errors(bench, name, settings) for name in ("published", "video")}
    columns |= _captured_errors(bench, plans, weights)
    if clips:
        columns["clip"] = [_clip_errors(bench, plans, settings)]
    against = [name for name in ("attention", "clip") if name in columns]
    pairs = [(name, other) for name in ("published", "video", "captured", "attention") for other in against]
    pairs = [(name, other) for name, other in pairs if name != other]
    means = {name: np.mean(values, axis=0) for name, values in columns.items()}
    groups = {"all": weights >= 0, "without compensation": weights == 0, "with compensation": weights > 0}
    table = [
        {"settings": group, "proxy": name, "against": other}
        | figures.spearman(means[name][rows], means[other][rows], sizes.RESAMPLES)
        for group, rows in groups.items()
        for name, other in pairs
    ]
    by_regime = [
        {"regime": regime, "proxy": name, "against": other}
        | figures.spearman(columns[name][r], columns[other][r], sizes.RESAMPLES)
        for r, regime in enumerate(REGIMES)
        for name, other in pairs
        if other != "clip"
    ]
    figures.proxy(means, weights, table, pairs, images / "quality_proxy.png")
    values = {name: [round(float(x), 6) for x in column] for name, column in means.items()}
    return {"correlation": table, "by_regime": by_regime, "settings": settings, "errors": values}


def proxy_clips(bench: Bench, images: Path) -> dict[str, Any]:
    """(b) with the error of clips as well."""
    return proxy(bench, images, clips=True)


Errors = list[np.ndarray]
"""Of every setting, one array a regime."""


def _proxy_errors(bench: Bench, name: str, settings: list[dict[str, Any]]) -> Errors:
    shape = {"heads": 4, "head_dim": 32, "rows": sizes.ROWS}
    task = Task(bench.subject.grid, BLOCK, proxies=(name,), seeds=sizes.SEEDS, **shape)
    found = []
    for regime in REGIMES:
        objective = Objective(task, regime)
        found.append(np.array([objective.evaluate("static_ratio", params).error for params in settings]))
    return found


def _captured_errors(bench: Bench, plans: list[drad.BlockPlan], weights: np.ndarray) -> dict[str, Errors]:
    regime = torch.tensor([site.regime for site in bench.sites])
    first = torch.tensor([site.prompt < 3 for site in bench.sites])
    rows = []
    for plan, weight in zip(tqdm(plans, desc="settings", unit="plan"), weights.tolist(), strict=True):
        mask = plan.block_mask()[0]
        error, _ = attention.errors(bench.sites, lambda site, mask=mask: mask, weight, BLOCK)
        rows.append([[float(error[(regime == r) & part].mean()) for r in range(3)] for part in (first, ~first)])
    found = np.array(rows)
    return {"captured": list(found[:, 0].T), "attention": list(found[:, 1].T)}


def _clip_errors(bench: Bench, plans: list[drad.BlockPlan], settings: list[dict[str, Any]]) -> np.ndarray:
    dense, _ = bench.clips(Dense(), sizes.PROXY_CLIPS, subject=bench.shorter, first=1)
    rows = []
    with tqdm(total=len(plans) * sizes.PROXY_CLIPS, desc="clips of settings", unit="clip") as bar:
        for number, (plan, params) in enumerate(zip(plans, settings, strict=True)):
            mask, weight = plan.block_mask(), params["compensate"]
            method = Hooked(f"setting {number}", 0.8, fixed(mask), BLOCK, weight, key=params)
            made, _ = bench.clips(method, sizes.PROXY_CLIPS, bar, bench.shorter, first=1)
            rows.append(float(rmse(made, dense).mean()))
    return np.array(rows)


def _settings(bench: Bench) -> list[dict[str, Any]]:
    """Parameters at random points of the tuner's space in raster order, sparsity 0.8.

    The second half is without compensation.
    """
    raster = {"box": "raster", "covariance": False}
    space = Space(Task(bench.subject.grid, BLOCK, heads=4, head_dim=32, fixed=raster), "static_ratio")
    generator = np.random.default_rng(7)
    settings = []
    for number in range(sizes.SETTINGS):
        values = space._decode(generator.random(len(space.dimensions)).tolist())
        values["compensate"] = 0.0 if number >= sizes.SETTINGS // 2 else round(float(generator.uniform(0.1, 1.0)), 3)
        settings.append({"sparsity": 0.8, **values})
    return settings
