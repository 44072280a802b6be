"""By which rule `select_blocks` chooses among candidates, and what it ranks them by; `select_op` has the formulas."""

from __future__ import annotations

CRITERIA = ("threshold", "mass", "ratio")
RANKS = ("mass", "error")
