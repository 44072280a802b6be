"""Runs the rows of a suite in order of importance under a deadline; one row's failure is a line, not the end.

The journal is written after every row, so a run that is cut off keeps what it has and `resume` goes on from there.
An error that leaves the GPU unusable for this process (an illegal address, say) starts the script again by itself:
the rows that are done stay, the failed one is not tried again.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

Values = dict[str, Any]
SCHEMA = 1


class RowTimeout(Exception):
    """A row ran longer than its limit."""


class Unsupported(Exception):
    """A row can't run on this device or with these versions; it says why."""


@dataclass(frozen=True)
class Row:
    """One line of the results.

    name       unique, also what --only matches
    group      table that it belongs to
    run        computes its values; may raise anything
    seconds    what it is expected to take, compilation included; it is skipped if less is left
    facts      known before it runs (tokens, sparsity, ...), recorded even if it fails
    """

    name: str
    group: str
    run: Callable[[], Values]
    seconds: float = 5.0
    facts: Values = field(default_factory=dict)


@dataclass
class Journal:
    """The JSON of one run."""

    path: Path
    content: Values

    @property
    def rows(self) -> list[Values]:
        """Rows so far, in the order they ran."""
        return self.content["rows"]

    def done(self) -> set[str]:
        """Names that need not run again: all but the skipped ones."""
        return {row["name"] for row in self.rows if row["status"] != "skipped"}

    def add(self, row: Values) -> None:
        """Record a row, in place of an earlier one of its name, and write the file."""
        self.content["rows"] = [old for old in self.rows if old["name"] != row["name"]] + [row]
        self.write()

    def write(self) -> None:
        """Write the file whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.content, indent=1, default=str) + "\n", encoding="utf-8")
        os.replace(part, self.path)

    @staticmethod
    def resume(path: Path) -> Journal:
        """The journal of an earlier run. Raises ValueError if the file is none."""
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.get("schema") != SCHEMA or "rows" not in content:
            raise ValueError(f"{path} is no result of this suite (schema {SCHEMA})")
        return Journal(path, content)


def run_rows(rows: list[Row], journal: Journal, deadline: float, row_limit: float, device: str) -> None:
    """Run what is not done yet; `deadline` in seconds of time.monotonic(), `row_limit` in seconds for one row."""
    done = journal.done()
    waiting = [row for row in rows if row.name not in done]
    began, expected = time.monotonic(), 0.0
    for number, row in enumerate(waiting):
        left = deadline - time.monotonic()
        pace = (time.monotonic() - began + 1.0) / (expected + 1.0)  # how far the estimates are off, so far
        rest = pace * sum(later.seconds for later in waiting[number:])
        _progress(f"[{number + 1}/{len(waiting)}] {row.name}  (ETA {min(rest, max(left, 0)):.0f} s, {left:.0f} s left)")
        record: Values = {"name": row.name, "group": row.group, **row.facts}
        if left < row.seconds:
            why = f"{max(left, 0):.0f} s were left, it needs about {row.seconds:.0f} s"
            journal.add({**record, "status": "skipped", "why": why})
            continue
        # Marked as failed first: a crash of the process leaves that, and a resumed run goes on with the next.
        journal.add({**record, "status": "failed", "why": "the process ended while it ran"})
        start = time.monotonic()
        record |= _guarded(row, min(row_limit, left))
        if record["status"] == "failed" or time.monotonic() - start > 10:
            _tidy()
        record["seconds"] = round(time.monotonic() - start, 2)
        expected += row.seconds
        journal.add(record)
        _progress(f"    {record['status']}: {_brief(record)}")
        if device != "cpu" and record["status"] == "failed" and not _usable():
            journal.add({**record, "why": f"{record['why']} (the GPU was unusable after it)"})
            _restart(journal.path, deadline - time.monotonic())


def _guarded(row: Row, limit: float) -> Values:
    try:
        with _alarm(limit):
            return {"status": "ok", **row.run()}
    except Unsupported as error:
        return {"status": "unsupported", "why": str(error)}
    except torch.OutOfMemoryError as error:
        return {"status": "failed", "why": "out of memory: " + _line(error)}
    except Exception as error:
        if isinstance(error, RowTimeout) or "RowTimeout" in str(error):  # compilers wrap what is raised in them
            return {"status": "failed", "why": f"took longer than {limit:.0f} s"}
        traceback.print_exc(limit=4)
        return {"status": "failed", "why": f"{type(error).__name__}: {_line(error)}"}


def _tidy() -> None:
    """Give back what a failed or large row left behind."""
    gc.collect()
    if torch.cuda.is_initialized():
        with contextlib.suppress(Exception):
            torch.cuda.empty_cache()


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Raise RowTimeout in the main thread after so many seconds, where the system has alarms."""
    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_: Any) -> None:
        raise RowTimeout

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1.0))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _usable() -> bool:
    """Whether this process can still use the GPU."""
    try:
        torch.cuda.synchronize()
        return bool((torch.zeros(1, device="cuda") + 1).item() == 1)
    except Exception:
        return False


def _restart(path: Path, budget: float) -> None:
    """Run the same command in a new process in place of this one; of an option given twice the last counts."""
    _progress("    starting again: this process can't use the GPU any more")
    sys.stdout.flush()
    again = [sys.executable, *sys.argv, f"--resume={path}", f"--budget={budget:.0f}"]
    os.execv(sys.executable, again)


def _brief(record: Values) -> str:
    """The figures of a row that fit one line."""
    if record["status"] != "ok":
        return record["why"]
    shown = ("error", "ms", "gain", "tflops", "of_ideal", "over_flex", "share", "bound", "summary")
    parts = [f"{key} {_short(record[key])}" for key in shown if record.get(key) is not None]
    return ", ".join(parts) or "done"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "..."


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
