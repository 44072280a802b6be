"""Each reason to stay dense has a code of its own and advice, and the report shows it."""

from __future__ import annotations

import ast
import json
from collections import Counter
from pathlib import Path

from dynamicrad_compile import passes, policy
from dynamicrad_compile.reporting.reason import NOTHING, Reason
from dynamicrad_compile.reporting.report import GraphReport, Report, SiteReport, TextTokens

FILES = [*sorted(Path(passes.__file__).parent.rglob("*.py")), *sorted(Path(policy.__file__).parent.glob("*.py"))]


def codes(path):
    """Codes of the reasons that a file makes."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Reason":
            yield ast.literal_eval(node.args[0])


def test_each_code_is_made_in_one_place():
    made = Counter(code for path in FILES for code in codes(path))
    assert max(made.values()) == 1


SHORT = Reason("few_tokens", "240 tokens are fewer than min_tokens = 2048", "lower `min_tokens`")
CROSS = Reason("other_tokens", "queries (240) and keys (7) are different tokens", f"{NOTHING}: a prompt")


def site(reason=None, role="video_self_attention", path="blocks.0.attn"):
    text, code, advice = (reason.text, reason.code, reason.advice) if reason else ("", "", "")
    return SiteReport(
        role, not reason, text, None, TextTokens(0, 0), (1, 2, 240, 24), 240, 0.0, path, code=code, advice=advice
    )


def test_report_shows_code_and_advice(tmp_path):
    low, cross = site(SHORT), site(CROSS, "cross_attention", "blocks.0.cross")
    report = Report([GraphReport([site(), low, site(SHORT, path="blocks.1.attn"), cross], [], {})])
    shown = [(found["code"], found["advice"]) for found in json.loads(report.to_json())["sites"]]
    assert shown == [("", ""), *[(SHORT.code, SHORT.advice)] * 2, (CROSS.code, CROSS.advice)]
    text = str(report)
    assert text.count(low.advice) == text.count(cross.advice) == 1
    assert f"blocks.*.attn: {low.advice}" in text
    report.to_html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert all(piece in page for piece in ("what to do", low.advice, low.code, cross.code))
