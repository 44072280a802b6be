"""DynamicRad-Compile: block-sparse attention for any video diffusion transformer, as a torch.compile backend.

    model = torch.compile(model, backend="dynamicrad")

Importing this package registers its ops, touches no GPU and loads nothing but torch, Triton, NumPy and pydantic.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .capture import explain
from .captured import report
from .compiling import compile
from .errors import (
    DerivativeError,
    DynamicRadError,
    ExportError,
    GridError,
    OptionsError,
    PlanError,
    ProfileError,
    RouterError,
    ShardError,
    StrictError,
)
from .kernels.merge_states import merge_states
from .options import Options
from .plans.attention import block_sparse_attention
from .plans.make import make_plan
from .plans.plan import BlockPlan
from .profiles import list_profiles, load_profile
from .reporting.report import Report, SiteReport
from .runtime.generation import generation
from .runtime.router import Router

if TYPE_CHECKING:
    from .exporting import export, rewrite
    from .parallel.simulation import simulate_ranks
    from .routing.fit import fit_router
    from .sharding import ShardPlan, shard, unshard
    from .tuning import record_attention, tune

__version__ = "0.1.0"

# What few programs use is imported at its first use.
_LAZY = {
    "ShardPlan": "sharding",
    "export": "exporting",
    "fit_router": "routing.fit",
    "record_attention": "tuning",
    "rewrite": "exporting",
    "shard": "sharding",
    "simulate_ranks": "parallel.simulation",
    "tune": "tuning",
    "unshard": "sharding",
}

__all__ = [
    "BlockPlan",
    "DerivativeError",
    "DynamicRadError",
    "ExportError",
    "GridError",
    "Options",
    "OptionsError",
    "PlanError",
    "ProfileError",
    "Report",
    "Router",
    "RouterError",
    "ShardError",
    "ShardPlan",
    "SiteReport",
    "StrictError",
    "block_sparse_attention",
    "compile",
    "explain",
    "export",
    "fit_router",
    "generation",
    "list_profiles",
    "load_profile",
    "make_plan",
    "merge_states",
    "record_attention",
    "report",
    "rewrite",
    "shard",
    "simulate_ranks",
    "tune",
    "unshard",
]


def __getattr__(name: str) -> Any:
    """Import what is not imported yet; see `_LAZY`."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
