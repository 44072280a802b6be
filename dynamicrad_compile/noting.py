"""What drad.compile does around each call of a model: a note of its timestep and prompt, kept beside the graphs."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from .runtime.beside import CallNotes, CallState, PinnedState, run_with

# Parameters of a model's forward that condition a call, in diffusers and in the models' own repositories.
TIMESTEP = ("timestep", "timesteps", "t", "sigma", "sigmas")
PROMPT = ("encoder_hidden_states", "prompt_embeds", "context", "text_states", "text", "txt", "y")
MASK = ("encoder_attention_mask", "encoder_hidden_states_mask", "prompt_attention_mask", "text_mask", "y_mask")


def with_notes(function: Any, original: Callable[..., Any], notes: CallNotes | PinnedState | None) -> Any:
    """The compiled function, with timestep and prompt of each call noted before it."""
    conditions = _reader(original)

    @functools.wraps(function)
    def captured(*args: Any, **kwargs: Any) -> Any:
        state = notes.note(*conditions(args, kwargs)) if isinstance(notes, CallNotes) else notes
        with run_with(state or CallState()):
            return function(*args, **kwargs)

    captured.dynamicrad_notes = notes if isinstance(notes, CallNotes) else CallNotes()  # type: ignore[attr-defined]
    return captured


def notes_of(compiled: Any) -> CallNotes:
    """What is noted of the calls of a model or function of drad.compile; nothing, of any other."""
    found = getattr(getattr(compiled, "forward", compiled), "dynamicrad_notes", None)
    return found if isinstance(found, CallNotes) else CallNotes()


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
