"""From options and profile to the plan of one site, and to what its graph decides when it runs."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from .errors import CrossoverError, OptionsError
from .options import MIN_TOKENS_AUTO, Options
from .plans import crossover
from .plans.table import PlanSpec, PlanTable, RegimeSpec, balance_of
from .profiles import REGIMES, Profile, load_profile, pick_profile
from .runtime import router
from .runtime.router import Router
from .runtime.state import RunState

if TYPE_CHECKING:
    from .passes import Conditions, Control, Site

SAFE_REGIME = REGIMES[router.SAFE_REGIME]
"""The regime that loses least where motion is not known: the one that keeps most blocks."""
CANDIDATE_FACTOR = 2.5
"""Candidates per kept block where a profile does not say how many candidates a selection is made from."""


class SitePlanner:
    """Decides, for the sites of one graph in order, which plan each gets or why it stays dense.

    Options that are None come from the profile. Raises ProfileError or OptionsError if a profile or a router can't be
    loaded. `notes` say what was picked; `unmet` says which wishes can't be met.
    """

    def __init__(self, options: Options):
        self.options = options
        self.router = Router.load(options.router) if isinstance(options.router, str) else options.router
        self.fixed = None if options.profile == "auto" else load_profile(options.profile)
        self.profile: Profile | None = self.fixed
        self.notes: list[str] = []
        self.unmet: list[str] = []
        self.video_sites = 0
        self.asked: set[int] = set()
        self.routed = False
        self.shared = False  # one graph serves several layers
        self.mixed = False  # regimes of several criteria

    def __call__(self, site: Site, conditions: Conditions) -> PlanTable | None:
        """The plan of a video self-attention, or None with `site.reason` set."""
        assert site.grid is not None
        assert site.q_shape is not None
        number = self.video_sites
        self.video_sites += 1
        self.shared = self.shared or not _is_one_layer(site)
        profile = self._profile(site)
        site.reason = self._stays_dense(site, number, profile)
        if site.reason:
            return None
        routed = self.routed
        spec = self._spec(profile, conditions)
        table = spec.build(site.grid, *site.text)
        site.reason = self._no_gain(site, profile, spec, table)
        if site.reason:
            self.routed = routed
            return None
        self.mixed = self.mixed or len(spec.criteria) > 1
        site.plan_spec = spec.to_json()
        return table

    def control(self, conditions: Conditions) -> Control:
        """What the graph decides when it runs. To be called after all sites have their plans."""
        from .passes import Control

        profile, options = self.profile, self.options
        if profile is None:  # no site was planned
            return Control()
        steps = profile.dense_steps if options.dense_steps is None else options.dense_steps
        refresh = options.refresh_steps or 0
        if refresh and self._mode(profile) != "dynamic_threshold":
            refresh = 0
            self._unmet(f"refresh_steps = {options.refresh_steps} has no meaning: mode is not dynamic_threshold")
        if refresh and self.mixed:
            refresh = 0
            self._unmet(
                f"refresh_steps = {options.refresh_steps} can't be honoured: the regimes choose by different criteria; "
                "fix one with the option regime, or give sparsity"
            )
        if refresh and self.shared:
            refresh = 0
            self._unmet(
                f"refresh_steps = {options.refresh_steps} can't be honoured: one compiled block serves all layers; "
                "compile the whole model"
            )
        timestep = options.dense_timestep
        wishes = {"dense_steps": steps or None, "dense_timestep": timestep, "refresh_steps": refresh or None}
        wanted = {name: value for name, value in wishes.items() if value is not None}
        kept = options.state or RunState()
        if wanted and conditions.timestep is None and kept.clock is None:
            asked = ", ".join(f"{name} = {value}" for name, value in wanted.items())
            self._unmet(f"{asked} can't be honoured: no timestep among the inputs of this graph; every step is sparse")
            steps, refresh, timestep = 0, 0, None
        tensors, masked = None, False
        if self.routed and self.router is not None:
            tensors, masked = self.router.tensors(), self.router.masked
        return Control(tensors, masked, steps, timestep, refresh, kept.clock, kept.regimes)

    def _profile(self, site: Site) -> Profile:
        if self.fixed is not None:
            return self.fixed
        assert site.grid is not None
        assert site.q_shape is not None
        profile, why = pick_profile(site.grid, heads=site.q_shape[1], head_dim=site.q_shape[-1])
        self._note(f"profile 'auto' is {profile.name!r}: {why}")
        self.profile = self.profile or profile
        return profile

    def _mode(self, profile: Profile) -> str:
        return profile.mode if self.options.mode == "auto" else self.options.mode

    def _pattern(self, profile: Profile) -> str:
        return self.options.pattern or profile.pattern

    def _spec(self, profile: Profile, conditions: Conditions) -> PlanSpec:
        options = self.options
        block_size = options.block_size or profile.block_size
        if self._pattern(profile) == "radial":
            given = [name for name in ("router", "sparsity", "compensate") if getattr(options, name) is not None]
            given += ["mode"] if options.mode == "dynamic_threshold" else []
            if given:
                self._note(f"pattern 'radial' has no meaning for {', '.join(given)}: not used")
            static = profile.regime(SAFE_REGIME).static_ratio
            params = {
                "decay_factor": 1.0 if options.decay_factor is None else options.decay_factor,
                "sink_frames": static.sink_frames if options.sink_frames is None else options.sink_frames,
            }
            return PlanSpec("radial", block_size, (RegimeSpec("", _pairs(params)),))
        names = self._regimes(conditions)
        if self._mode(profile) == "static_ratio":
            regimes = tuple(self._static(profile, name) for name in names)
            return PlanSpec("dynamicrad", block_size, regimes)
        return PlanSpec("dynamicrad", block_size, tuple(self._dynamic(profile, name) for name in names))

    def _regimes(self, conditions: Conditions) -> tuple[str, ...]:
        """The regimes that the graph may be in."""
        if self.options.regime != "auto":
            return (self.options.regime,)
        why = ""
        if (self.options.state or RunState()).regimes is not None:
            why = ""
        elif self.router is None:
            why = "no motion router is given (option router; see fit_router)"
        elif conditions.prompt is None:
            why = "no prompt embedding was found among the inputs of this graph"
        else:
            found = conditions.embedding_dim
            if found != self.router.embedding_dim:
                why = f"the router is for embeddings of {self.router.embedding_dim} features, the prompt has {found}"
        if why:
            message = f"regime 'auto' is {SAFE_REGIME!r}, the safe one: {why}"
            (self._note if self.router is None else self._unmet)(message)
            return (SAFE_REGIME,)
        self.routed = True
        chosen = "is pinned by the caller" if self.router is None else "is chosen by the router from the prompt"
        self._note(f"the regime (low, mid or high motion) {chosen}, each row its own")
        return REGIMES

    def _static(self, profile: Profile, name: str) -> RegimeSpec:
        params = self._override(profile.regime(name).static_ratio.model_dump())
        return RegimeSpec(name, _pairs(params))

    def _dynamic(self, profile: Profile, name: str) -> RegimeSpec:
        """A regime whose blocks are chosen when the graph runs, among the candidates of the profile."""
        regime = profile.regime(name)
        table = regime.dynamic_threshold
        target = self.options.sparsity
        if table is None and target is None:
            target = regime.static_ratio.sparsity
        if target == 0.0:  # nothing to choose
            return self._static(profile, name)
        params = self._override((table or regime.static_ratio).model_dump())
        criterion, balance = "ratio", 0.0
        near: float | None = None
        far: float | None = None
        if target is None:
            assert table is not None
            criterion, near, far = table.criterion, table.near, table.far
            params["sparsity"] = table.sparsity
        else:
            wide = max(0.0, 1.0 - CANDIDATE_FACTOR * (1.0 - target))
            params["sparsity"] = wide if table is None else min(wide, table.sparsity)
            balance = 0.0 if table is None else balance_of(table.criterion, table.near, table.far)
        for key in ("criterion", "near", "far"):
            params.pop(key, None)
        return RegimeSpec(name, _pairs(params), criterion, near, far, target, balance)

    def _override(self, params: dict[str, Any]) -> dict[str, Any]:
        given = {
            name: getattr(self.options, name) for name in ("sparsity", "decay_factor", "sink_frames", "compensate")
        }
        return {**params, **{name: value for name, value in given.items() if value is not None}}

    def _stays_dense(self, site: Site, number: int, profile: Profile) -> str:
        assert site.grid is not None
        options = self.options
        if self._pattern(profile) == "dense":
            self.asked.add(id(site))
            return "pattern is 'dense'"
        if self._pattern(profile) not in ("dynamicrad", "radial"):
            raise OptionsError(f"pattern {self._pattern(profile)!r} of profile {profile.name!r} is not available yet.")
        dense_layers = profile.dense_layers if options.dense_layers is None else options.dense_layers
        if dense_layers and not _is_one_layer(site):
            return "dense_layers can't be honoured: one compiled block serves all layers; compile the whole model"
        if number < dense_layers:
            self.asked.add(id(site))
            return f"one of the first {dense_layers} layers (dense_layers)"
        limit = self._min_tokens(profile)
        if limit != "auto" and _tokens(site) < limit:
            return f"{_tokens(site)} tokens are fewer than min_tokens = {limit}: sparse attention would not pay"
        return ""

    def _min_tokens(self, profile: Profile) -> Any:
        return profile.min_tokens if self.options.min_tokens is None else self.options.min_tokens

    def _no_gain(self, site: Site, profile: Profile, spec: PlanSpec, table: PlanTable) -> str:
        """With min_tokens "auto": why sparse attention would not pay on this device; never raises."""
        if self._min_tokens(profile) != "auto":
            return ""
        from .passes.graph import value_of

        assert site.q_shape is not None
        query = value_of(site.call.query)
        half = (site.call.dtype or query.dtype) != torch.float32
        tokens, sparsity = _tokens(site), _expected_sparsity(profile, spec, table)
        gain, arch = None, crossover.architecture(query.device)
        try:
            gain = crossover.expected_gain(arch, tokens, sparsity, site.q_shape[-1], half) if arch else None
        except CrossoverError as error:
            self._unmet(f"min_tokens 'auto' is {MIN_TOKENS_AUTO}: {error}")
        if gain is None and tokens < MIN_TOKENS_AUTO:
            return f"{tokens} tokens are fewer than min_tokens = {MIN_TOKENS_AUTO}: sparse attention would not pay"
        if gain is not None and gain.ratio < crossover.MIN_GAIN:
            return f"{tokens} tokens, {sparsity:.0%} sparse: expected {gain}, too little to pay"
        return ""

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def _unmet(self, text: str) -> None:
        if text not in self.unmet:
            self.unmet.append(text)


def _tokens(site: Site) -> int:
    assert site.grid is not None
    return math.prod(site.grid) + sum(site.text)


def _expected_sparsity(profile: Profile, spec: PlanSpec, table: PlanTable) -> float:
    """Share of dense attention that calls will skip: the mean over the regimes that the graph may be in.

    Where blocks are chosen by fixed thresholds it is not known before; the profile's static plan stands for it, since
    both modes of a profile are tuned to one sparsity.
    """
    plan, shares = table.plan, []
    for number, regime in enumerate(spec.regimes):
        if regime.criterion:
            static = profile.regime(regime.name).static_ratio.sparsity
            shares.append(static if regime.sparsity is None else regime.sparsity)
            continue
        own = slice(number, number + 1)
        weights = plan.compensate if len(plan.compensate) == 1 else plan.compensate[own]
        counts, indices = plan.kv_counts[own], plan.kv_indices[own]
        shares.append(replace(plan, kv_counts=counts, kv_indices=indices, compensate=weights).sparsity)
    return sum(shares) / len(shares)


def _is_one_layer(site: Site) -> bool:
    """Whether a site belongs to one layer, as blocks.3.attn1; where one graph serves all layers there is no number."""
    return any(piece.isdigit() for piece in site.path.split("."))


def _pairs(params: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(params.items()))
