"""docs/models.md: what is done with each model, written from the rows of zoo_table.py.

python benchmarks/models_page.py      # from benchmarks/results/zoo.json; `zoo_table.py --save` does it, too
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dynamicrad_compile.files import tomllib

WHOLE: Any = {"break_long_words": False, "break_on_hyphens": False}
ROOT = Path(__file__).parents[1]
ROWS = ROOT / "benchmarks" / "results" / "zoo.json"
NAMES = ROOT / "benchmarks" / "zoo_names.toml"
PAGE = ROOT / "docs" / "models.md"

HEAD = """# Models

<!-- written by benchmarks/models_page.py; change that, not this -->

{sparse} of the {videos} models below that attend over a whole video are block-sparse, with
`torch.compile(model, backend="dynamicrad")` and nothing else; {dense} stay dense, in whole or in part, for the reason
given; {images} have no such attention and are left alone. {wrong} had a wrong grid. Nothing is written for a model by
its name: one that is not listed works if its token grid can be traced, and `dynamicrad explain` or
`drad.explain(model, ...)` says so before anything is compiled:

<!-- skip: next "takes 20 seconds" -->
```bash
dynamicrad explain --model wan-1.3b --frames 33
```

- **By name**: what `torch.compile(model, backend="dynamicrad")` replaces, of the video self-attentions in one call.
  *2 graphs*: the model's own code breaks its graph; clock and regime cross the break with `drad.compile(model)` only.
- **By blocks**: the same of `model.compile_repeated_blocks(backend="dynamicrad")`, where one graph serves all layers.
- **Exact**: largest relative error of the output to eager PyTorch, every block kept, at up to five resolutions.
- **Masked**: the same with 70 % of the blocks skipped, to dense attention under the same mask, at two resolutions.

Each model was built with random weights, two layers and a small grid ({version}, {date});
[benchmarks/results/zoo.md](../benchmarks/results/zoo.md) has graphs, recompiles and times.
"""

FOOT = """
## How to add one

1. Write a function in `tests/zoo/` that returns a tiny model, the keyword arguments of its call, and what is expected:
   its grid, and how many video self-attentions it has (`tests/zoo/models.py` says what else).
2. Give it a name in `benchmarks/zoo_names.toml`.
3. `python benchmarks/zoo_table.py CASE --save` runs it and writes this page.

A model that stays dense says why; [reasons.md](reasons.md) lists the reasons. A reason that is wrong is a fault: send
us the line that `explain` prints, or better the case.
"""

COLUMNS = ("model", "by name", "by blocks", "exact", "masked", "dense: why")


def page(content: dict[str, Any]) -> str:
    """The page for the content of zoo.json."""
    names = tomllib.loads(NAMES.read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in content["rows"]}
    videos = [row for row in rows.values() if row["expected"]]
    sparse = [row for row in videos if row["replaced"] == row["expected"]]
    counts = {"videos": len(videos), "sparse": len(sparse), "dense": len(videos) - len(sparse)}
    counts["wrong"] = sum(row["grid_right"] is False for row in rows.values()) or "None"
    head = HEAD.format(images=len(rows) - len(videos), version=content["version"], date=content["date"], **counts)
    text = [head, "## Models of diffusers\n", _table(rows, names["diffusers"])]
    text += ["\n## Layouts of original repositories\n"]
    text += ["Written anew for the tests, after how those repositories write their models.\n"]
    text += [_table(rows, names["original"]), FOOT]
    return "\n".join(text)


def write(content: dict[str, Any]) -> None:
    """Write the page."""
    PAGE.write_text(page(content), encoding="utf-8")


def _table(rows: dict[str, Any], names: dict[str, str]) -> str:
    notes: dict[str, None] = {}
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for name, title in names.items():
        if name in rows:
            lines.append("| " + " | ".join(_cells(rows[name], title, notes)) + " |")
    below = [
        textwrap.fill(f"{number}. {text}", 120, subsequent_indent="   ", **WHOLE)
        for number, text in enumerate(notes, 1)
    ]
    return "\n".join([*lines, "", "Why:", "", *below] if below else lines)


def _cells(row: dict[str, Any], title: str, notes: dict[str, None]) -> Sequence[str]:
    """A line of the table; the reasons are put among the notes below it."""
    if row["failure"]:
        return title, row["failure"], "", "", "", ""
    if not row["expected"]:
        return title, "left alone: no attention over a whole video", "", "", "", ""
    by_name = f"{row['replaced']} of {row['expected']}" if row["replaced"] else "dense"
    if row["replaced"] and row["graphs"] > 1:
        by_name += f", {row['graphs']} graphs"
    why = ""
    if row["replaced"] < row["expected"]:
        notes |= dict.fromkeys(row["reasons"])
        why = ", ".join(f"({list(notes).index(text) + 1})" for text in row["reasons"])
    return title, by_name, row["by_blocks"] or "-", _error(row["full_error"]), _error(row["sparse_error"]), why


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.0e}"


if __name__ == "__main__":
    write(json.loads(ROWS.read_text(encoding="utf-8")))
