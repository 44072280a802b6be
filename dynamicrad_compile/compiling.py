"""drad.compile: torch.compile, and what one call by name can't give: state beside the graphs."""

from __future__ import annotations

from typing import Any

import torch

from .noting import with_notes
from .options import Options, mode_options
from .plans.own import SharedMask
from .runtime.beside import CallNotes, PinnedState
from .runtime.router import Router


def compile(
    model: Any,
    *,
    fullgraph: bool = False,
    dynamic: bool | None = None,
    mode: str | None = None,
    state: PinnedState | None = None,
    **options: Any,
) -> Any:
    """`torch.compile(model, backend="dynamicrad")`, with clock and regime kept beside the graphs.

    fullgraph, dynamic and mode are torch.compile's, but mode may be an `Options` mode too; all other keywords are
    `Options`, checked at once. Each call's timestep and prompt are noted before it, so that dense steps and the regime
    reach graphs that see neither of them; with `state` they are what the caller pins there instead. Copies of the
    compiled model have a state of their own.

    Returns the compiled model. Raises OptionsError.
    """
    if mode in ("static_ratio", "dynamic_threshold", "auto"):
        options["mode"], mode = mode, None
    parsed = Options.from_mapping(options)
    of_mode = mode_options(mode, parsed.inner)
    if mode is not None and options:  # torch.compile takes a mode or options, not both
        options["inner_options"] = {**of_mode, **parsed.inner_options}
        mode = None
    if isinstance(parsed.plan, torch.Tensor):
        options["plan"] = SharedMask(parsed.plan)
    notes: CallNotes | PinnedState | None = state
    if notes is None and (
        parsed.router or parsed.dense_steps or parsed.dense_timestep is not None or parsed.refresh_steps
    ):
        notes = CallNotes(Router.load(parsed.router) if isinstance(parsed.router, str) else parsed.router)
    if notes is not None:
        options["call_state"] = True
    compiled = torch.compile(
        model, backend="dynamicrad", fullgraph=fullgraph, dynamic=dynamic, mode=mode, options=options or None
    )
    if isinstance(compiled, torch.nn.Module):
        from .compiled_model import CompiledModel  # Dynamo is loaded when something is compiled, not before

        return CompiledModel(compiled._orig_mod, compiled.dynamo_ctx, notes)
    return with_notes(compiled, model, notes)
