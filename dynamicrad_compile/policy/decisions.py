"""Decisions for the video self-attentions of one graph."""

from __future__ import annotations

from collections.abc import Sequence

from ..passes import Conditions, Decisions, Dense, PlannedSite, VideoSite
from ..reporting.reason import Reason
from .control import control_of
from .gain import few_tokens, if_it_pays, mode_for
from .method import idle_covariance, method_of
from .planning import AS_ASKED, pattern_notes, planned, takes_regimes, without_meaning
from .schedule import schedule_of
from .settings import Settings, Wishes, is_one_layer, profile_for, regimes_of
from .share import share_of
from .targets import unreached


def decide(sites: Sequence[VideoSite], conditions: Conditions, wishes: Wishes) -> Decisions:
    """Decisions for the video self-attentions of one graph, in order."""
    notes: dict[str, None] = {}  # in order, each once
    unmet: dict[str, None] = {}
    profiles: dict[str, None] = {}
    regimes = regimes_of(conditions, wishes)
    first: Settings | None = None if wishes.profile is None else Settings.of(wishes.options, wishes.profile)
    decided: list[PlannedSite | Dense] = []
    layers: dict[int, int] = {}  # chunks of one attention are one layer
    for site in sites:
        number = layers.setdefault(id(site.site.of or site.site), len(layers))
        profile, why = profile_for(site, wishes)
        if why:
            notes[f"profile 'auto' is {profile.name!r}: {why}"] = None
        settings = Settings.of(wishes.options, profile)
        first = first or settings
        dense = _stays_dense(site, number, settings)
        if dense is None:
            settings, why = mode_for(site, settings, wishes, regimes)
            notes |= dict.fromkeys([why][: bool(why)])
        decision = dense or planned(site, settings, wishes, regimes)
        if isinstance(decision, PlannedSite):
            profiles[profile.name] = None
            ignored = without_meaning(wishes.options, settings.pattern)
            if ignored:
                notes[ignored] = None
            if takes_regimes(settings.pattern):
                scheduled = schedule_of(wishes.options, settings.profile, regimes.names, regimes.clocked)
                if regimes.why:
                    (unmet if regimes.unmet else notes)[regimes.why] = None
                if scheduled.note:
                    (notes if regimes.clocked else unmet)[scheduled.note] = None
            for text, is_unmet in pattern_notes(decision, settings, wishes.options, regimes):
                (unmet if is_unmet else notes)[text] = None
            lacking = unreached(decision)
            decision, problem = if_it_pays(decision, settings)
            if problem:
                unmet[problem] = None
            if isinstance(decision, PlannedSite):
                decision, balance = share_of(decision, wishes.own)
                lines = (method_of(decision), lacking, idle_covariance(decision, wishes.options), balance)
                notes |= dict.fromkeys(line for line in lines if line)
        decided.append(decision)
    unused = [decision.reason for decision in decided if isinstance(decision, Dense) and not decision.asked]
    if wishes.own is not None and unused and not any(isinstance(decision, PlannedSite) for decision in decided):
        unmet[f"no attention of this graph uses the option plan. {unused[0]}"] = None
    control, problems = control_of(sites, decided, conditions, first, wishes)
    return Decisions(decided, control, tuple(notes), (*unmet, *problems), tuple(profiles))


def _stays_dense(site: VideoSite, number: int, settings: Settings) -> Dense | None:
    """Why a site gets no plan at all; number counts the video self-attentions of its graph, in order."""
    if settings.pattern == "dense":
        return Dense(Reason("pattern_dense", "pattern is 'dense'", AS_ASKED), asked=True)
    if settings.dense_layers and not is_one_layer(site):
        text = "dense_layers can't be honoured: one compiled block serves all layers; compile the whole model"
        advice = "compile the whole model with torch.compile(model), or set dense_layers=0"
        return Dense(Reason("dense_layers_unmet", text, advice))
    if number < settings.dense_layers:
        text = f"one of the first {settings.dense_layers} layers (dense_layers)"
        return Dense(Reason("dense_layers", text, AS_ASKED), asked=True)
    limit = settings.min_tokens
    if limit != "auto" and site.length < limit:
        return few_tokens(site, limit)
    return None
