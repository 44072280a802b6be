"""The notebook runs as it stands, and what is committed with it is what comes out.

After a change: jupyter execute --inplace examples/first_steps.ipynb (of nbclient), and look at it.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "examples/first_steps.ipynb"


def texts(notebook):
    """What its cells print, pictures and warnings left out."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    return [output.text for output in outputs if output.output_type == "stream" and output.name == "stdout"]


def read():
    return pytest.importorskip("nbformat").read(FILE, as_version=4)


def test_it_is_committed_with_outputs_and_small():
    cells = [cell for cell in read().cells if cell.cell_type == "code"]
    assert FILE.stat().st_size < 500_000
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    pictures = [o for cell in cells for o in cell.outputs if "image/png" in o.get("data", {})]
    assert len(pictures) == 3


def test_its_links_lead_somewhere():
    text = "\n".join(cell.source for cell in read().cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\((?!http)([^)#]+)", text)
    assert links
    assert not [link for link in links if not (FILE.parent / link).exists()]


@pytest.mark.slow
def test_it_runs_and_prints_what_is_committed():
    client = pytest.importorskip("nbclient")
    committed, notebook = read(), read()
    place = {"metadata": {"path": str(FILE.parent)}}
    client.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=place).execute()

    def steady(text):
        """Without what differs from machine to machine: how fast it is, and the last digits."""
        of_machine = ("note: mode", "expected on")
        text = "\n".join(line for line in text.splitlines() if not line.startswith(of_machine))
        return re.sub(r"\d+\.\d+", lambda number: str(round(float(number[0]))), text)

    assert list(map(steady, texts(notebook))) == list(map(steady, texts(committed)))
