"""Process-wide defaults (torch.set_default_dtype, torch.set_default_device) decide nothing of ours."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(
    path
    for room in ("dynamicrad_compile", "kernels", "passes", "profiles")
    for path in (ROOT / room).rglob("*.py")
    if not any(parent.is_symlink() for parent in path.parents)
)
FLOATS = {"zeros", "ones", "empty", "rand", "randn", "linspace", "logspace", "eye"}
VALUES = {"tensor", "full", "scalar_tensor", "empty_strided"}
INTEGERS = {"arange", "randint", "randperm"}


def factories(tree):
    for node in ast.walk(tree):
        function = node.func if isinstance(node, ast.Call) else None
        if not isinstance(function, ast.Attribute) or ast.unparse(function.value) != "torch":
            continue
        if function.attr in FLOATS | VALUES | INTEGERS:
            yield function.attr, node.lineno, {keyword.arg for keyword in node.keywords}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_tensor_names_its_device_and_dtype(path):
    for name, line, given in factories(ast.parse(path.read_text(encoding="utf-8"))):
        assert "device" in given, f"line {line}: torch.{name} without a device"
        assert name in INTEGERS or "dtype" in given, f"line {line}: torch.{name} without a dtype"
