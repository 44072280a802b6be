"""Profiles: tuned parameters per model family and resolution, as TOML files with a versioned schema."""

from .loader import list_profiles, load_profile, pick_profile
from .schema import REGIMES, DynamicThreshold, Match, Profile, Provenance, Regime, Regimes, StaticRatio

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
