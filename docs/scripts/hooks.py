"""What mkdocs does beside its own work: files outside of docs/ that a page links to are on the site, too.

A link such as `../benchmarks/NOTES.md` works in the repository. On the site that file is a page of its own,
`repository/benchmarks/NOTES.md`, and links in it are followed as well. Docstrings are read from a copy of the package
in which linked folders are where they are installed, since mkdocstrings skips folders without an `__init__.py`.
"""

from __future__ import annotations

import importlib.util
import posixpath
import re
import tempfile
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
FOLDER = "repository/"
"""Where files from outside of docs/ are on the site."""

ALWAYS = ("CONTRIBUTING.md", "CHANGELOG.md")
"""What is in the navigation, linked to or not."""

LINK = re.compile(r"(?<=\]\()[^)#\s:]+(?=[)#])")
CODE = re.compile(r"(^```.*?^```|`[^`\n]+`)", re.DOTALL | re.MULTILINE)


_copy = tempfile.TemporaryDirectory()
"""Holds the copy of the package until the program ends."""


@event_priority(100)  # before the plugin reads its own
def on_config(config: MkDocsConfig) -> None:
    """Have mkdocstrings read the copy."""
    spec = importlib.util.spec_from_file_location("arrows", ROOT / ".ci" / "arrows.py")
    arrows = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(arrows)
    arrows.copy_package(Path(_copy.name))
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [_copy.name]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files outside of docs/ that pages link to, and those that these link to."""
    waiting = [*ALWAYS, *(_place(file.src_uri) for file in files.documentation_pages())]
    seen = set(waiting)
    while waiting:
        here = waiting.pop()
        if not here.startswith("docs/"):
            inclusion = InclusionLevel.INCLUDED if here in ALWAYS else InclusionLevel.NOT_IN_NAV
            files.append(File.generated(config, FOLDER + here, abs_src_path=str(ROOT / here), inclusion=inclusion))
        if here.endswith(".md"):
            text = CODE.sub("", (ROOT / here).read_text(encoding="utf-8"))
            linked = {_target(here, link) for link in LINK.findall(text)} - seen
            new = {there for there in linked if not there.startswith("docs/") and (ROOT / there).is_file()}
            seen |= new
            waiting += sorted(new)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links at where their files are on the site."""
    uri = page.file.src_uri
    if uri.startswith(FOLDER) and _place(uri) not in ALWAYS:
        page.meta["search"] = {"exclude": True}  # records: found by the pages that link to them

    def moved(link: re.Match[str]) -> str:
        there = _target(_place(uri), link.group())
        there = there.removeprefix("docs/") if there.startswith("docs/") else FOLDER + there
        return posixpath.relpath(there, posixpath.dirname(uri) or ".")

    return "".join(piece if piece.startswith("`") else LINK.sub(moved, piece) for piece in CODE.split(markdown))


def _place(uri: str) -> str:
    """Where in the repository the file is that the site has at `uri`."""
    return uri.removeprefix(FOLDER) if uri.startswith(FOLDER) else f"docs/{uri}"


def _target(here: str, link: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(here), link))
