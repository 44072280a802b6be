"""Docstrings as the site shows them: lists of names in columns become lists of Markdown.

weight   of each block
bias     float32
"""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

COLUMNS = re.compile(r"^( *)(\S+(?:(?:, | or )\S+)*) {2,}(\S.*)$")


class Columns(Extension):
    """Rewrites the docstring of each object that griffe has read."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Called by griffe once an object is read."""
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(text: str) -> str:
    """The text with its columns as lists, and brackets that are no links."""
    lines: list[str] = []
    column, left = 0, 0  # where the right column of the present list begins, and the left one
    for line in text.replace("][", "]\\[").splitlines():
        indent = len(line) - len(line.lstrip())
        found = COLUMNS.match(line)
        if found and len(found[1]) < 4:
            if not column:
                lines.append("")
            column, left = found.start(3), len(found[1])
            lines.append(f"- `{found[2]}`: {found[3]}")
        elif column and line.strip() and indent > left:
            lines.append(f"  {line.strip()}")
        else:
            if column and line.strip():
                lines.append("")
            column = 0
            lines.append(line)
    return "\n".join(lines)
