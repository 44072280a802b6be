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
FRAME = 64  # tokens of a frame: larger blocks, whose means say less


@dataclass(frozen=True)
class Partly:
    """The same blocks everywhere, compensated by `weight` in some heads [layers, heads] of some steps."""

    name: str
    mask: torch.Tensor
    heads: torch.Tensor
    steps: tuple[int, ...]
    weight: float
    params: dict[str, Any]  # of the plan
    block: int = BLOCK
    covariance: bool = False  # as quality.blocks.second_order
    wanted: float = SPARSITY

    def describe(self) -> dict[str, Any]:
        """What decides its clips."""
        where = {"heads": self.heads.int().tolist(), "steps": list(self.steps), "weight": self.weight}
        more = {"block": self.block} if self.block != BLOCK else {}
        more |= {"covariance": True} if self.covariance else {}
        return {"method": "partly", "params": self.params, **where, **more}

    @contextmanager
    def run(self, subject: Subject) -> Iterator[Run]:
        """The model under the hook."""

        def rule(place: Place, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> torch.Tensor:
            without = masked_attention(q, k, v, self.mask, self.block, 0.0, scale)
            heads = self.heads[place.site]
            if place.step not in self.steps or not bool(heads.any()):
                return without
            with_it = masked_attention(q, k, v, self.mask, self.block, self.weight, scale, self.covariance)
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
    first, all_steps = tuple(range(3)), tuple(range(bench.steps))

    def everywhere(block: int) -> list[Partly]:
        mask = drad.make_plan("dynamicrad", subject.grid, block, **params).block_mask()
        given = (mask, every, all_steps, 1.0, params, block)
        return [
            Partly("none", mask, ~every, *given[2:]),
            Partly("means", *given),
            Partly("means and covariances", *given, covariance=True),
        ]

    todo = everywhere(BLOCK)
    mask = todo[0].mask
    todo += [Partly(f"means, weight {weight}", mask, every, all_steps, weight, params) for weight in (0.3, 0.6)]
    for kind, heads in kinds.items():
        todo.append(
            Partly(f"means, weight 0.6, {kind} heads ({int(heads.sum())})", mask, heads, all_steps, 0.6, params)
        )
    for name, steps in (("first 3 steps", first), ("all but the first 3 steps", all_steps[3:])):
        todo.append(Partly(f"means, weight 0.6, {name}", mask, every, steps, 0.6, params))
    todo += everywhere(FRAME)
    dense, _ = bench.clips(Dense(), sizes.CLIPS, subject=subject)
    rows: list[dict[str, Any]] = []
    base = torch.zeros(0)
    with tqdm(total=len(todo) * sizes.CLIPS, desc="compensation", unit="clip") as bar:
        for method in todo:
            made, _ = bench.clips(method, sizes.CLIPS, bar, subject)
            error = rmse(made, dense)
            base = error if method.name == "none" else base
            by_regime = {regime: float(error[r::3].mean()) for r, regime in enumerate(REGIMES)}
            change = error - base
            paired = {"change": float(change.mean()), "standard_error": float(change.std() / len(change) ** 0.5)}
            where = {"block": method.block, "where": method.name}
            rows.append({**where, "rmse": float(error.mean()), **by_regime, **paired})
    return {"sparsity": SPARSITY, "rows": rows}
