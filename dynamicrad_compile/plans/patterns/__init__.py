"""Patterns of plans: one file each, all with the interface `Pattern`. What is entered here can be asked for by name."""

from __future__ import annotations

from typing import Any

from .adaspa import ADASPA
from .dense import DENSE
from .dynamicrad import DYNAMICRAD
from .lvsa import LVSA_PATTERN
from .pattern import Pattern
from .radial import RADIAL

PATTERNS: dict[str, Pattern[Any]] = {
    pattern.name: pattern for pattern in (RADIAL, DYNAMICRAD, ADASPA, LVSA_PATTERN, DENSE)
}

__all__ = ["PATTERNS", "Pattern"]
