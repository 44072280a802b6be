"""Rows for tests of `suite.apart`: one that hangs, one that dies, and ordinary ones."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from suite.runner import Row, Unsupported


def _hang() -> Any:
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])  # as a hung kernel: no exception ends it
    time.sleep(600)


def _die() -> Any:
    print("an assertion of the compiler", flush=True)
    os.abort()


def _unsupported() -> Any:
    raise Unsupported("not on this chip")


def make(settings: Any, content: Any) -> list[Row]:
    """Rows by name; `settings` is the folder where each leaves a file that says which process ran it."""

    def ok(name: str) -> dict[str, Any]:
        (settings / name).write_text(str(os.getpid()))
        return {"ms": 1.0, "before": [row["name"] for row in content["rows"]]}

    runs = {"hang": _hang, "die": _die, "unsupported": _unsupported}
    names = ("first", "second", "third", "hang", "die", "die again", "unsupported")
    return [Row(n, "tiles", runs.get(n.split()[0], lambda n=n: ok(n)), 0.1, {"kernel": n}) for n in names]
