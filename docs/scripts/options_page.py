"""docs/options.md: name, values, default and meaning of every option, from the fields of `Options`."""

from __future__ import annotations

import ast
import inspect
import textwrap
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from dynamicrad_compile.options import Options

PAGE = Path(__file__).parents[1] / "options.md"

HEAD = """# Options

<!-- written by docs/scripts/generate.py from dynamicrad_compile/options.py; change that, not this -->

Two options are enough for most models: `sparsity`, and `dense_steps` where clips differ too much from the dense ones.

```python
import torch
import dynamicrad_compile as drad

model = torch.nn.Linear(4, 4)  # yours
compiled = torch.compile(model, backend="dynamicrad", options={"sparsity": 0.8, "dense_steps": 4})
drad.Options(sparsity=0.8, dense_steps=4)  # checks them at once
```

`drad.compile(model, sparsity=0.8)`, `drad.explain(model, ..., options={...})` and `drad.Options(...)` check options at
once; PyTorch shows them to a backend at the first call of the model only. An unknown name is an error that suggests the
nearest one. On the command line it is `--set sparsity=0.8`. A default of `None` leaves the choice to the profile, or to
what the meaning says.
"""

GROUPS = {
    "Which blocks": (
        *("sparsity", "pattern", "plan", "mode", "profile", "rank", "compensate", "covariance"),
        *("box", "block_size", "decay_factor", "sink_frames"),
    ),
    "Motion": ("regime", "router"),
    "Steps of a run": ("dense_steps", "dense_timestep", "refresh_steps", "steps", "schedule_by"),
    "Where attention stays dense": ("min_tokens", "dense_layers", "strict"),
    "What the tokens are": ("grid", "override_grid"),
    "Of one pattern": (
        *("search_steps", "recall_threshold", "reference_frames", "window", "n_first", "sparsity_scale", "rule"),
    ),
    "Compiling": ("inner", "inner_options", "qk_dtype", "dump"),
}
"""Titles, and the options that stand there."""

SEE = {
    "sparsity": "motion.md#schedules",
    "plan": "own_mask.md",
    "mode": "motion.md",
    "regime": "motion.md#regimes",
    "router": "router.md",
    "compensate": "motion.md#compensation",
    "box": "plans.md",
    "search_steps": "motion.md#pattern-adaspa-an-exact-search",
    "dense_steps": "motion.md#dense-steps",
    "min_tokens": "benchmarks.md#the-crossover",
    "grid": "breaks.md",
    "inner": "tensorrt.md",
    "dump": "dump.md",
}
"""Where more is said of an option."""


def page() -> str:
    """The page for the fields that `Options` has."""
    meanings = docstrings(Options)
    parts = [HEAD]
    for title, names in GROUPS.items():
        parts += [f"## {title}\n", *(_entry(name, meanings[name]) for name in names)]
    return "\n".join(parts).rstrip("\n") + "\n"


def docstrings(model: type) -> dict[str, str]:
    """The strings behind the fields of a class, in one line each."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(model))).body
    assert isinstance(node, ast.ClassDef)
    found = {}
    for field, text in zip(node.body, node.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            found[ast.unparse(field.target)] = " ".join(str(text.value.value).split())
    return found


def _entry(name: str, meaning: str) -> str:
    field = Options.model_fields[name]
    see = f" See [{SEE[name].partition('.')[0].replace('_', ' ')}]({SEE[name]})." if name in SEE else ""
    lines = textwrap.wrap(meaning + see, 120, break_long_words=False, break_on_hyphens=False)
    default = repr(field.get_default(call_default_factory=True)).replace("'", '"')
    return "\n".join((f"### {name}\n", f"{values(field)}; default `{default}`\n", *lines, ""))


def values(field: FieldInfo) -> str:
    """What a field may be, in words."""
    found = dict.fromkeys(_values(field.annotation, field.metadata))
    return ", ".join(found)


def _values(kind: Any, metadata: list[Any]) -> list[str]:
    if kind is type(None):
        return []
    if get_origin(kind) is Annotated:
        return _values(kind.__origin__, list(kind.__metadata__))
    if get_origin(kind) in (Union, UnionType):
        return [text for part in get_args(kind) for text in _values(part, metadata)]
    if get_origin(kind) is Literal:
        return [f"`{value!r}`".replace("'", '"') for value in get_args(kind)]
    return [NAMES[kind] + _range(metadata)]


NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "`True` or `False`",
    str: "a name",
    Path: "a path",
    Any: "an object",
    dict[str, Any]: "a dict",
    tuple[int, int, int]: "three whole numbers",
    tuple[int, ...]: "whole numbers",
    tuple[tuple[float, float], ...]: "pairs of numbers",
}


def _range(metadata: list[Any]) -> str:
    bounds = metadata[0].metadata if metadata and isinstance(metadata[0], FieldInfo) else metadata
    least = next((bound.ge for bound in bounds if hasattr(bound, "ge")), None)
    most = next((bound.le for bound in bounds if hasattr(bound, "le")), None)
    if least is None:
        return ""
    return f" from {least:g}" + (f" to {most:g}" if most is not None else "")
