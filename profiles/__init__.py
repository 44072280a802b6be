"""Profiles: tuned parameters per model family and resolution, as TOML files with a versioned schema."""

from .loader import list_profiles, load_profile, pick_profile
from .parameters import REGIMES, DynamicThreshold, StaticRatio
from .schema import Match, Profile, Provenance, Regime, Regimes

__all__ = [
    "REGIMES",
    "DynamicThreshold",
    "Match",
    "Profile",
    "Provenance",
    "Regime",
    "Regimes",
    "StaticRatio",
    "list_profiles",
    "load_profile",
    "pick_profile",
]
