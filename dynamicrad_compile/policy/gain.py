"""Whether sparse attention pays: the number of tokens, and the speed-up to be expected on the device."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch

from ..errors import CrossoverError
from ..options import MIN_TOKENS_AUTO
from ..passes import Dense, PlannedSite, VideoSite
from ..plans import cost, crossover
from ..plans.table import PlanSpec, PlanTable
from ..profiles import Profile
from ..reporting.reason import Reason
from .planning import planned, takes_regimes
from .settings import Regimes, Settings, Wishes


def few_tokens(site: VideoSite, limit: int) -> Dense:
    """Dense for want of tokens; limit: from how many on it pays."""
    text = f"{site.length} tokens are fewer than min_tokens = {limit}: sparse attention would not pay"
    advice = "lower `min_tokens` to make it sparse all the same; it may be slower"
    return Dense(Reason("few_tokens", text, advice), below=limit)


def if_it_pays(sparse: PlannedSite, settings: Settings) -> tuple[PlannedSite | Dense, str]:
    """The planned site, or why sparse attention would not pay; and why that can't be told of this device.

    Either says for which numbers of tokens it holds.
    """
    if settings.min_tokens != "auto":
        return replace(sparse, at_least=settings.min_tokens), ""
    site = sparse.video
    problem, gain, half = "", None, site.dtype != torch.float32
    tokens, sparsity = site.length, expected_sparsity(settings.profile, sparse.spec, sparse.table)
    arch = crossover.architecture(site.device)
    try:
        gain = crossover.expected_gain(arch, tokens, sparsity, site.shape[-1], half) if arch else None
    except CrossoverError as error:
        problem = f"min_tokens 'auto' is {MIN_TOKENS_AUTO}: {error}"
    if gain is None:
        few = tokens < MIN_TOKENS_AUTO
        return few_tokens(site, MIN_TOKENS_AUTO) if few else replace(sparse, at_least=MIN_TOKENS_AUTO), problem
    assert arch is not None
    first = _first_length(crossover.load(), arch, sparsity, site.shape[-1], half)
    if gain.ratio < crossover.MIN_GAIN:
        text = f"{tokens} tokens, {sparsity:.0%} sparse: expected {gain}, too little to pay"
        advice = "set `min_tokens=0` to make it sparse all the same; it would be slower by that table"
        # a pattern's sparsity may grow with the length: of twice as many tokens nothing is known
        below = min(2 * tokens, first if first is not None and first > tokens else 2 * tokens)
        return Dense(Reason("no_gain", text, advice), below=below), problem
    return replace(sparse, at_least=tokens if first is None else min(first, tokens)), problem


def mode_for(site: VideoSite, settings: Settings, wishes: Wishes, regimes: Regimes) -> tuple[Settings, str]:
    """Settings with a mode: "auto" chooses blocks by content where that pays on the device; and why, in a line.

    By the crossover table's figure for the attention alone, and what choosing and covariances cost on top. With a limit
    of tokens of one's own the question is not asked: blocks are chosen by content.
    """
    if settings.mode != "auto":
        return settings, ""
    static, dynamic = (replace(settings, mode=mode) for mode in ("static_ratio", "dynamic_threshold"))
    if not takes_regimes(settings.pattern):
        return static, ""
    if settings.min_tokens != "auto":
        return dynamic, ""
    trial, arch = planned(site, dynamic, wishes, regimes), crossover.architecture(site.device)
    if not isinstance(trial, PlannedSite) or arch is None:
        return static, "mode 'auto' is 'static_ratio': nothing is known of this device"
    plan, half = trial.table.plan, site.dtype != torch.float32
    sparsity = expected_sparsity(settings.profile, trial.spec, trial.table)
    try:
        gain = crossover.expected_gain(arch, site.length, sparsity, site.shape[-1], half)
    except CrossoverError:
        gain = None  # said by if_it_pays
    if gain is None:
        return static, "mode 'auto' is 'static_ratio': nothing is known of this device"
    extra = cost.SELECTION
    if plan.covariance and any(plan.compensate):
        extra += cost.covariances(site.shape[-1], plan.kv_len, plan.block_q, plan.block_kv, plan.q_len)
    ratio = 1.0 / (1.0 / gain.ratio + extra)
    mode = dynamic if ratio >= crossover.MIN_GAIN else static
    return mode, f"mode 'auto' is {mode.mode!r}: choosing by content is expected to run at {ratio:.2f}x of dense"


_first_length = functools.lru_cache(maxsize=16)(crossover.first_length)


def expected_sparsity(profile: Profile, spec: PlanSpec | None, table: PlanTable) -> float:
    """Share of dense attention that calls will skip: the mean over the regimes and stages that the graph may be in.

    Where blocks are chosen by fixed thresholds it is not known before; the profile's static plan stands for it, since
    both modes of a profile are tuned to one sparsity.
    """
    plan, shares, weights = table.plan, [], []
    if spec is None:
        return plan.sparsity
    for number, regime in enumerate(spec.regimes):
        weights.append(regime.weight)
        if regime.criterion or regime.sparsity is not None:
            known = regime.sparsity
            shares.append(profile.regime(regime.name).static_ratio.sparsity if known is None else known)
            continue
        shares.append(plan.one(number).sparsity)
    return sum(a * b for a, b in zip(shares, weights, strict=True)) / sum(weights)
