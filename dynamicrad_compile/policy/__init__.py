"""From options and profile to decisions: which plan each video self-attention of a graph gets, or why it stays dense.

    decide(sites, conditions, wishes) -> Decisions

Pure: no graph is read or changed here. What the options name (a profile, a router) is loaded by `Wishes.of`.
"""

from __future__ import annotations

from .decisions import decide
from .gain import expected_sparsity
from .planning import CANDIDATE_FACTOR
from .settings import Wishes

__all__ = ["CANDIDATE_FACTOR", "Wishes", "decide", "expected_sparsity"]
