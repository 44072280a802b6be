"""Which room imports which: the contracts hold, and the check sees a wrong import wherever one is planted."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

pytest.importorskip("importlinter", reason="comes with the extra dev")
SPEC = importlib.util.spec_from_file_location("arrows", Path(__file__).parents[2] / ".ci" / "arrows.py")
arrows = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(arrows)

REFUSED = "is not allowed to import dynamicrad_compile"
PLANTED = {  # where, what, and what the linter says of it
    "a linked room": ("kernels/tiles.py", "from dynamicrad_compile.policy import decide", f"kernels {REFUSED}.policy"),
    "inside a function": ("profiles/loader.py", "def f():\n    from ..plans import make", f"profiles {REFUSED}.plans"),
    "the whole package": ("options.py", "import dynamicrad_compile", f"options {REFUSED}"),
    "within the passes": ("passes/graph.py", "from . import find_attention", f"passes.graph {REFUSED}"),
    "a circle": ("plans/layout.py", "from . import make", "No cycles are allowed in dynamicrad_compile.plans"),
    "no room": ("shed.py", "", "shed"),
}


def test_contracts_hold(tmp_path):
    arrows.copy_package(tmp_path)
    done = arrows.check(tmp_path)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("case", PLANTED)
def test_planted(tmp_path, case):
    name, line, message = PLANTED[case]
    file = arrows.copy_package(tmp_path) / name
    text = file.read_text(encoding="utf-8") if file.exists() else '"""Nothing."""\n'
    file.write_text(f"{text}\n\n{line}\n", encoding="utf-8")
    done = arrows.check(tmp_path)
    assert done.returncode == 1
    told = " ".join((done.stdout + done.stderr).split())
    assert message in told, told
