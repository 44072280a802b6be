"""The stages of benchmarks/quality.py. Each takes the bench and a folder for pictures, and returns plain values."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import quality_attention as attention
import quality_figures as figures
import torch
from tqdm import tqdm

import dynamicrad_compile as drad
from dynamicrad_compile.profiles import REGIMES, Profile
from dynamicrad_compile.quality import Compiled, Dense, Hooked, evaluate, make_clips, rmse, save_gif
from dynamicrad_compile.quality import method as by_name
from dynamicrad_compile.quality.methods import dense_at_first, fixed, radial_near
from dynamicrad_compile.tuning.objective import Objective
from dynamicrad_compile.tuning.space import Space
from dynamicrad_compile.tuning.task import Task

BLOCK = 16
POINTS = (0.5, 0.7, 0.8, 0.9)
CAPTURED_STEPS = (0, 3, 7, 11)
CLIPS = 6  # per method in (a), regimes in turn
ROUTED_CLIPS = 12
SETTINGS = 64  # of (b), half of them with compensation
PROXY_CLIPS = 3
DENSE_CLIPS = 3
BUDGET = 30
SEEDS = (1, 2, 3)
RESAMPLES = 2000
QUICK = {
    "POINTS": (0.8,), "CAPTURED_STEPS": (0, 1), "CLIPS": 3, "ROUTED_CLIPS": 3, "SETTINGS": 6, "BUDGET": 10,
    "SEEDS": (1,), "PROXY_CLIPS": 3, "DENSE_CLIPS": 3, "RESAMPLES": 50,
}  # fmt: skip


class Bench:
    """The subject, what was captured of it, and the folder of what can be made again."""

    def __init__(self, checkpoint: Path, folder: Path, steps: int) -> None:
        from examples.tiny_video import data, model
        from examples.tiny_video.subject import prompts, subject

        self.subject = subject(checkpoint, steps=steps)
        self.text = model.load(checkpoint)[1]
        self.folder, self.steps = folder, steps
        self.prompts = prompts(max(CLIPS, ROUTED_CLIPS))
        config = checkpoint / "config.json" if checkpoint.is_dir() else checkpoint.parent / "config.json"
        self.training = {k: v for k, v in json.loads(config.read_text()).items() if isinstance(v, (int, float, str))}
        self.data = data
        self._sites: list[attention.Site] | None = None

    @property
    def sites(self) -> list[attention.Site]:
        """Captured attentions, made at the first use."""
        if self._sites is None:
            steps = [step for step in CAPTURED_STEPS if step < self.steps]
            prompts = self.prompts[:CLIPS]
            self._sites = attention.capture(self.subject, prompts, steps, BLOCK, self.folder / "captures")
        return self._sites

    def about(self) -> dict[str, Any]:
        """What the figures are of."""
        machine = {"machine": platform.machine(), "torch": torch.__version__.split("+")[0]}
        return {"name": self.subject.name, "training": self.training, "block": BLOCK, **machine}

    def profile(self, name: str) -> Profile:
        """A profile that the stage `tune` has made: "tuned" or "plain" (without compensation)."""
        return drad.load_profile(self.folder / f"{name}.toml")

    def clips(self, method: Any, count: int, bar: Any = None) -> tuple[torch.Tensor, float]:
        """Clips of the first `count` prompts, and the sparsity of the run."""
        prompts, seeds = self.prompts[:count], range(count)
        tick = bar.update if bar is not None else lambda n: None
        made, sparsity, _ = make_clips(self.subject, method, prompts, seeds, self.folder / "clips", 3, tick)
        return made, sparsity

    @staticmethod
    def shown(value: Any) -> str:
        """A result for the terminal."""
        return json.dumps(value, indent=1, default=str)[:6000]


def tune(bench: Bench, images: Path) -> dict[str, Any]:
    """Profiles of this grid, on the proxies, as anybody would tune them."""
    losses = {}
    for name, given in (("tuned", {}), ("plain", {"compensate": 0.0})):
        path = bench.folder / f"{name}.toml"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            drad.tune(
                bench.subject.grid, path, block_size=BLOCK, heads=4, head_dim=32, sparsity=0.8, budget=BUDGET,
                seeds=SEEDS, fixed=given, header={"min_tokens": 0}, pictures=False,
                resume=path.with_suffix(".jsonl").is_file(),
            )  # fmt: skip
        profile = bench.profile(name)
        losses[name] = {"mode": profile.mode, "loss": profile.provenance.loss}
    return losses


def methods(bench: Bench, images: Path) -> dict[str, Any]:
    """(a): attention error on what was captured, and clips by the harness, at equal sparsity."""
    rows = _attention_rows(bench)
    points = sorted({round(row["sparsity"], 4) for row in rows if row["method"] == "radial"} | set(POINTS))
    subject = bench.subject
    chosen: list[Any] = []
    for point in POINTS:
        for name in ("random", "oracle"):
            chosen.append(by_name(name, subject, point, BLOCK))
        for mode in ("static_ratio", "dynamic_threshold"):
            for label, profile in (("", "plain"), (" + compensation", "tuned")):
                options = {"profile": str(bench.folder / f"{profile}.toml"), "mode": mode, "sparsity": point}
                options |= {"block_size": BLOCK, "regime": "mid"} | ({"compensate": 1.0} if label else {})
                chosen.append(Compiled(mode + label, point, options))
        chosen += _radial_methods(bench, point)
    results = evaluate(subject, chosen, bench.prompts[:CLIPS], bench.folder, batch=3)
    strongest = {
        label: clips[:3]
        for label, clips in results.clips.items()
        if label == "dense" or label.endswith(f"{max(POINTS):.0%}")
    }
    save_gif(strongest, images / "quality_methods.gif", titles=bench.prompts[:3], scale=3)
    video = results.to_json()["rows"]
    figures.methods(rows, video, images / "quality_methods.png")
    return {"points": points, "attention": rows, "video": video}


def _attention_rows(bench: Bench) -> list[dict[str, Any]]:
    """Mean attention error of every method at every point; Radial's own sparsities are points of ours too."""
    subject, sites = bench.subject, bench.sites
    plain, tuned = bench.profile("plain"), bench.profile("tuned")
    radials = {round(radial_near(subject, p, BLOCK)[0].double().mean().item(), 6): p for p in POINTS}
    points = sorted({*POINTS, *(1.0 - kept for kept in radials)})
    todo: list[tuple[str, float, attention.Chooser, float]] = []
    for kept, point in radials.items():
        mask = radial_near(subject, point, BLOCK)[0][0]
        todo.append(("radial", 1.0 - kept, lambda site, mask=mask: mask, 0.0))
        todo.append(("radial + compensation", 1.0 - kept, lambda site, mask=mask: mask, 1.0))
    for point in points:
        todo.append(("random", point, attention.random_blocks(point, BLOCK), 0.0))
        todo.append(("oracle", point, attention.oracle(point, BLOCK), 0.0))
        todo.append(("oracle + compensation", point, attention.oracle(point, BLOCK, 1.0), 1.0))
        for label, profile, weight in (("", plain, 0.0), (" + compensation", tuned, 1.0)):
            given = (profile, "mid", point, subject, weight)
            todo.append(("static_ratio" + label, point, attention.static(*given), weight))
            todo.append(("dynamic_threshold" + label, point, attention.dynamic(*given), weight))
    rows = []
    for name, point, choose, weight in tqdm(todo, desc="attention errors", unit="point"):
        error, share = attention.errors(sites, choose, weight, BLOCK)
        rows.append({"method": name, "wanted": point, "sparsity": share, "error": float(error.mean())})
    return rows


def _radial_methods(bench: Bench, point: float) -> list[Any]:
    """Radial at a sparsity of the whole run: its nearest mask, and its published mask after dense first steps."""
    mask, params = radial_near(bench.subject, point, BLOCK)
    made = [Hooked("radial", point, fixed(mask), BLOCK, key=params)]
    published = drad.make_plan("radial", bench.subject.grid, BLOCK).block_mask()
    share = 1.0 - published.double().mean().item()
    first = round(bench.steps * max(0.0, 1.0 - point / share))
    if first:
        choose = dense_at_first(fixed(published), steps=first)
        made.append(Hooked("radial, dense first steps", point, choose, BLOCK, key={"first": first}))
    return made


def proxy(bench: Bench, images: Path) -> dict[str, Any]:
    """(b): random settings of static_ratio at sparsity 0.8, half of them with compensation, judged in four ways."""
    settings = _settings(bench)
    columns: dict[str, list[np.ndarray]] = {}
    for name in ("published", "video"):
        for regime in REGIMES:
            task = Task(bench.subject.grid, BLOCK, heads=4, head_dim=32, proxies=(name,), seeds=SEEDS, rows=ROWS)
            objective = Objective(task, regime)
            found = [objective.evaluate("static_ratio", params).error for params in settings]
            columns.setdefault(name, []).append(np.array(found))
    plans = [drad.make_plan("dynamicrad", bench.subject.grid, BLOCK, **params) for params in settings]
    weights = [params["compensate"] for params in settings]
    real, clips = [], []
    dense, _ = bench.clips(Dense(), PROXY_CLIPS)
    with tqdm(total=len(plans) * PROXY_CLIPS, desc="settings", unit="clip") as bar:
        for number, (plan, weight) in enumerate(zip(plans, weights, strict=True)):
            mask = plan.block_mask()
            error, _ = attention.errors(bench.sites, lambda site, mask=mask: mask[0], weight, BLOCK)
            regime = torch.tensor([site.regime for site in bench.sites])
            real.append([float(error[regime == r].mean()) for r in range(3)])
            method = Hooked(f"setting {number}", 0.8, fixed(mask), BLOCK, weight, key=settings[number])
            made, _ = bench.clips(method, PROXY_CLIPS, bar)
            clips.append(rmse(made, dense).tolist())
    columns["attention"] = list(np.array(real).T)
    columns["clip"] = [np.array(clips)[:, r::3].mean(1) for r in range(3)]
    means = {name: np.mean(values, axis=0) for name, values in columns.items()}
    groups = {"all": np.ones(len(settings), bool), "without compensation": np.array(weights) == 0.0}
    groups["with compensation"] = ~groups["without compensation"]
    table = [
        {"settings": group, "proxy": name, "against": against}
        | figures.spearman(means[name][rows], means[against][rows], RESAMPLES)
        for group, rows in groups.items()
        for name in ("published", "video", "attention")
        for against in ("attention", "clip")
        if name != against
    ]
    by_regime = [
        {"regime": regime, "proxy": name, "against": against}
        | figures.spearman(columns[name][r], columns[against][r], RESAMPLES)
        for r, regime in enumerate(REGIMES)
        for name in ("published", "video")
        for against in ("attention", "clip")
    ]
    figures.proxy(means, np.array(weights), table, images / "quality_proxy.png")
    values = {name: [round(float(x), 6) for x in column] for name, column in means.items()}
    return {"correlation": table, "by_regime": by_regime, "settings": settings, "errors": values}


ROWS = 256  # query rows of the proxies' draws


def _settings(bench: Bench) -> list[dict[str, Any]]:
    """Parameters at random points of the tuner's space, sparsity 0.8; the second half without compensation."""
    space = Space(Task(bench.subject.grid, BLOCK, heads=4, head_dim=32), "static_ratio")
    generator = np.random.default_rng(7)
    settings = []
    for number in range(SETTINGS):
        values = space._decode(generator.random(len(space.dimensions)).tolist())
        values["compensate"] = 0.0 if number >= SETTINGS // 2 else round(float(generator.uniform(0.1, 1.0)), 3)
        settings.append({"sparsity": 0.8, **values})
    return settings


def routing(bench: Bench, images: Path) -> dict[str, Any]:
    """(c): the router on the tiny text encoder against each fixed regime, same mean sparsity."""
    corpus = [bench.data.clip(1, index) for index in range(600)]
    labelled = [(item.caption, item.regime) for item in corpus]
    router = drad.fit_router(lambda texts: bench.text.encode(list(texts)).detach(), labelled, progress=False)
    test = [bench.data.clip(bench.data.HELD_OUT_SEED, index) for index in range(300)]
    called = router.predict(bench.text.encode([item.caption for item in test]).detach())
    right = float((called == torch.tensor([REGIMES.index(item.regime) for item in test])).double().mean())
    dense, _ = bench.clips(Dense(), ROUTED_CLIPS)
    rows = []
    for kind, profile in (("plain", "plain"), ("with compensation", "tuned")):
        path = bench.folder / f"{profile}.toml"
        base = {"profile": str(path), "mode": "static_ratio", "block_size": BLOCK}
        configs = {f"fixed {regime}": {**base, "sparsity": 0.8, "regime": regime} for regime in REGIMES}
        configs["routed"] = {**base, "sparsity": 0.8, "router": router}
        graded = _graded(bench, path)
        configs["routed, 0.85 / 0.80 / 0.75"] = {**base, "profile": str(graded), "router": router}
        for name, options in tqdm(configs.items(), desc=f"routing {kind}", unit="config"):
            key = {k: v for k, v in options.items() if k != "router"} | {"routed": "router" in options}
            method = _Keyed(name, 0.8, options, key=str(key))
            made, sparsity = bench.clips(method, ROUTED_CLIPS)
            error = rmse(made, dense)
            by_regime = {regime: float(error[r::3].mean()) for r, regime in enumerate(REGIMES)}
            rows.append({"profile": kind, "name": name, "sparsity": sparsity, "rmse": float(error.mean()), **by_regime})
    figures.routing(rows, images / "quality_routing.png")
    captured = _routed_attention(bench)
    return {"router_accuracy": right, "cross_validated": router.accuracy, "video": rows, "attention": captured}


class _Keyed(Compiled):
    """A compiled method whose options hold a router; `wanted` and the key tell its clips apart."""

    def __init__(self, name: str, wanted: float, options: dict[str, Any], key: str) -> None:
        super().__init__(name, wanted, options)
        object.__setattr__(self, "key", key)

    def describe(self) -> dict[str, Any]:
        return {"method": "compiled", "key": self.key}


def _graded(bench: Bench, path: Path) -> Path:
    """The same profile with sparsity 0.85, 0.80 and 0.75 for low, mid and high motion."""
    text, target = path.read_text(), path.with_name(path.stem + "_graded.toml")
    for regime, sparsity in zip(REGIMES, (0.85, 0.80, 0.75), strict=True):
        head, mark, rest = text.partition(f"[regimes.{regime}.static_ratio]")
        before, found, after = rest.partition("sparsity = ")
        text = head + mark + before + found + f"{sparsity}" + after[after.index("\n") :]
    target.write_text(text)
    return target


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
    reference, _ = bench.clips(Dense(), DENSE_CLIPS)
    todo: list[tuple[str, int, int, float, Any]] = []
    for weight in (0.0, 1.0):
        params = profile.regime("mid").static_ratio.model_dump() | {"compensate": weight}
        for steps, first in [(n, 0) for n in (0, 1, 2, 3, 4)] + [(0, n) for n in (1, 2)]:
            share = (1 - steps / bench.steps) * (1 - first / layers)
            if 0.6 / share >= 0.95:
                continue
            plan = drad.make_plan("dynamicrad", subject.grid, BLOCK, **{**params, "sparsity": 0.6 / share})
            todo.append(("equal", steps, first, weight, dense_at_first(fixed(plan.block_mask()), steps, first)))
        mask = drad.make_plan("dynamicrad", subject.grid, BLOCK, **{**params, "sparsity": 0.8}).block_mask()
        every = range(bench.steps)
        for layer in range(layers):
            todo.append(("layer", 0, layer, weight, _only(mask, every, [layer])))
        for group in np.array_split(np.arange(bench.steps), min(6, bench.steps)):
            todo.append(("steps", int(group[0]), len(group), weight, _only(mask, group.tolist(), range(layers))))
    rows = []
    with tqdm(total=len(todo) * DENSE_CLIPS, desc="dense steps and layers", unit="clip") as bar:
        for kind, steps, first, weight, choose in todo:
            key = {"kind": kind, "steps": steps, "first": first}
            made, sparsity = bench.clips(Hooked("dense parts", 0.6, choose, BLOCK, weight, key=key), DENSE_CLIPS, bar)
            rows.append(
                {**key, "compensate": weight, "sparsity": sparsity, "rmse": float(rmse(made, reference).mean())}
            )
    figures.dense(rows, images / "quality_dense.png")
    return {"rows": rows, "attention": _error_by_place(bench)}


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
    own = attention.head_kinds(bench.sites, bench.subject.grid[0])
    layer = torch.tensor([site.site for site in bench.sites])
    regime = torch.tensor([site.regime for site in bench.sites])
    spatial = (own > 0.5)[layer]
    kinds = {"spatial": spatial, "temporal": ~spatial}
    choosers = {
        "static_ratio": attention.static(bench.profile("plain"), "mid", 0.8, bench.subject, 0.0),
        "dynamic_threshold": attention.dynamic(bench.profile("plain"), "mid", 0.8, bench.subject, 0.0),
    }
    paid = 0.8 + 1 / BLOCK  # blocks pay for the mean keys
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
    figures.heads(own, points, layer, images / "quality_heads.png")
    return {"own_frame_share": [[round(x, 4) for x in row] for row in own.tolist()], "rows": rows}
