"""By which rule `select_blocks` chooses among candidates; `select_op` has the formulas."""

from __future__ import annotations

CRITERIA = ("threshold", "mass", "ratio")
