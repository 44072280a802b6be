"""Each script runs by itself, from any folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = sorted(
    path for path in Path(__file__).parents[2].glob("benchmarks/*.py") if "ArgumentParser" in path.read_text()
)

# Each script in a process of its own, as Python starts it, but for torch and the package, which are loaded once.
EACH = """
import json, os, runpy, sys, traceback
from pathlib import Path
import dynamicrad_compile
import torch._dynamo

def run(script):
    sys.argv, sys.path[0] = [script, "--help"], str(Path(script).parent)
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as stop:
        return stop.code or 0
    except BaseException:
        traceback.print_exc()
    return 1

found = {}
for script in sys.argv[1:]:
    said = Path(script).stem + ".txt"
    child = os.fork()
    if not child:
        with open(said, "w") as file:
            os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
            code = run(script)
            sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    found[Path(script).stem] = code, Path(said).read_text()
print(json.dumps(found))
"""


@pytest.mark.slow
def test_help(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    command = [sys.executable, "-c", EACH, *map(str, SCRIPTS)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert set(found) == {script.stem for script in SCRIPTS}
    for name, (code, said) in found.items():
        assert (code, said[:6]) == (0, "usage:"), f"{name}: {said}"
