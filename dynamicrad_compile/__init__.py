"""DynamicRad-Compile: block-sparse attention for any video diffusion transformer, as a torch.compile backend.

    model = torch.compile(model, backend="dynamicrad")

Importing this package touches no GPU and loads neither diffusers nor an optimizer.
"""

from __future__ import annotations

from .backend import report
from .capture import explain
from .compiling import compile
from .errors import (
    DynamicRadError,
    ExportError,
    GridError,
    OptionsError,
    PlanError,
    ProfileError,
    RouterError,
    StrictError,
)
from .exporting import export, rewrite
from .kernels.merge_states import merge_states
from .options import Options
from .plans.attention import block_sparse_attention
from .plans.make import make_plan
from .plans.plan import BlockPlan
from .profiles import list_profiles, load_profile
from .reporting.report import Report, SiteReport
from .routing.fit import fit_router
from .runtime.router import Router
from .tuning import record_attention, tune

__version__ = "0.1.0"

__all__ = [
    "BlockPlan",
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
    "SiteReport",
    "StrictError",
    "block_sparse_attention",
    "compile",
    "explain",
    "export",
    "fit_router",
    "list_profiles",
    "load_profile",
    "make_plan",
    "merge_states",
    "record_attention",
    "report",
    "rewrite",
    "tune",
]
