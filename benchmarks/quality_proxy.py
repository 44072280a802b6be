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


def proxy(bench: Bench, images: Path) -> dict[str, Any]:
    """(b): random settings of static_ratio at sparsity 0.8, half of them with compensation, judged in four ways."""
    settings = _settings(bench)
    columns: dict[str, list[np.ndarray]] = {}
    for name in ("published", "video"):
        for regime in REGIMES:
            task = Task(
                bench.subject.grid, BLOCK, heads=4, head_dim=32, proxies=(name,), seeds=sizes.SEEDS, rows=sizes.ROWS
            )
            objective = Objective(task, regime)
            found = [objective.evaluate("static_ratio", params).error for params in settings]
            columns.setdefault(name, []).append(np.array(found))
    plans = [drad.make_plan("dynamicrad", bench.subject.grid, BLOCK, **params) for params in settings]
    weights = [params["compensate"] for params in settings]
    real, clips = [], []
    dense, _ = bench.clips(Dense(), sizes.PROXY_CLIPS, subject=bench.shorter)
    with tqdm(total=len(plans) * sizes.PROXY_CLIPS, desc="settings", unit="clip") as bar:
        for number, (plan, weight) in enumerate(zip(plans, weights, strict=True)):
            mask = plan.block_mask()
            error, _ = attention.errors(bench.sites, lambda site, mask=mask: mask[0], weight, BLOCK)
            regime = torch.tensor([site.regime for site in bench.sites])
            real.append([float(error[regime == r].mean()) for r in range(3)])
            method = Hooked(f"setting {number}", 0.8, fixed(mask), BLOCK, weight, key=settings[number])
            made, _ = bench.clips(method, sizes.PROXY_CLIPS, bar, bench.shorter)
            clips.append(rmse(made, dense).tolist())
    columns["attention"] = list(np.array(real).T)
    columns["clip"] = [np.array(clips)[:, r::3].mean(1) for r in range(3)]
    means = {name: np.mean(values, axis=0) for name, values in columns.items()}
    groups = {"all": np.ones(len(settings), bool), "without compensation": np.array(weights) == 0.0}
    groups["with compensation"] = ~groups["without compensation"]
    table = [
        {"settings": group, "proxy": name, "against": against}
        | figures.spearman(means[name][rows], means[against][rows], sizes.RESAMPLES)
        for group, rows in groups.items()
        for name in ("published", "video", "attention")
        for against in ("attention", "clip")
        if name != against
    ]
    by_regime = [
        {"regime": regime, "proxy": name, "against": against}
        | figures.spearman(columns[name][r], columns[against][r], sizes.RESAMPLES)
        for r, regime in enumerate(REGIMES)
        for name in ("published", "video")
        for against in ("attention", "clip")
    ]
    figures.proxy(means, np.array(weights), table, images / "quality_proxy.png")
    values = {name: [round(float(x), 6) for x in column] for name, column in means.items()}
    return {"correlation": table, "by_regime": by_regime, "settings": settings, "errors": values}


def _settings(bench: Bench) -> list[dict[str, Any]]:
    """Parameters at random points of the tuner's space, sparsity 0.8; the second half without compensation."""
    space = Space(Task(bench.subject.grid, BLOCK, heads=4, head_dim=32), "static_ratio")
    generator = np.random.default_rng(7)
    settings = []
    for number in range(sizes.SETTINGS):
        values = space._decode(generator.random(len(space.dimensions)).tolist())
        values["compensate"] = 0.0 if number >= sizes.SETTINGS // 2 else round(float(generator.uniform(0.1, 1.0)), 3)
        settings.append({"sparsity": 0.8, **values})
    return settings
