"""The module that drad.compile returns."""

from __future__ import annotations

from typing import Any

from torch._dynamo.eval_frame import OptimizedModule

from .noting import with_notes
from .runtime.beside import CallNotes, PinnedState


class CompiledModel(OptimizedModule):
    """A model of `compile`: PyTorch's wrapper, with our own around its forward. Copied and pickled like any module."""

    _dynamicrad_notes: CallNotes | PinnedState | None = None

    def __init__(self, model: Any, context: Any, notes: CallNotes | PinnedState | None) -> None:
        object.__setattr__(self, "_dynamicrad_notes", notes)
        super().__init__(model, context)

    def _initialize(self) -> None:
        super()._initialize()
        self.forward: Any = with_notes(self.forward, self._orig_mod.forward, self._dynamicrad_notes)

    def __reduce__(self) -> Any:
        return type(self), (self._orig_mod, self.dynamo_ctx, self._dynamicrad_notes)
