"""Errors that a user can act on. Every message says what was wrong, what was expected, how to mend it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DynamicRadError(Exception):
    """Base of all errors raised on purpose by this package."""


class OptionsError(DynamicRadError, ValueError):
    """An option has an unknown name or a value out of its range."""


class ProfileError(DynamicRadError, ValueError):
    """A profile file is missing, malformed, or holds a value out of its range."""


class PlanError(DynamicRadError, ValueError):
    """A block plan can't be built, or does not fit the tensors it is used with."""


class DerivativeError(DynamicRadError, NotImplementedError):
    """A derivative is asked for that the block-sparse ops do not have: forward mode, or a second one."""


class GridError(DynamicRadError, ValueError):
    """The token grid given by the user does not fit the sequence length of the graph, or is not the one it shows."""


class CrossoverError(DynamicRadError, ValueError):
    """The table of expected speed-ups can't be read, or holds a value out of its range."""


class RouterError(DynamicRadError, ValueError):
    """Prompts, an encoder or a router file that the motion router can't be fitted to or read from."""


class ExportError(DynamicRadError, RuntimeError):
    """A model can't be exported: the format, a mode or a setting is not possible, or a package is missing."""


class LoraError(DynamicRadError, ValueError):
    """Settings, clips, a model or a checkpoint that a LoRA can't be trained with."""


class ShardError(DynamicRadError, ValueError):
    """A model can't be sharded over processes: no plan for its class, a mesh, heads or lengths that do not fit."""


class StrictError(DynamicRadError, RuntimeError):
    """`strict=True` and a video self-attention had to stay dense."""


def nearest(name: str, known: Iterable[str]) -> str:
    """' Did you mean ...?' for the known name nearest to `name`, else an empty string."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {match[0]!r}?" if match else ""
