"""Each reason to stay dense comes with advice, and the report shows it."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

from dynamicrad_compile import passes
from dynamicrad_compile import policy as planning
from dynamicrad_compile.reporting import advice
from dynamicrad_compile.reporting.advice import NOTHING, UNKNOWN, advice_for
from dynamicrad_compile.reporting.report import GraphReport, Report, SiteReport, TextTokens

FILES = [*sorted(Path(passes.__file__).parent.glob("*.py")), Path(planning.__file__)]
PIECES = ("dim 0 of 0", "regimes of 0", "0 = 0", "0 windows along", "frames are", "height and width are", 'File "')
"""How parts of reasons begin, and other texts."""


def no_reason(node):
    """Whether a text inside this piece of code is an error, a note, a docstring or a table of operators."""
    if isinstance(node, ast.Call):
        return ast.unparse(node.func).endswith(("note", "unmet", "notes.append", "Error"))
    if isinstance(node, ast.FunctionDef):
        return node.name.endswith("message") or node.name == "_table"
    is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return is_docstring or isinstance(node, (ast.Raise, ast.Assert))


def texts(path):
    """English texts of a file that may be reasons, with 0 for what is filled in."""
    tree: ast.AST = ast.parse(path.read_text(encoding="utf-8"))
    if path.name == "planning.py":
        names = ("_stays_dense", "_no_gain")
        tree = ast.Module([node for node in ast.walk(tree) if getattr(node, "name", "") in names], [])
    skipped = {id(inner) for node in ast.walk(tree) if no_reason(node) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr) and id(node) not in skipped:
            skipped.update(map(id, ast.walk(node)))
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "0" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
            yield node.value


REASONS = [
    (path.name, text)
    for path in FILES
    for text in texts(path)
    if re.search("[a-z]+ [a-z]", text) and "|" not in text and not text.startswith(PIECES)
]


@pytest.mark.parametrize(("file", "text"), REASONS, ids=[f"{file}: {text[:40]}" for file, text in REASONS])
def test_every_reason_has_advice(file, text):
    """If this fails for a new reason, give it a line in dynamicrad_compile/reporting/advice.py."""
    roles = {"different tokens": "cross_attention", "in the batch": "spatial_attention"}
    role = next((role for words, role in roles.items() if words in text), "video_self_attention")
    assert advice_for(role, text) != UNKNOWN


def test_no_advice_is_left_over():
    for pattern, _ in advice._BY_REASON:
        assert any(re.search(pattern, text) for _, text in REASONS), pattern


def site(reason, role="video_self_attention", path="blocks.0.attn"):
    return SiteReport(role, not reason, reason, None, TextTokens(0, 0), (1, 2, 240, 24), 240, 0.0, path)


def test_report_shows_advice(tmp_path):
    short = "240 tokens are fewer than min_tokens = 2048: sparse attention would not pay"
    report = Report([GraphReport([
        site(""), site(short), site(short, path="blocks.1.attn"),
        site("queries (240) and keys (7) are different tokens", "cross_attention", "blocks.0.cross"),
        site("something new"),
    ], [], {})])  # fmt: skip
    replaced, low, _, cross, new = report.sites
    assert replaced.advice == ""
    assert "lower `min_tokens`" in low.advice
    assert cross.advice.startswith(NOTHING)
    assert new.advice == UNKNOWN
    assert [s["advice"] for s in json.loads(report.to_json())["sites"]] == [s.advice for s in report.sites]
    text = str(report)
    assert text.count(low.advice) == text.count(cross.advice) == 1
    assert f"blocks.*.attn: {low.advice}" in text
    report.to_html(tmp_path / "report.html")
    assert "what to do" in (tmp_path / "report.html").read_text()
    assert low.advice.split(" to make")[0] in (tmp_path / "report.html").read_text()
