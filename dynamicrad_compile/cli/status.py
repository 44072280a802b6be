"""A line that says what is going on, on a terminal only."""

from __future__ import annotations

import sys


def status(text: str) -> None:
    """Show a text in place of the last one, on stderr; an empty one clears the line."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
