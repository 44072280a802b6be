"""The README stays true: files that it names exist (tests/docs/test_blocks.py runs its blocks)."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_named_files_exist():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    names = re.findall(r"`((?:examples|benchmarks|tests|passes|profiles|docs)/[\w./]*)`", README)
    made_up = {"passes/verb_noun.py", "profiles/NAME.toml"}
    for name in {*links, *names} - made_up:
        assert (ROOT / name).exists(), name
