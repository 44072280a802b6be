"""What is evaluated: a model and a function that makes videos with it."""

from __future__ import annotations

import importlib
import inspect
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..captured import report
from ..errors import DynamicRadError
from ..kernels.blocks import cdiv

Generate = Callable[[Any, Sequence[str], Sequence[int]], Tensor]
Source = tuple[str, dict[str, Any]]


@dataclass
class Subject:
    """A model that makes videos.

    name      for tables and files
    model     the transformer, uncompiled; `generate` gets it, or a compiled one, as its first argument
    generate  (model, prompts, seeds) -> clips, float [N, F, C, H, W] in 0..1; the same seed starts from the same noise
    grid      (frames, height, width) of its video tokens after patchifying
    prompts   what to ask for where nothing else is said
    real      so many held-out real clips, float [N, F, C, H, W] in 0..1; None = there are none
    text      text tokens before and after the video in its self-attention
    source    ("package.module:function", its arguments), by which `load_subject` gives this subject in another process;
              None = it has to stay in this one
    """

    name: str
    model: torch.nn.Module
    generate: Generate
    grid: tuple[int, int, int]
    prompts: Sequence[str]
    real: Callable[[int], Tensor] | None = None
    text: tuple[int, int] = (0, 0)
    source: Source | None = None

    @property
    def tokens(self) -> int:
        """Tokens of a video self-attention, text included."""
        return math.prod(self.grid) + sum(self.text)

    def blocks(self, block_size: int) -> int:
        """Blocks of a video self-attention."""
        return cdiv(self.tokens, block_size)


def from_pipeline(pipe: Any, prompts: Sequence[str], **call: Any) -> Subject:
    """The subject of a diffusers pipeline; `call` is given to it (num_frames, height, num_inference_steps, ...).

    The grid is traced: the pipeline runs one step for it. Raises DynamicRadError if it can't be told.
    """
    model = pipe.transformer
    device = next(model.parameters()).device

    def generate(used: Any, prompts: Sequence[str], seeds: Sequence[int], **extra: Any) -> Tensor:
        pipe.transformer = used
        generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        try:
            clips = pipe(list(prompts), generator=generators, output_type="pt", **{**call, **extra}).frames
        finally:
            pipe.transformer = model
        return torch.as_tensor(clips, dtype=torch.float32).cpu()

    compiled = torch.compile(model, backend="dynamicrad", options={"pattern": "dense", "inner": "eager"})
    generate(compiled, prompts[:1], [0], num_inference_steps=1)
    found = {(site.grid, tuple(site.text_tokens)) for site in report(compiled).sites if site.grid}
    if len(found) != 1:
        raise DynamicRadError(f"expected one token grid in {type(model).__name__}, found {found or 'none'}.")
    grid, text = found.pop()
    if grid is None or len(text) != 2 or None in text:
        raise DynamicRadError(f"the text length of {type(model).__name__} depends on data; it can't be evaluated.")
    return Subject(type(pipe).__name__, model, generate, grid, list(prompts), None, (text[0] or 0, text[1] or 0))


def load_subject(where: str, **arguments: Any) -> Subject:
    """The subject that `where`, "package.module:function", returns when it is called with the arguments; its source.

    The current folder is searched too. Raises DynamicRadError if there is no such function or it gives something else.
    """
    name, _, function = where.partition(":")
    if not name or not function:
        raise DynamicRadError(f"a subject is given as package.module:function, got {where!r}.")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        made = getattr(importlib.import_module(name), function)
    except (ImportError, AttributeError) as error:
        raise DynamicRadError(f"no subject at {where!r}: {error}. Run it from the folder that holds it.") from None
    try:
        inspect.signature(made).bind(**arguments)
    except TypeError as error:
        raise DynamicRadError(f"{where} can't be given {', '.join(arguments)}: {error}.") from None
    subject = made(**arguments)
    if not isinstance(subject, Subject):
        raise DynamicRadError(f"{where} must return a quality.Subject, got {type(subject).__name__}.")
    return replace(subject, source=(where, arguments))
