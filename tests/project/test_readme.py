"""The README stays true: files that it names exist, and its eager example runs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_named_files_exist():
    links = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    names = re.findall(r"`((?:examples|benchmarks|tests|passes|profiles|docs)/[\w./]*)`", README)
    made_up = {"passes/verb_noun.py", "profiles/NAME.toml"}
    for name in {*links, *names} - made_up:
        assert (ROOT / name).exists(), name


def test_python_examples_parse():
    assert PYTHON
    for code in PYTHON:
        ast.parse(code)


def test_eager_example_runs(tmp_path):
    (code,) = [code for code in PYTHON if "make_plan" in code]
    script = tmp_path / "example.py"
    script.write_text(f"import torch\n{code}\nassert out.shape == q.shape and plan.sparsity > 0.79\n")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
