"""drad.compile: torch.compile, and what one call by name can't give: capture settings, and state beside the graphs."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from .options import Options
from .runtime.router import Router
from .runtime.state import RunState

CAPTURE = {"capture_scalar_outputs": True, "capture_dynamic_output_shape_ops": True}
"""Dynamo settings under which sizes that depend on data do not break the graph (Mochi, HunyuanVideo 1.5, FramePack)."""

# Parameters of a model's forward that condition a call, in diffusers and in the models' own repositories.
TIMESTEP = ("timestep", "timesteps", "t", "sigma", "sigmas")
PROMPT = ("encoder_hidden_states", "prompt_embeds", "context", "text_states", "text", "txt", "y")
MASK = ("encoder_attention_mask", "encoder_hidden_states_mask", "prompt_attention_mask", "text_mask", "y_mask")


def compile(
    model: Any, *, fullgraph: bool = False, dynamic: bool | None = None, mode: str | None = None, **options: Any
) -> Any:
    """`torch.compile(model, backend="dynamicrad")` with the capture settings that some video models need.

    fullgraph, dynamic and mode are torch.compile's, but mode may be an `Options` mode too; all other keywords are
    `Options`, checked at once. While the compiled model runs, and for no other, Dynamo captures operations whose output
    size depends on data, so that attention over a prompt cut to its valid tokens stays in the graph. Each call's
    timestep and prompt are noted before it, so that dense steps and the regime reach graphs that see neither of them.

    Returns the compiled model. Raises OptionsError.
    """
    if mode in ("static_ratio", "dynamic_threshold", "auto"):
        options["mode"], mode = mode, None
    parsed = Options.from_mapping(options)
    if mode is not None and options and parsed.inner == "inductor":  # torch.compile takes a mode or options, not both
        options["inner_options"] = {**torch._inductor.list_mode_options(mode), **parsed.inner_options}
        mode = None
    stateful = bool(parsed.router or parsed.dense_steps or parsed.dense_timestep is not None or parsed.refresh_steps)
    state = parsed.state
    if stateful and state is None:
        state = RunState(Router.load(parsed.router) if isinstance(parsed.router, str) else parsed.router)
        options["state"] = state
    compiled = torch.compile(
        model, backend="dynamicrad", fullgraph=fullgraph, dynamic=dynamic, mode=mode, options=options or None
    )
    if isinstance(compiled, torch.nn.Module):
        compiled.forward = _with_capture(compiled.forward, model.forward, state)
        return compiled
    return _with_capture(compiled, model, state)


def _with_capture(function: Any, original: Callable[..., Any], state: RunState | None) -> Any:
    conditions = _reader(original) if state is not None else None

    @functools.wraps(function)
    def captured(*args: Any, **kwargs: Any) -> Any:
        if state is not None and conditions is not None:
            state.note_call(*conditions(args, kwargs))
        with torch._dynamo.config.patch(CAPTURE):
            return function(*args, **kwargs)

    captured.dynamicrad_capture = True  # type: ignore[attr-defined]
    return captured


def _reader(function: Callable[..., Any]) -> Callable[[Any, Any], tuple[torch.Tensor | None, ...]]:
    """A function from a call's arguments to its timestep, prompt and mask."""
    signature = inspect.signature(function)

    def read(args: Any, kwargs: Any) -> tuple[torch.Tensor | None, ...]:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:  # the model itself will say what is wrong
            return None, None, None
        for parameter in signature.parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                given = {**given, **given.get(parameter.name, {})}
        prompt = _tensor(given, PROMPT, (3,))
        mask = _tensor(given, MASK, (2,))
        if prompt is None or mask is None or mask.shape != prompt.shape[:2]:
            mask = None
        return _tensor(given, TIMESTEP, range(6)), prompt, mask

    return read


def _tensor(given: Mapping[str, Any], names: Iterable[str], ranks: Iterable[int]) -> torch.Tensor | None:
    found = (given.get(name) for name in names)
    return next((value for value in found if isinstance(value, torch.Tensor) and value.dim() in ranks), None)


def captures_data_dependent(compiled: Any) -> bool:
    """Whether something was compiled by `drad.compile`."""
    return hasattr(getattr(compiled, "forward", compiled), "dynamicrad_capture")
