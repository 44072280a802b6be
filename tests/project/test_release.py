"""What goes with a release: one version everywhere, a changelog, a citation, forms for issues."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import dynamicrad_compile as drad

ROOT = Path(__file__).parents[2]
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def read(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_one_version():
    citation = read(ROOT / "CITATION.cff")
    assert re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1] == drad.__version__
    assert citation["version"] == drad.__version__
    assert f"\n## [{drad.__version__}] - {citation['date-released']}\n" in CHANGELOG


def test_changelog_is_short():
    """Unreleased changes first; of a release twelve bullets, each a line or two of what a user gets."""
    sections = re.split(r"^## ", CHANGELOG, flags=re.MULTILINE)[1:]
    assert sections[0].startswith("[Unreleased]\n")
    for section in sections[1:]:
        assert len(re.findall(r"^- ", section, re.MULTILINE)) <= 12
    assert max(map(len, CHANGELOG.splitlines())) <= 120


def test_cited_papers_are_named_in_the_docs():
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))]
    cited = [one["identifiers"][0]["value"] for one in read(ROOT / "CITATION.cff")["references"]]
    assert len(cited) == 4
    for paper in cited:
        assert any(paper in text for text in texts), paper


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.stem)
def test_forms(form):
    """GitHub shows no form that lacks a name, a description, or a label of a field; ids are unique."""
    values = read(form)
    if form.stem == "config":
        assert set(values) == {"blank_issues_enabled"}
        return
    assert {"name", "description", "body"} <= set(values)
    fields = [field for field in values["body"] if field["type"] != "markdown"]
    assert all(field["attributes"]["label"] for field in fields)
    assert {field["type"] for field in fields} <= {"textarea", "input", "dropdown", "checkboxes"}
    ids = [field["id"] for field in fields]
    assert len(set(ids)) == len(ids)


def test_forms_ask_for_what_tells_most():
    asked = {form.stem: form.read_text(encoding="utf-8") for form in FORMS}
    assert "`dynamicrad doctor`" in asked["bug"]
    assert "drad.report(" in asked["bug"]
    assert "`dynamicrad explain`" in asked["stays_dense"]
