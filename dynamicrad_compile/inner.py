"""The inner compiler: what a rewritten graph is handed to."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from .kernels.tiles import CHOICE
from .options import INNER, Options, mode_options

Compiled = Callable[..., Any]


_NOTES = "aot_inductor.metadata"
_CACHEABLE = "unsafe_marked_cacheable_functions"


def _key() -> str:
    """What PyTorch's compile caches know us by: what they keep was made by our code and by the kernels' variant."""
    return " ".join([_sources(), *filter(None, [os.environ.get(CHOICE)])])


@functools.cache
def _sources() -> str:
    """A digest of our own code and tables."""
    digest = hashlib.sha256()
    root = Path(__file__).parent
    rooms = [root, *(root / name for name in ("kernels", "passes", "profiles"))]  # links in a checkout: no walk enters
    for path in sorted({path for room in rooms for path in room.rglob("*") if path.suffix in (".py", ".toml")}):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _cacheable(gm: fx.GraphModule) -> dict[str, str]:
    """Our functions in a graph, for PyTorch's cache of traced graphs, which takes no unknown function without a key."""
    targets = [node.target for node in gm.graph.nodes if node.op == "call_function"]
    ours = [f for f in targets if getattr(f, "__module__", "").startswith(__package__)]
    return {f"{f.__module__}.{f.__name__}": _key() for f in ours}


def inner_compiler(
    options: Options, mode: str | None, note: Callable[[str], None]
) -> Callable[[fx.GraphModule, Sequence[Any]], Compiled]:
    """The compiler of rewritten graphs that option `inner` names; mode is torch.compile's, note adds to the report.

    Raises OptionsError.
    """
    of_mode = mode_options(mode, options.inner)
    if options.inner == "inductor":
        from torch._inductor.compile_fx import compile_fx

        patches = {**of_mode, **options.inner_options}
        patches[_NOTES] = {**patches.get(_NOTES, {}), "dynamicrad": _key()}

        def with_inductor(gm: fx.GraphModule, inputs: Sequence[Any]) -> Compiled:
            known = {**torch._inductor.config.unsafe_marked_cacheable_functions, **patches.get(_CACHEABLE, {})}
            return compile_fx(gm, inputs, config_patches={**patches, _CACHEABLE: {**known, **_cacheable(gm)}})

        return with_inductor
    for ours in importlib.metadata.entry_points(group=INNER, name=options.inner):
        compile_graph = ours.load()
        return lambda gm, inputs: compile_graph(gm, inputs, options.inner_options, note)
    from torch._dynamo.backends.registry import lookup_backend

    backend = lookup_backend(options.inner)
    return lambda gm, inputs: backend(gm, inputs, **options.inner_options)
