"""Small helpers on FX graphs: example values, hints of symbolic sizes, arguments of an attention call."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import fx


def value_of(node: fx.Node) -> Any:
    """What the node yields: Dynamo's `example_value`, or an exported program's `val`."""
    return node.meta.get("example_value", node.meta.get("val"))


# Stand-ins for sizes that only the data decide, one per unbacked symbol: small, and different from each other.
_STAND_INS = (3, 2, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)


def depends_on_data(size: Any) -> bool:
    """Whether a size is known only when the graph runs (a number of non-zero entries, say)."""
    if not isinstance(size, torch.SymInt) or size.node.has_hint():
        return False
    return bool(size.node.expr.free_symbols)


def hint(size: Any) -> int:
    """A size as an int without adding a guard; a stand-in where it depends on data."""
    if isinstance(size, int):
        return size
    node = size.node
    if node.has_hint():
        return int(node.hint)
    values = {symbol: _symbol_hint(symbol, node.shape_env) for symbol in node.expr.free_symbols}
    return int(node.expr.xreplace(values))


def _symbol_hint(symbol: Any, shape_env: Any) -> int:
    name = str(symbol)
    if name.startswith("u") and name[1:].isdigit():
        return _STAND_INS[int(name[1:]) % len(_STAND_INS)]
    known = getattr(shape_env, "guarding_hint_or_throw", None) or shape_env.size_hint  # the first is its newer name
    return int(known(symbol))


def shape_hint(node: fx.Node) -> tuple[int, ...] | None:
    """Shape of a node's tensor as ints, without guards; None where it yields no tensor."""
    value = value_of(node)
    return tuple(hint(size) for size in value.shape) if isinstance(value, torch.Tensor) else None


def specialise(size: Any) -> int:
    """A size as an int; on a symbolic size this adds a guard, so another value recompiles."""
    return int(size)


def module_path(node: fx.Node) -> str:
    """Dotted path of the module that made the node, '' where the graph doesn't say."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    for noise in ("L['self']", "L['fn']", "L['function_reference']", ".forward.__self__", ".__dict__", "._orig_mod"):
        path = path.replace(noise, "")
    path = re.sub(r"\.forward\.func\.__closure__\[\d+\]\.cell_contents", "", path)  # what a hook has wrapped
    path = path.replace("['_modules']", "").replace("._modules", "")
    for old, new in (("['", "."), ("']", ""), ("[", "."), ("]", "")):
        path = path.replace(old, new)
    return path.strip(".")


def source_line(node: fx.Node) -> str:
    """File and line of the user's code that made the node ("attention.py:113"), '' where the graph doesn't say."""
    frames = [line for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip().startswith("File ")]
    if not frames:
        return ""
    found = re.search(r'File "(.*?)", line (\d+)', frames[-1])
    return f"{found[1].replace(chr(92), '/').rsplit('/', 1)[-1]}:{found[2]}" if found else ""
