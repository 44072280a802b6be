"""What can be told of a training before it begins. Every function raises LoraError."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from ..beforehand import output_file
from ..errors import LoraError, nearest
from ..noting import PROMPT
from ..optional import optional
from .checkpoint import CURVE_FILE, JOURNAL_FILE, STATE_FILE
from .data import Clips
from .settings import Settings


def check_place(settings: Settings, resume: bool) -> None:
    """The libraries are there, and `output` can be written to, and holds a training if one is to go on, else none."""
    for library in ("accelerate", "tqdm", "peft", "safetensors", "matplotlib"):
        optional(library, "training needs", "lora", LoraError)
    output = Path(settings.output)
    for name in (JOURNAL_FILE, CURVE_FILE, STATE_FILE, "adapter/weights"):
        output_file(output / name, LoraError)
    there = (output / STATE_FILE).exists()
    if there and not resume:
        raise LoraError(f"{output} holds a training already. Go on with it (resume), or give another output.")
    if resume and not there:
        raise LoraError(f"there is no training to go on with: {output / STATE_FILE} is missing.")


def check_training(model: Any, clips: Clips, settings: Settings) -> None:
    """The adapter's targets are layers of the model, and the first clip is what model and [regimes] need."""
    if not len(clips):
        raise LoraError("there is no clip to train on.")
    names = [name for name, _ in model.named_modules()]
    for target in settings.adapter.targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            parts = {name[name.find(first) :] for name in names for first in name.split(".") if not first.isdigit()}
            raise LoraError(
                f"adapter.targets = {settings.adapter.targets}: {type(model).__name__} has no layer {target!r}."
                f"{nearest(target, parts)}"
            )
    first, source = clips[0], settings.regimes.source
    if source == "label" and first.regime is None:
        raise LoraError("regimes.source = 'label', and the first clip has no regime. Label it, or use 'router'.")
    if source == "router" and not set(PROMPT) & set(first.conditions):
        raise LoraError(f"regimes.source = 'router', and no condition is called one of {PROMPT}.")
    given = dict.fromkeys(("timestep", *first.conditions, "return_dict"))
    try:
        inspect.signature(model.forward).bind(None, **given)
    except TypeError as error:
        raise LoraError(
            f"{type(model).__name__} can't be called with the clip's conditions {list(first.conditions)}: {error}."
        ) from None
