"""The site builds without a warning, needs nothing from other hosts, and its sources stay within 120 columns."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="comes with the extra docs")
ROOT = Path(__file__).parents[2]
SOURCES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]
LOADED = re.compile(r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=\"?(https?:|//)[^>]*")


def build(folder, source=ROOT):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = build(folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_page_is_there(site):
    assert {page.stem for page in (ROOT / "docs").glob("*.md")} <= {page.stem for page in site.glob("*.html")}
    for linked in ("CONTRIBUTING", "CHANGELOG", "benchmarks/NOTES"):
        assert (site / "repository" / linked).with_suffix(".html").exists()
    assert "block_sparse_attention" in (site / "api.html").read_text(encoding="utf-8")


def test_nothing_is_loaded_from_other_hosts(site):
    for page in site.rglob("*.html"):
        assert not LOADED.findall(page.read_text(encoding="utf-8")), page


def test_wrong_links_are_errors(tmp_path):
    """In a copy in which one page is another; all else that the build reads is linked to."""
    for file in ROOT.iterdir():
        if file.name not in ("docs", "mkdocs.yml", "outputs") and not file.name.startswith(".git"):
            (tmp_path / file.name).symlink_to(file)
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    (tmp_path / "docs").mkdir()
    for file in (ROOT / "docs").iterdir():
        (tmp_path / "docs" / file.name).symlink_to(file)
    wrong = ("nowhere.md", "../nowhere.md", "motion.md#nowhere")
    (tmp_path / "docs" / "api.md").unlink()
    text = "# API\n\n" + "\n".join(f"[a link]({link})" for link in wrong)
    (tmp_path / "docs" / "api.md").write_text(text, encoding="utf-8")
    done = build(tmp_path / "site", tmp_path)
    assert done.returncode
    assert len(re.findall(r"'(?:repository/)?(?:motion.md#)?nowhere", done.stdout + done.stderr)) == len(wrong)


@pytest.mark.parametrize("page", SOURCES, ids=lambda page: page.name)
def test_columns(page):
    lines = page.read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if len(line) > 120]
