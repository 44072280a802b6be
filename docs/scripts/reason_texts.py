"""What the code says where it makes a `Reason(code, text, advice)`, read from the source without running it."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import dynamicrad_compile.passes as passes
import dynamicrad_compile.policy as policy

OPEN = "…"
"""Stands for what only a run knows: sizes, names, errors of others."""


class Said(NamedTuple):
    """A reason as the source has it: its code, the texts it may have, the advice it may give, and where it is made."""

    code: str
    texts: tuple[str, ...]
    advice: tuple[str, ...]
    module: str


def reasons() -> list[Said]:
    """Every reason of the passes and of the policy, in the order of the source."""
    found = []
    for room in (passes, policy):
        folder = Path(room.__path__[0])
        for path in sorted(folder.rglob("*.py")):
            name = ".".join((room.__name__, *path.relative_to(folder).with_suffix("").parts))
            found += list(_of_file(path, importlib.import_module(name.removesuffix(".__init__"))))
    return found


def _of_file(path: Path, module: ModuleType) -> Iterator[Said]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Reason":
            around = [f for f in functions if f.lineno <= node.lineno <= (f.end_lineno or 0)]
            reader = _Reader(module, tree, around[-1] if around else None, node.lineno)
            code, text, advice = node.args
            yield Said(ast.literal_eval(code), reader.read(text), reader.read(advice), module.__name__)


class _Reader:
    """Turns an expression of the source into the texts that it may be."""

    def __init__(self, module: ModuleType, tree: ast.Module, function: ast.FunctionDef | None, line: int):
        self.module, self.tree, self.function, self.line = module, tree, function, line

    def read(self, node: ast.expr) -> tuple[str, ...]:
        """All texts, each once, in the order of the source."""
        return tuple(dict.fromkeys(self._texts(node)))

    def _texts(self, node: ast.expr) -> list[str]:
        if isinstance(node, ast.Constant):
            return [node.value if isinstance(node.value, str) else OPEN]
        if isinstance(node, ast.JoinedStr):
            return self._joined(node.values)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return self._joined([node.left, node.right])
        if isinstance(node, ast.FormattedValue):
            return self._texts(node.value)
        if isinstance(node, ast.IfExp):
            return [*self._texts(node.body), *self._texts(node.orelse)]
        if isinstance(node, ast.Name):
            return self._named(node.id)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            return self._returned(node.func.id)
        return [OPEN]

    def _joined(self, parts: list[ast.expr]) -> list[str]:
        whole = [""]
        for part in parts:
            whole = [before + text for before in whole for text in self._texts(part)]
        return whole

    def _named(self, name: str) -> list[str]:
        """What the last statement before the call gives a name, or what it is in the module."""
        found = _last(self.function.body, name, self.line) if self.function else []
        if found:
            return [text for value in found for text in self._texts(value)]
        value = getattr(self.module, name, OPEN)
        return [str(value) if isinstance(value, (str, int)) else OPEN]

    def _returned(self, name: str) -> list[str]:
        """What a function of the same file may return, where that is text."""
        for node in self.tree.body:
            if isinstance(node, ast.FunctionDef) and node.name == name:
                reader = _Reader(self.module, self.tree, node, node.end_lineno or 0)
                values = [part.value for part in ast.walk(node) if isinstance(part, ast.Return) and part.value]
                return [text for value in values for text in reader.read(value)]
        return [OPEN]


def _last(block: list[ast.stmt], name: str, line: int) -> list[ast.expr]:
    """The values of a name by the last statement before a line that assigns it, the innermost block first."""
    inner = [node for node in block if node.lineno <= line <= (node.end_lineno or 0)]
    for node in inner:
        for field in ("body", "orelse", "handlers", "finalbody"):
            for deeper in getattr(node, field, []):
                if deeper.lineno <= line <= (deeper.end_lineno or 0):
                    found = _last(getattr(node, field) if field != "handlers" else deeper.body, name, line)
                    if found:
                        return found
                    break
    values: list[ast.expr] = []
    for node in reversed([node for node in block if (node.end_lineno or 0) < line]):
        if isinstance(node, ast.If) and isinstance(node.body[-1], (ast.Return, ast.Raise)):
            continue
        assigned = [part for part in ast.walk(node) if isinstance(part, ast.Assign)]
        values = [value for part in assigned for target, value in _pairs(part) if target == name] + values
        if values and not (isinstance(node, ast.If) and not node.orelse):
            break
    return values


def _pairs(node: ast.Assign) -> Iterator[tuple[str, ast.expr]]:
    for target in node.targets:
        if isinstance(target, ast.Name):
            yield target.id, node.value
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            yield from ((ast.unparse(one), value) for one, value in zip(target.elts, node.value.elts, strict=True))
