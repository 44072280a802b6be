"""What is wished for: options, what they name, and what a profile says where they say nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from ..options import Options
from ..passes import Conditions, VideoSite
from ..plans.layout import MIN_FRAMES
from ..plans.own import OwnPlan
from ..profiles import REGIMES, Profile, load_profile, pick_profile
from ..profiles.parameters import Mode
from ..runtime import router
from ..runtime.beside import CallState
from ..runtime.router import Router

SAFE_REGIME = REGIMES[router.SAFE_REGIME]
"""The regime that loses least where motion is not known: the one that keeps most blocks."""


@dataclass(frozen=True)
class Wishes:
    """Options, and what they name.

    profile  None: each site's grid picks one
    router   None: the regime is not routed
    own      the option plan; None: plans are made by pattern
    call     clock and regimes that are kept beside the graphs; both None where drad.compile keeps none
    """

    options: Options
    profile: Profile | None
    router: Router | None
    own: OwnPlan | None = None
    call: CallState = field(default_factory=CallState)

    @staticmethod
    def of(options: Options, call: CallState | None = None) -> Wishes:
        """Load profile and router. Raises ProfileError or RouterError."""
        profile = None if options.profile == "auto" else load_profile(options.profile)
        loaded = Router.load(options.router) if isinstance(options.router, str) else options.router
        own = None
        if options.plan is not None:
            own = OwnPlan(options.plan, options.block_size, options.compensate, options.covariance)
        return Wishes(options, profile, loaded, own, call or CallState())


@dataclass(frozen=True)
class Settings:
    """Options where they are given, else the profile's; pattern "own" is the option plan."""

    profile: Profile
    pattern: str
    mode: Mode | Literal["auto"]
    block_size: int
    dense_layers: int
    dense_steps: int
    min_tokens: int | Literal["auto"]

    @staticmethod
    def of(options: Options, profile: Profile) -> Settings:
        """What holds for the sites of this profile."""

        def chosen(name: str) -> Any:
            given = getattr(options, name)
            return getattr(profile, name) if given is None else given

        names = ("pattern", "block_size", "dense_layers", "dense_steps", "min_tokens")
        mode = profile.mode if options.mode == "auto" else options.mode
        values = {name: chosen(name) for name in names}
        if options.plan is not None and options.pattern != "dense":
            values["pattern"] = "own"
        return Settings(profile=profile, mode=mode, **values)


@dataclass(frozen=True)
class Regimes:
    """The regimes that a graph may be in, and why.

    unmet    the router that was given can't be used
    clocked  the graph knows at which step it is
    """

    names: tuple[str, ...]
    why: str = ""
    unmet: bool = False
    clocked: bool = False


def profile_for(site: VideoSite, wishes: Wishes) -> tuple[Profile, str]:
    """The profile of a site, and why it was picked; '' where it was asked for.

    Too few frames for a video say nothing of those that are to come in the same graph.
    """
    if wishes.profile is not None:
        return wishes.profile, ""
    frames, height, width = site.whole_grid
    grid = (frames if frames >= MIN_FRAMES else 0, height, width)
    return pick_profile(grid, heads=site.all_heads, head_dim=site.shape[-1])


def regimes_of(conditions: Conditions, wishes: Wishes) -> Regimes:
    """The regimes that a graph with these inputs may be in."""
    options, given = wishes.options, wishes.router
    clocked = conditions.timestep is not None or wishes.call.clock is not None
    if options.regime != "auto":
        return Regimes((options.regime,), clocked=clocked)
    why = ""
    if wishes.call.regimes is None:
        if given is None:
            why = "no motion router is given (option router; see fit_router)"
        elif conditions.prompt is None:
            why = (
                "no prompt embedding was found among the inputs of this graph; drad.compile notes it beside the graphs"
            )
        elif conditions.embedding_dim != given.embedding_dim:
            found = conditions.embedding_dim
            why = f"the router is for embeddings of {given.embedding_dim} features, the prompt has {found}"
    if why:
        text = f"regime 'auto' is {SAFE_REGIME!r}, the safe one: {why}"
        return Regimes((SAFE_REGIME,), text, given is not None, clocked)
    chosen = "is pinned by the caller" if given is None else "is chosen by the router from the prompt"
    return Regimes(REGIMES, f"the regime (low, mid or high motion) {chosen}, each row its own", clocked=clocked)


def is_one_layer(site: VideoSite) -> bool:
    """Whether a site belongs to one layer, as blocks.3.attn1; where one graph serves all layers there is no number."""
    return any(piece.isdigit() for piece in site.path.split("."))
