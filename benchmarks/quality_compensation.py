"""Stage (e) of benchmarks/quality.py in videos: where compensation helps a clip, with the same blocks for all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import quality_attention as attention
import quality_bench as sizes
import torch
from quality_bench import BLOCK, Bench
from tqdm import tqdm

import dynamicrad_compile as drad
from dynamicrad_compile.profiles import REGIMES
from dynamicrad_compile.quality import Dense, Place, Subject, attention_hook, rmse
from dynamicrad_compile.quality.blocks import masked_attention
from dynamicrad_compile.quality.methods import Run

SPARSITY = 0.8


@dataclass(frozen=True)
class Partly:
    """The same blocks everywhere, compensated by `weight` in some heads [layers, heads] of some steps."""

    name: str
    mask: torch.Tensor
    heads: torch.Tensor
    steps: tuple[int, ...]
    weight: float
    params: dict[str, Any]  # of the plan
    wanted: float = SPARSITY

    def describe(self) -> dict[str, Any]:
        """What decides its clips."""
        where = {"heads": self.heads.int().tolist(), "steps": list(self.steps), "weight": self.weight}
        return {"method": "partly", "params": self.params, **where}

    @contextmanager
    def run(self, subject: Subject) -> Iterator[Run]:
        """The model under the hook."""

        def rule(place: Place, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> torch.Tensor:
            without = masked_attention(q, k, v, self.mask, BLOCK, 0.0, scale)
            heads = self.heads[place.site]
            if place.step not in self.steps or not bool(heads.any()):
                return without
            with_it = masked_attention(q, k, v, self.mask, BLOCK, self.weight, scale)
            return torch.where(heads[None, :, None, None], with_it, without)

        with attention_hook(subject.model, subject.tokens, rule):
            yield Run(subject.model, lambda: SPARSITY)


def compensation(bench: Bench, images: Path) -> dict[str, Any]:
    """(e): RMSE of clips to the dense ones, by regime, and the paired difference to no compensation."""
    subject = bench.unguided
    kinds = attention.by_kind(*attention.head_kinds(bench.sites, subject.grid[0]))
    every = torch.ones_like(kinds["spatial"])
    table = bench.profile("plain").regime("mid").static_ratio.model_dump()
    params = {**table, "sparsity": SPARSITY, "compensate": 0.0}
    mask = drad.make_plan("dynamicrad", subject.grid, BLOCK, **params).block_mask()
    first, all_steps = tuple(range(3)), tuple(range(bench.steps))
    todo = [("none", ~every, all_steps, 1.0)]
    todo += [(f"all, weight {weight}", every, all_steps, weight) for weight in (0.3, 0.6, 1.0)]
    todo += [(f"{kind} heads ({int(heads.sum())})", heads, all_steps, 0.6) for kind, heads in kinds.items()]
    todo += [("first 3 steps", every, first, 0.6), ("all but the first 3 steps", every, all_steps[3:], 0.6)]
    dense, _ = bench.clips(Dense(), sizes.CLIPS, subject=subject)
    rows: list[dict[str, Any]] = []
    base = torch.zeros(0)
    with tqdm(total=len(todo) * sizes.CLIPS, desc="compensation", unit="clip") as bar:
        for name, heads, steps, weight in todo:
            made, _ = bench.clips(Partly(name, mask, heads, steps, weight, params), sizes.CLIPS, bar, subject)
            error = rmse(made, dense)
            base = error if not rows else base
            by_regime = {regime: float(error[r::3].mean()) for r, regime in enumerate(REGIMES)}
            change = error - base
            paired = {"change": float(change.mean()), "standard_error": float(change.std() / len(change) ** 0.5)}
            rows.append({"where": name, "rmse": float(error.mean()), **by_regime, **paired})
    return {"sparsity": SPARSITY, "rows": rows}
