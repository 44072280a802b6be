"""Attention of the trained model: queries, keys and values captured once, and the error of any blocks on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from dynamicrad_compile import make_plan
from dynamicrad_compile.plans.make import make_candidates
from dynamicrad_compile.plans.plan import Candidates
from dynamicrad_compile.plans.ratios import balance_of, ratios_for
from dynamicrad_compile.policy import CANDIDATE_FACTOR
from dynamicrad_compile.profiles import Profile
from dynamicrad_compile.quality import Subject, attention_hook
from dynamicrad_compile.quality.blocks import block_budget, block_mass, oracle_mask, random_mask, skipped
from dynamicrad_compile.tuning.choosing import Choice
from dynamicrad_compile.tuning.sums import BlockSums, sample_rows

ROWS = 128  # sampled query rows of a head


@dataclass
class Site:
    """One captured attention, of the prompted half of the batch: block sums, block masses, and where it is."""

    prompt: int
    step: int
    site: int
    sums: BlockSums
    mass: torch.Tensor  # [H, M, M]

    @property
    def regime(self) -> int:
        """Motion of the prompt: prompts come as low, mid, high in turn."""
        return self.prompt % 3


Chooser = Callable[[Site], torch.Tensor]
"""Blocks of a site, bool [H or 1, M, M]."""


def capture(subject: Subject, prompts: Sequence[str], steps: Sequence[int], block: int, folder: Path) -> list[Site]:
    """Run the dense model on each prompt (seed = its number) and keep q, k, v of the steps, fp16, in the folder."""
    sites = []
    for number, prompt in enumerate(prompts):
        file = folder / f"capture-{subject.name.replace(' ', '-').replace(',', '')}-{number}.safetensors"
        if not file.is_file():
            kept: dict[str, torch.Tensor] = {}

            def keep(place, q, k, v, scale, kept=kept):
                if place.step in steps:
                    kept[f"{place.step}.{place.site}"] = torch.stack([x[0].detach() for x in (q, k, v)]).half()

            with torch.no_grad(), attention_hook(subject.model, subject.tokens, keep):
                subject.generate(subject.model, [prompt], [number])
            folder.mkdir(parents=True, exist_ok=True)
            save_file(kept, file)
        for name, qkv in load_file(file).items():
            step, site = map(int, name.split("."))
            q, k, v = qkv.float()
            sums = BlockSums(q, k, v, block, sample_rows(subject.tokens, ROWS, seed=site))
            sites.append(Site(number, step, site, sums, block_mass(q[None], k[None], block)[0]))
    return sorted(sites, key=lambda s: (s.prompt, s.step, s.site))


def errors(sites: Sequence[Site], choose: Chooser, compensate: float, block: int) -> tuple[torch.Tensor, float]:
    """(relative L2 error of the output, fp32 [sites, heads]; share of dense attention that is skipped)."""
    rows, shares = [], []
    for site in sites:
        mask = choose(site)
        difference = site.sums.output(mask, compensate) - site.sums.dense
        rows.append(difference.flatten(1).norm(dim=1) / site.sums.dense.flatten(1).norm(dim=1))
        shares.append(skipped(mask, block, compensate))
    return torch.stack(rows), sum(shares) / len(shares)


def over_run(sites: Sequence[Site], error: torch.Tensor, steps: int, first: int = 0) -> float:
    """Mean of errors [sites, heads] over a run of `steps`, the `first` ones dense; interpolated where not captured."""
    where = np.array([site.step for site in sites])
    captured = np.unique(where)
    mean = error.mean(1).numpy()
    by_step = np.interp(np.arange(steps), captured, [mean[where == step].mean() for step in captured])
    by_step[:first] = 0.0
    return float(by_step.mean())


def static(profile: Profile, regime: str, sparsity: float, subject: Subject, compensate: float | None) -> Chooser:
    """Our static_ratio, as the backend plans it."""
    table = profile.regime(regime).static_ratio.model_dump() | {"sparsity": sparsity}
    table |= {} if compensate is None else {"compensate": compensate}
    mask = make_plan("dynamicrad", subject.grid, profile.block_size, **table).block_mask()[0]
    return lambda site: mask


def choice(
    profile: Profile,
    regime: str,
    sparsity: float,
    subject: Subject,
    compensate: float | None,
    factor: float = CANDIDATE_FACTOR,
) -> tuple[Candidates, float, float]:
    """Candidates, near and far of our dynamic_threshold, as the backend sets them for the option sparsity: by ratio."""
    found = profile.regime(regime)
    table = (found.dynamic_threshold or found.static_ratio).model_dump()
    wide = max(0.0, 1.0 - factor * (1.0 - sparsity))
    table["sparsity"] = min(wide, table["sparsity"]) if found.dynamic_threshold else wide
    table |= {} if compensate is None else {"compensate": compensate}
    thresholds = [table.pop(name, None) for name in ("criterion", "near", "far")]
    table.pop("rank", None)  # of the choice, not of the candidates
    balance = balance_of(*thresholds) if found.dynamic_threshold else 0.0
    candidates = make_candidates(subject.grid, profile.block_size, **table)
    return candidates, *ratios_for(candidates, sparsity, balance)


def dynamic(*given: Any, **more: Any) -> Chooser:
    """Our dynamic_threshold; arguments as for `choice`."""
    candidates, near, far = choice(*given, **more)
    return lambda site: Choice(site.sums, candidates, "ratio").mask(near, far)


def oracle(sparsity: float, block: int, compensate: float = 0.0) -> Chooser:
    """The blocks of each head with the most attention."""
    return lambda site: oracle_mask(site.mass, block_budget(site.mass.shape[-1], sparsity, block, compensate))


def random_blocks(sparsity: float, block: int) -> Chooser:
    """Random blocks and the diagonal."""

    def choose(site: Site) -> torch.Tensor:
        heads, blocks, _ = site.mass.shape
        budget = block_budget(blocks, sparsity, block, 0.0)
        return random_mask((1, heads, blocks, blocks), budget, site.site)[0]

    return choose


def head_kinds(sites: Sequence[Site], frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Shares of attention over those of uniform attention, fp64 [layers, heads] each, mean over the captures.

    In the own frame, and at the own place (the same block) of the other frames. A frame must be whole blocks.
    """
    layers = 1 + max(site.site for site in sites)
    blocks = sites[0].mass.shape[-1]
    number = torch.arange(blocks)
    frame, place = number * frames // blocks, number % (blocks // frames)
    own = frame[:, None] == frame[None]
    same = (place[:, None] == place[None]) & ~own
    found = torch.zeros(2, layers, sites[0].mass.shape[0], dtype=torch.float64)
    for site in sites:
        for kind, where in enumerate((own, same)):
            found[kind, site.site] += (site.mass * where).sum(-1).mean(-1)
    found *= layers / len(sites)
    return found[0] / own.double().mean(), found[1] / same.double().mean()


def by_kind(own: torch.Tensor, same: torch.Tensor) -> dict[str, torch.Tensor]:
    """Which heads, bool [layers, heads], are spatial, temporal or diffuse, from the shares that `head_kinds` gives."""
    spatial, temporal = (own > 1.5) & (own >= same), (same > 1.5) & (same > own)
    return {"spatial": spatial, "temporal": temporal, "diffuse": ~(spatial | temporal)}
