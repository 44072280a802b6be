"""Every block of Python and of commands in the docs runs as it stands, or a comment before it says why it does not.

Blocks of a page share their names and a folder. What is not run is looked at all the same: Python compiles, commands
are ones that their own parsers take, with targets, scripts and extras that are there.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
from contextlib import suppress
from pathlib import Path
from unittest import SkipTest

import pytest
from sybil import Document, Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser

from dynamicrad_compile import cli
from dynamicrad_compile.files import tomllib

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SLOW = {"export.md"}
"""Pages that take more than a few seconds."""

FENCE = re.compile(r"(?:<!-- skip: next \"([^\"]+)\" -->\n)?```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LANGUAGES = {"python", "bash", "console", "text", "toml", ""}
OTHERS = {"cd", "accelerate", "torchrun", "trtexec", "git", "curl", "ln"}
"""Commands of others, of which nothing is known here."""


def shell(example: Example) -> None:
    """Run the commands of a block: ours in this process, others in one of their own."""
    for words in commands(example.parsed):
        if words[0] == "dynamicrad":
            assert cli.main(words[1:]) == 0, words
        else:
            subprocess.run(words, check=True)


def commands(block: str) -> list[list[str]]:
    """The commands of a block, in words, without prompts, comments and settings of variables; `console` has output."""
    lines = block.replace("\\\n", " ").splitlines()
    prompted = [line[2:] for line in lines if line.startswith("$ ")]
    found = [shlex.split(line, comments=True) for line in prompted or lines]
    return [words[next(i for i, word in enumerate(words) if "=" not in word) :] for words in found if words]


SYBIL = Sybil(
    [PythonCodeBlockParser(), CodeBlockParser("bash", shell), CodeBlockParser("console", shell), SkipParser()],
    path=str(ROOT),
)


def marked(page: Path) -> object:
    return pytest.param(page, id=page.name, marks=[pytest.mark.slow] if page.name in SLOW else [])


@pytest.mark.parametrize("page", [marked(page) for page in PAGES])
def test_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    document: Document = SYBIL.parse(page)
    for example in document.examples():
        with suppress(SkipTest):
            example.evaluate()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_that_do_not_run(page):
    text = page.read_text(encoding="utf-8")
    assert text.count("<!-- skip") == sum(bool(reason) for reason, _, _ in FENCE.findall(text)), (
        "a mark without a block"
    )
    for _, language, block in FENCE.findall(text):
        assert language in LANGUAGES, block
        if language == "python":
            compile(block, page.name, "exec")
        if language == "toml":
            tomllib.loads(block)
        if language in ("bash", "console"):
            for words in commands(block):
                check(words)


def check(words: list[str]) -> None:
    """Look at a command without running it."""
    program, arguments = words[0], words[1:]
    if program == "dynamicrad":
        cli._parser().parse_args(arguments)
    elif program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert {word for word in arguments if "=" not in word} <= set(targets), words
    elif program == "pip":
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        asked = re.findall(r"[\w-]+", " ".join(re.findall(r"\[([\w,-]+)\]", " ".join(arguments))))
        assert arguments[0] == "install", words
        assert set(asked) <= set(project["optional-dependencies"]), words
    elif arguments[:1] == ["-m"] and program == "python":
        assert importlib.util.find_spec(arguments[1]), words
    elif program in ("python", "bash"):
        assert (ROOT / arguments[0]).is_file(), words
    else:
        assert program in OTHERS, words
    for word in words:
        if re.match(r"(?:benchmarks|docs|dynamicrad_compile|examples|profiles|tests)/", word) and "NAME" not in word:
            assert (ROOT / word).exists(), words
