"""docs/own_mask.md stays true: its code runs as it stands, block after block."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = (Path(__file__).parents[2] / "docs/own_mask.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_page_runs_as_it_stands(tmp_path):
    script = tmp_path / "page.py"
    script.write_text("\n".join(re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)), encoding="utf-8")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "of dense attention is skipped" in done.stdout
    errors = {name.strip(): float(value) for name, value in re.findall(r"^(.*?) +(0\.\d+)$", done.stdout, re.MULTILINE)}
    assert len(errors) == 5
    assert max(errors.values()) < 1.0
