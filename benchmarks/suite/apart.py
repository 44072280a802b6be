"""Runs rows in processes of their own, so that a hang or a crash costs one row and not the run.

Rows come in groups; the rows of a group share a process, one after the other, several groups run at a time. The parent
alone writes the journal. A child that is silent for longer than its row may take is killed, one that dies or loses the
GPU costs the row it was at; the rest of its group goes on in a new child, until that has happened STRIKES times.
Children are forks of a server that has imported torch and never touched a GPU.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .runner import Journal, Row, Values, _brief, _guarded, _progress, _usable

STRIKES = 2
GRACE = 3.0  # seconds over its limit that a row has to stop by itself
START = 60.0  # seconds that a child may take to begin
LOG = 20_000  # characters of a child's output that are kept
PRELOADED = ["torch", "dynamicrad_compile", "suite.apart"]
CUT: Values = {"status": "skipped", "why": "the run had to end while it ran"}
Make = Callable[[Any, Values], Iterable[Row]]
"""(settings, content of the journal) -> rows; a function of a module, so that a child can import it."""


@dataclass
class Batch:
    """Groups of rows to run, and how.

    deadline  no row starts that would not be done by then, in seconds of time.monotonic()
    end       when all is cut off
    bar       why a row must not run, None if it may; asked just before its group starts
    """

    groups: list[list[Row]]
    make: Make
    settings: Any
    deadline: float
    end: float
    jobs: int = 1
    limit: float = 60.0  # seconds for one row
    method: str = "forkserver"  # or "spawn", which imports everything again for each child
    bar: Callable[[Row], str | None] = lambda row: None


class _Times(NamedTuple):
    """What a child knows of the time that it has."""

    deadline: float
    end: float
    limit: float


@dataclass
class _Child:
    process: Any
    pipe: Connection
    log: Path
    rows: list[Row]  # not done yet
    strikes: int
    since: float = field(default_factory=time.monotonic)
    current: Row | None = None
    allowed: float = START

    def kill(self) -> None:
        """End it and what it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()

    def said(self) -> str:
        """The end of its output."""
        return self.log.read_text(errors="replace")[-LOG:] if self.log.exists() else ""


def run_apart(batch: Batch, journal: Journal) -> None:
    """Run every row of the batch that is not done yet; the journal has a record of each afterwards."""
    done = journal.done()
    queue = deque(([row for row in group if row.name not in done], 0) for group in batch.groups)
    children: list[_Child] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for number in itertools.count():
                while queue and len(children) < batch.jobs:
                    rows, strikes = queue.popleft()
                    if rows := _admitted(rows, batch, journal):
                        log = Path(folder) / f"{number}_{len(queue)}"
                        children.append(_start(rows, strikes, batch, journal, log))
                if not children:
                    return
                _listen(children, batch, journal)
                for child in [c for c in children if c.pipe.closed]:
                    children.remove(child)
                    if child.rows:
                        queue.appendleft((child.rows, child.strikes))
        finally:
            for child in children:
                child.kill()


def _admitted(rows: list[Row], batch: Batch, journal: Journal) -> list[Row]:
    """The rows that may run; the others get their records."""
    left = batch.deadline - time.monotonic()
    kept = []
    for row in rows:
        if why := batch.bar(row):
            _note(journal, {**_record(row), "status": "unsupported", "why": why})
        elif left < row.seconds:
            _note(journal, {**_record(row), **_skipped(row, left)})
        else:
            kept.append(row)
    return kept


def _skipped(row: Row, left: float) -> Values:
    return {"status": "skipped", "why": f"{max(left, 0):.0f} s were left, it needs about {row.seconds:.0f} s"}


def _start(rows: list[Row], strikes: int, batch: Batch, journal: Journal, log: Path) -> _Child:
    context: Any = multiprocessing.get_context(batch.method)
    context.set_forkserver_preload(PRELOADED)
    ours, theirs = context.Pipe()
    times = _Times(batch.deadline, batch.end, batch.limit)
    given = (batch.make, batch.settings, journal.content, [row.name for row in rows], times)
    process = context.Process(target=_child, args=(theirs, str(log), *given))
    process.start()
    theirs.close()
    return _Child(process, ours, log, rows, strikes)


def _listen(children: list[_Child], batch: Batch, journal: Journal) -> None:
    """Wait until a child says something, ends or has to be killed; the pipe of one that is over is closed."""
    now = time.monotonic()
    patience = min(child.since + child.allowed for child in children) - now
    ready = wait([child.pipe for child in children], max(patience, 0.0))
    for child in children:
        if child.pipe in ready:
            try:
                _heard(child, child.pipe.recv(), batch, journal)
            except (EOFError, OSError):
                child.process.join(GRACE)
                _over(child, _ending(child), journal)
        elif time.monotonic() > child.since + child.allowed:
            child.kill()
            child.process.join(GRACE)
            cut = time.monotonic() > batch.end
            _over(child, f"took longer than {child.allowed - GRACE:.0f} s and was killed", journal, cut)


def _heard(child: _Child, message: tuple[str, Any], batch: Batch, journal: Journal) -> None:
    kind, value = message
    child.since = time.monotonic()
    if kind == "begin":
        child.current = next(row for row in child.rows if row.name == value)
        child.allowed = max(min(batch.limit, batch.end - child.since), 1.0) + GRACE
    else:
        child.rows = [row for row in child.rows if row.name != value["name"]]
        child.current, child.allowed = None, START
        _note(journal, value)


def _over(child: _Child, why: str, journal: Journal, cut: bool = False) -> None:
    """The end of a child; with rows left, one that it did not want. `cut`: because the whole run has to end."""
    child.pipe.close()
    if text := child.said():
        with journal.path.with_suffix(".log").open("a", encoding="utf-8") as log:
            log.write(f"\n==== {', '.join(row.name for row in child.rows[:1]) or 'a child that ended well'}\n{text}")
    if not child.rows:
        return
    child.strikes += 1
    if child.current is not None:
        child.rows = [row for row in child.rows if row is not child.current]
        ended: Values = {"status": "failed", "why": why, "lost_its_process": True}
        _note(journal, {**_record(child.current), **(CUT if cut else ended)})
    if child.strikes >= STRIKES:
        for row in child.rows:
            why_not = f"not tried after {STRIKES} lost processes, of the last: {why}"
            _note(journal, {**_record(row), "status": "failed", "why": why_not})
        child.rows = []


def _record(row: Row) -> Values:
    return {"name": row.name, "group": row.group, **row.facts}


def _ending(child: _Child) -> str:
    """How a child ended that was not killed."""
    code = child.process.exitcode
    how = f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit status {code}"
    lines = [line.strip() for line in child.said().splitlines() if line.strip()]
    return f"the process ended while it ran: {how}" + (f"; {lines[-1][:200]}" if lines else "")


def _note(journal: Journal, record: Values) -> None:
    journal.add(record)
    _progress(f"  {record['name']}: {record['status']}, {_brief(record)}")


def _child(
    pipe: Connection, log: str, make: Make, settings: Any, content: Values, names: list[str], times: _Times
) -> None:
    """Run the named rows and send their records; an end before the last name means that the GPU is lost."""
    with contextlib.suppress(OSError):
        os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    rows = {row.name: row for row in make(settings, content)}
    for name in names:
        row, start = rows[name], time.monotonic()
        pipe.send(("begin", name))
        left, record = times.deadline - start, _record(row)
        record |= _skipped(row, left) if left < row.seconds else _guarded(row, min(times.limit, times.end - start))
        record["seconds"] = round(time.monotonic() - start, 2)
        if record["status"] == "failed" and time.monotonic() > times.end:
            record |= CUT
        lost = record["status"] == "failed" and torch.cuda.is_initialized() and not _usable()
        if lost:
            record["why"] += " (the GPU was unusable after it)"
        content["rows"].append(record)
        pipe.send(("end", record))
        if lost:
            break
    pipe.close()
    sys.stdout.flush()
    os._exit(0)  # nothing that a library left running holds it up
