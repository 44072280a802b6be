"""Pages that are written from the source are what the source says now, and leave nothing out."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import docstrings
import generate
import how_picture
import options_page
import pytest
import reasons_page
import torch
from reason_texts import reasons

import dynamicrad_compile as drad
from dynamicrad_compile.options import Options
from dynamicrad_compile.passes import PASSES

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


@pytest.mark.parametrize("path", generate.PAGES, ids=lambda path: path.name)
def test_current(path):
    if path.name == "one_attention.md" and not torch.__version__.startswith("2.13."):
        pytest.skip("Dynamo of another version may give nodes other names")
    assert path.read_text(encoding="utf-8") == generate.PAGES[path](), "run python docs/scripts/generate.py"


def test_every_option():
    named = [name for names in options_page.GROUPS.values() for name in names]
    public = {name for name, field in Options.model_fields.items() if not field.exclude}
    assert sorted(named) == sorted(public)
    assert public <= set(options_page.docstrings(Options))
    assert set(options_page.SEE) <= public


def test_every_reason_says_something():
    for said in reasons():
        assert said.code in reasons_page.ERRORS or any(re.search(r"[a-z]{3}", text) for text in said.texts), said
        assert re.search(r"[a-z]{3}", said.advice[0]), said
    assert set(reasons_page.SEE) | set(reasons_page.ERRORS) <= {said.code for said in reasons()}


@pytest.fixture(scope="module")
def strings():
    """All text in the source of the package, run together."""
    rooms = [ROOT / room for room in ("dynamicrad_compile", "passes", "kernels", "profiles")]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for room in rooms for path in sorted(room.rglob("*.py"))]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    return "\n".join(node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str))


@pytest.mark.parametrize("text", [text for text, _ in reasons_page.NOTES])
def test_notes_are_in_the_source(strings, text):
    values = r"'(?:auto|high|int8_dense)'|: no .*|: the router .*|attention calls"  # put in by the code
    pieces = [piece.strip(" .:),(") for piece in re.split(f"…|{values}", text)]
    assert all(piece in strings for piece in pieces), pieces


def test_every_public_name():
    names = re.findall(r"^::: dynamicrad_compile\.(\w+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(names) == sorted(drad.__all__)


def test_every_pass():
    names = [step.__name__ for step in PASSES]
    text = (DOCS / "how.md").read_text(encoding="utf-8")
    assert re.findall(r"^- `([a-z_]+)`: ", text, flags=re.MULTILINE) == names
    assert [name for name, _ in how_picture.PASSES] == names


def test_columns_become_lists():
    text = "What it is.\n\nweight   of each\n         block\nname     [a][b]\nNothing more.\n\n    kept  as it is"
    wanted = "What it is.\n\n\n- `weight`: of each\n  block\n- `name`: [a]\\[b]\n\nNothing more.\n\n    kept  as it is"
    assert docstrings.markdown(text) == wanted
