"""Whether sparse attention pays: the number of tokens, and the speed-up to be expected on the device."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch

from ..errors import CrossoverError
from ..options import MIN_TOKENS_AUTO
from ..passes import Dense, PlannedSite, VideoSite
from ..plans import crossover
from ..plans.table import PlanSpec, PlanTable
from ..profiles import Profile
from ..reporting.reason import Reason
from .settings import Settings
from .targets import regime_plan


def few_tokens(site: VideoSite, limit: int) -> Dense:
    """Dense for want of tokens; limit: from how many on it pays."""
    text = f"{site.tokens} tokens are fewer than min_tokens = {limit}: sparse attention would not pay"
    advice = "lower `min_tokens` to make it sparse all the same; it may be slower"
    return Dense(Reason("few_tokens", text, advice), below=limit)


def if_it_pays(planned: PlannedSite, settings: Settings) -> tuple[PlannedSite | Dense, str]:
    """The planned site, or why sparse attention would not pay; and why that can't be told of this device.

    Either says for which numbers of tokens it holds.
    """
    if settings.min_tokens != "auto":
        return replace(planned, at_least=settings.min_tokens), ""
    site = planned.video
    problem, gain, half = "", None, site.dtype != torch.float32
    tokens, sparsity = site.tokens, expected_sparsity(settings.profile, planned.spec, planned.table)
    arch = crossover.architecture(site.device)
    try:
        gain = crossover.expected_gain(arch, tokens, sparsity, site.shape[-1], half) if arch else None
    except CrossoverError as error:
        problem = f"min_tokens 'auto' is {MIN_TOKENS_AUTO}: {error}"
    if gain is None:
        few = tokens < MIN_TOKENS_AUTO
        return few_tokens(site, MIN_TOKENS_AUTO) if few else replace(planned, at_least=MIN_TOKENS_AUTO), problem
    assert arch is not None
    first = _first_length(crossover.load(), arch, sparsity, site.shape[-1], half)
    if gain.ratio < crossover.MIN_GAIN:
        text = f"{tokens} tokens, {sparsity:.0%} sparse: expected {gain}, too little to pay"
        advice = "set `min_tokens=0` to make it sparse all the same; it would be slower by that table"
        # a pattern's sparsity may grow with the length: of twice as many tokens nothing is known
        below = min(2 * tokens, first if first is not None and first > tokens else 2 * tokens)
        return Dense(Reason("no_gain", text, advice), below=below), problem
    return replace(planned, at_least=tokens if first is None else min(first, tokens)), problem


_first_length = functools.lru_cache(maxsize=16)(crossover.first_length)


def expected_sparsity(profile: Profile, spec: PlanSpec | None, table: PlanTable) -> float:
    """Share of dense attention that calls will skip: the mean over the regimes that the graph may be in.

    Where blocks are chosen by fixed thresholds it is not known before; the profile's static plan stands for it, since
    both modes of a profile are tuned to one sparsity.
    """
    plan, shares = table.plan, []
    if spec is None:
        return plan.sparsity
    for number, regime in enumerate(spec.regimes):
        if regime.criterion:
            static = profile.regime(regime.name).static_ratio.sparsity
            shares.append(static if regime.sparsity is None else regime.sparsity)
            continue
        shares.append(regime_plan(plan, number).sparsity)
    return sum(shares) / len(shares)
