"""Stages (a), (c), (d), (e) of benchmarks/quality.py: a bench and a folder for pictures to plain values."""

from __future__ import annotations

from collections.abc import Sequence
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
from dynamicrad_compile.plans.cost import blocks_to_skip
from dynamicrad_compile.profiles import REGIMES
from dynamicrad_compile.quality import Dense, Hooked, evaluate, make_clips, rmse, save_gif
from dynamicrad_compile.quality import method as by_name
from dynamicrad_compile.quality.methods import dense_at_first, fixed, radial_near, selected


def methods(bench: Bench, images: Path) -> dict[str, Any]:
    """(a): clips of every method by the harness, at equal sparsity of the whole run."""
    subject = bench.unguided
    chosen: list[Any] = []
    for point in sizes.CLIP_POINTS:
        chosen += [by_name(name, subject, point, BLOCK) for name in ("random", "oracle")]
        for label, profile, weight, more in (
            ("", "plain", 0.0, {}),
            (" + compensation", "tuned", 1.0, {}),
            (" + covariances", "plain", 0.0, {"compensate": 1.0, "covariance": True}),  # the blocks of the first
        ):
            table = bench.profile(profile).regime("mid").static_ratio.model_dump()
            params = {**table, "sparsity": point, "compensate": weight}
            blocks = drad.make_plan("dynamicrad", subject.grid, BLOCK, **params).block_mask()
            ran = {"compensate": weight, **more}
            chosen.append(Hooked("static_ratio" + label, point, fixed(blocks), BLOCK, key=params, **ran))
            chosen_from = attention.choice(bench.profile(profile), "mid", point, subject, weight)
            key = {"thresholds": chosen_from[1:], "candidates": int(chosen_from[0].plan.kv_indices.sum())}
            choose = selected(*chosen_from)
            chosen.append(Hooked("dynamic_threshold" + label, point, choose, BLOCK, key=key, **ran))
        for label, mask, first in _radials(bench, point):
            choose = dense_at_first(fixed(mask), steps=first)
            key = {"first": first, "blocks": int(mask.sum())}
            chosen.append(Hooked(label, point, choose, BLOCK, key=key))
    results = evaluate(subject, chosen, bench.prompts[: sizes.CLIPS], bench.folder, batch=3)
    shown = ("dense", *(n for n in results.clips if n.endswith(f"{sizes.CLIP_POINTS[0]:.0%}")))
    short = {" + compensation": "+", " + covariances": "+cov"}
    named = {name: next((name.replace(a, b) for a, b in short.items() if a in name), name) for name in shown}
    picked = {named[name]: results.clips[name][:3] for name in shown}
    save_gif(picked, images / "quality_methods.gif", titles=bench.prompts[:3], scale=3)
    video = results.to_json()["rows"]
    figures.methods(video, images / "quality_methods.png")
    return {"video": video}


def _radials(bench: Bench, point: float) -> list[tuple[str, torch.Tensor, int]]:
    """(label, block mask, dense first steps) of Radial at a sparsity of the whole run, within 0.01 where it can be.

    Either the mask of the nearest sparsity, or the published one after some dense steps, as it is published.
    """
    nearest = radial_near(bench.subject, point, BLOCK)[0]
    published = drad.make_plan("radial", bench.subject.grid, BLOCK).block_mask()
    share = 1.0 - published.double().mean().item()
    first = round(bench.steps * max(0.0, 1.0 - point / share))
    after = abs(share * (1 - first / bench.steps) - point)
    alone = abs(1.0 - nearest.double().mean().item() - point)
    found = [("radial, dense first steps", published, first)] if first and after < 0.01 else []
    return [*found, ("radial", nearest, 0)] if alone < 0.01 or not found else found


def captured(bench: Bench, images: Path) -> dict[str, Any]:
    """(a), (c), (d) on captured attention: no clip is made."""
    rows = _attention_rows(bench)
    figures.attention(rows, images / "quality_attention.png")
    return {"methods": rows, "routing": _routed_attention(bench), "places": _error_by_place(bench)}


def _attention_rows(bench: Bench) -> list[dict[str, Any]]:
    """Attention error of every method at every point, mean over the run."""
    subject, sites = bench.subject, bench.sites
    todo: list[tuple[str, float, attention.Chooser, float, int]] = []
    for point in sizes.POINTS:
        for label, found, first in _radials(bench, point):
            for end, weight in (("", 0.0), (" + compensation", 1.0)):
                todo.append((label + end, point, lambda site, mask=found[0]: mask, weight, first))
        todo.append(("random", point, attention.random_blocks(point, BLOCK), 0.0, 0))
        todo.append(("oracle", point, attention.oracle(point, BLOCK), 0.0, 0))
        todo.append(("oracle + compensation", point, attention.oracle(point, BLOCK, 1.0), 1.0, 0))
        for kind, end, weight in (("plain", "", 0.0), ("tuned", " + compensation", 1.0)):
            for source in ("", "_on_proxies"):
                given = (bench.profile(kind + source), "mid", point, subject, weight)
                name = end + source.replace("_", ", ", 1).replace("_", " ")
                todo.append(("static_ratio" + name, point, attention.static(*given), weight, 0))
                todo.append(("dynamic_threshold" + name, point, attention.dynamic(*given), weight, 0))
    rows = []
    for name, point, choose, weight, first in tqdm(todo, desc="attention errors", unit="point"):
        error, share = attention.errors(sites, choose, weight, BLOCK)
        mean = attention.over_run(sites, error, bench.steps, first)
        sparsity = share * (1 - first / bench.steps)
        rows.append({"method": name, "wanted": point, "sparsity": sparsity, "error": mean})
    return rows


def routing(bench: Bench, images: Path) -> dict[str, Any]:
    """(c): the router on the tiny text encoder against each fixed regime, same mean sparsity."""
    corpus = [bench.data.clip(1, index) for index in range(600)]
    labelled = [(item.caption, item.regime) for item in corpus]
    router = drad.fit_router(lambda texts: bench.text.encode(list(texts)).detach(), labelled, progress=False)
    test = [bench.data.clip(bench.data.HELD_OUT_SEED, index) for index in range(300)]
    called = router.predict(bench.text.encode([item.caption for item in test]).detach())
    right = float((called == torch.tensor([REGIMES.index(item.regime) for item in test])).double().mean())
    prompts = bench.prompts[: sizes.ROUTED_CLIPS]
    routed = router.predict(bench.text.encode(prompts).detach()).tolist()
    dense, _ = bench.clips(Dense(), sizes.ROUTED_CLIPS, subject=bench.unguided)
    rows: list[dict[str, Any]] = []

    def add(kind: str, name: str, tables: Sequence[int], sparsity: Sequence[float]) -> float:
        made, shares = [], []
        for number, prompt in enumerate(prompts):
            table = bench.profile(kind).regime(REGIMES[tables[number]]).static_ratio.model_dump()
            params = {**table, "sparsity": sparsity[tables[number]]}
            mask = drad.make_plan("dynamicrad", bench.subject.grid, BLOCK, **params).block_mask()
            method = Hooked("fixed plan", 0.8, fixed(mask), BLOCK, params["compensate"], key=params)
            clip, share, _ = make_clips(
                bench.unguided, method, [prompt], [number], bench.folder / "clips", 1, bar.update
            )
            made.append(clip)
            shares.append(share)
        error = rmse(torch.cat(made), dense)
        by_regime = {regime: float(error[r::3].mean()) for r, regime in enumerate(REGIMES)}
        rows.append(
            {
                "profile": kind,
                "name": name,
                "sparsity": float(np.mean(shares)),
                "rmse": float(error.mean()),
                **by_regime,
            }
        )
        return rows[-1]["sparsity"]

    with tqdm(total=12 * len(prompts), desc="routing", unit="clip") as bar:
        for kind in ("plain", "tuned"):
            for r, regime in enumerate(REGIMES):
                add(kind, f"fixed {regime}", [r] * len(prompts), [0.8] * 3)
            add(kind, "routed", routed, [0.8] * 3)
            same = add(kind, "routed, graded", routed, [0.85, 0.80, 0.75])
            add(kind, "fixed mid, same mean", [1] * len(prompts), [round(same, 4)] * 3)
    figures.routing(rows, images / "quality_routing.png")
    return {"router_accuracy": right, "cross_validated": router.accuracy, "video": rows}


def _routed_attention(bench: Bench) -> list[dict[str, Any]]:
    """Attention error by regime of the prompt (rows) and of the table (columns)."""
    rows = []
    for kind, weight in (("plain", 0.0), ("tuned", None)):
        profile = bench.profile(kind)
        for regime in REGIMES:
            used = profile.regime(regime).static_ratio.compensate if weight is None else weight
            choose = attention.static(profile, regime, 0.8, bench.subject, used)
            error, _ = attention.errors(bench.sites, choose, used, BLOCK)
            of = torch.tensor([site.regime for site in bench.sites])
            rows.append(
                {"profile": kind, "table": regime}
                | {name: float(error[of == r].mean()) for r, name in enumerate(REGIMES)}
            )
    return rows


def dense(bench: Bench, images: Path) -> dict[str, Any]:
    """(d): first steps and layers dense at equal sparsity of the whole run; and one layer or group of steps sparse."""
    subject, profile = bench.subject, bench.profile("plain")
    layers = len(subject.model.blocks)
    reference, _ = bench.clips(Dense(), sizes.DENSE_CLIPS, subject=bench.unguided, first=1)
    table = profile.regime("mid").static_ratio.model_dump()
    todo: list[tuple[str, int, int, float, Any]] = []
    for weight in (0.0, 1.0):
        for steps, first in [(n, 0) for n in (0, 1, 2, 3)] + [(0, 1), (0, 2)]:
            share = (1 - steps / bench.steps) * (1 - first / layers)
            if share <= 0.6 / 0.95:
                continue
            params = {**table, "compensate": weight, "sparsity": 0.6 / share}
            plan = drad.make_plan("dynamicrad", subject.grid, BLOCK, **params)
            todo.append(("equal", steps, first, weight, dense_at_first(fixed(plan.block_mask()), steps, first)))
    params = {**table, "compensate": 0.0, "sparsity": 0.8}
    mask = drad.make_plan("dynamicrad", subject.grid, BLOCK, **params).block_mask()
    for layer in range(layers):
        todo.append(("layer", 0, layer, 0.0, _only(mask, range(bench.steps), [layer])))
    for group in np.array_split(np.arange(bench.steps), min(4, bench.steps)):
        todo.append(("steps", int(group[0]), len(group), 0.0, _only(mask, group.tolist(), range(layers))))
    rows = []
    with tqdm(total=len(todo) * sizes.DENSE_CLIPS, desc="dense steps and layers", unit="clip") as bar:
        for kind, steps, first, weight, choose in todo:
            key = {"kind": kind, "steps": steps, "first": first}
            method = Hooked("dense parts", 0.6, choose, BLOCK, weight, key=key)
            made, sparsity = bench.clips(method, sizes.DENSE_CLIPS, bar, bench.unguided, first=1)
            rows.append(
                {**key, "compensate": weight, "sparsity": sparsity, "rmse": float(rmse(made, reference).mean())}
            )
    figures.dense(rows, images / "quality_dense.png")
    return {"rows": rows}


def _only(mask: torch.Tensor, steps: Sequence[int], layers: Sequence[int]) -> Any:
    """The mask in these steps and layers, dense elsewhere."""
    return lambda place, q, k, scale: mask if place.step in steps and place.site in layers else None


def _error_by_place(bench: Bench) -> dict[str, Any]:
    """Attention error of a static plan at 0.8 by step and by layer."""
    choose = attention.static(bench.profile("plain"), "mid", 0.8, bench.subject, 0.0)
    error = attention.errors(bench.sites, choose, 0.0, BLOCK)[0].mean(1)
    found = {}
    for name in ("step", "site"):
        place = torch.tensor([getattr(site, name) for site in bench.sites])
        found[name] = {int(n): float(error[place == n].mean()) for n in place.unique()}
    return found


def heads(bench: Bench, images: Path) -> dict[str, Any]:
    """(e): attention error with and without compensation at 0.8, by regime and by what heads look at."""
    own, same = attention.head_kinds(bench.sites, bench.subject.grid[0])
    layer = torch.tensor([site.site for site in bench.sites])
    regime = torch.tensor([site.regime for site in bench.sites])
    kinds = {name: heads[layer] for name, heads in attention.by_kind(own, same).items()}
    choosers = {
        "static_ratio": attention.static(bench.profile("plain"), "mid", 0.8, bench.subject, 0.0),
        "dynamic_threshold": attention.dynamic(bench.profile("plain"), "mid", 0.8, bench.subject, 0.0),
    }
    paid = blocks_to_skip(0.8, BLOCK, 1.0)  # blocks pay for the mean keys
    paying = {
        "static_ratio": attention.static(bench.profile("plain"), "mid", paid, bench.subject, 0.0),
        "dynamic_threshold": attention.dynamic(bench.profile("plain"), "mid", paid, bench.subject, 0.0),
    }
    rows, points = [], {}
    for mode, choose in choosers.items():
        without, _ = attention.errors(bench.sites, choose, 0.0, BLOCK)
        with_it, _ = attention.errors(bench.sites, paying[mode], 1.0, BLOCK)
        points[mode] = (without, with_it)
        for r, name in enumerate([*REGIMES, "all"]):
            for kind, heads in kinds.items():
                chosen = heads & ((regime == r)[:, None] | torch.tensor(name == "all"))
                if not bool(chosen.any()):
                    continue
                better = (with_it[chosen] < without[chosen]).double().mean()
                rows.append(
                    {
                        "mode": mode,
                        "regime": name,
                        "heads": kind,
                        "without": float(without[chosen].mean()),
                        "with": float(with_it[chosen].mean()),
                        "helped": float(better),
                    }
                )
    figures.heads(own, same, points, layer, images / "quality_heads.png")
    return {"own_frame": own.tolist(), "same_place": same.tolist(), "rows": rows}
