"""The journal of a search: one JSON object a line, on disk before the search goes on.

The first line is the task; it is written with the first evaluation. Each further line is one evaluation, found again
by its place: stage ("search", "sweep", "held_out"), regime, mode and index. A line that a crash cut short is dropped
when the journal is opened. A journal of an earlier version has points of another search space and is refused.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..errors import OptionsError
from ..files import write_file
from .objective import Evaluation
from .task import Task

VERSION = 2  # 1: before boxes, covariances and ranks were searched
Place = tuple[str, str, str, int]


class Journal:
    """Reads what is there and appends. Raises OptionsError for a file that is no journal or one of another task."""

    def __init__(self, path: Path, task: Task, packages: dict[str, str], resume: bool) -> None:
        self.path = path
        self.entries: dict[Place, dict[str, Any]] = {}
        self._header: dict[str, Any] = {"journal": VERSION, "task": task.as_json(), "packages": packages}
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        lines = self._parsed(whole)
        if len(lines) < 2:  # no evaluation yet
            return
        if not resume:
            raise OptionsError(
                f"{path} holds a journal already. Go on with it by resume=True (--resume), or give another output."
            )
        self._check_task(lines[0].get("task", {}), self._header["task"])
        if len(whole) < len(content):
            with path.open("r+b") as file:
                file.truncate(len(whole))
        for line in lines[1:]:
            self.entries[(line["stage"], line["regime"], line["mode"], line["index"])] = line

    def _parsed(self, whole: bytes) -> list[dict[str, Any]]:
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
        except ValueError as error:
            raise OptionsError(f"{self.path} is not a journal of a search: {error}.") from None
        version = lines[0].get("journal") if lines and isinstance(lines[0], dict) else None
        if isinstance(version, int) and version < VERSION:
            raise OptionsError(
                f"{self.path} is a journal of an earlier version of the search ({version}, this is {VERSION}), which "
                "had other dimensions. Remove it and search anew, or give another output."
            )
        if lines and version != VERSION:
            raise OptionsError(f"{self.path} is not a journal of a search: its first line is no task.")
        return lines

    def _check_task(self, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
        ours = json.loads(json.dumps(ours))
        different = [name for name in ours if theirs.get(name) != ours[name]]
        if different:
            details = "; ".join(f"{name} was {theirs.get(name)!r}, now {ours[name]!r}" for name in different)
            raise OptionsError(
                f"{self.path} is the journal of another task: {details}. Use the same settings, or another output."
            )

    def find(self, stage: str, regime: str, mode: str, index: int) -> tuple[list[float], Evaluation] | None:
        """The point and the evaluation at a place; None if it is not there yet."""
        entry = self.entries.get((stage, regime, mode, index))
        return None if entry is None else (entry["point"], _evaluation(entry["evaluation"]))

    def write(self, stage: str, regime: str, mode: str, index: int, point: list[float], found: Evaluation) -> None:
        """Append one evaluation; it is on disk when this returns."""
        entry = {
            "stage": stage,
            "regime": regime,
            "mode": mode,
            "index": index,
            "point": point,
            "evaluation": {key: value for key, value in vars(found).items() if _is_finite(value)},
        }
        if not self.entries:
            write_file(self.path, f"{json.dumps(self._header)}\n")
        self._append(entry)
        self.entries[(stage, regime, mode, index)] = json.loads(json.dumps(entry))

    def evaluations(self, stage: str | None = None) -> list[tuple[Place, Evaluation]]:
        """All evaluations so far, or those of one stage, in the order of the file."""
        return [
            (place, _evaluation(entry["evaluation"]))
            for place, entry in self.entries.items()
            if stage in (None, place[0])
        ]

    def _append(self, entry: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _is_finite(value: Any) -> bool:
    """Whether JSON has the value; what a pruned point lacks is left out."""
    return not isinstance(value, float) or value - value == 0.0


def _evaluation(entry: dict[str, Any]) -> Evaluation:
    draws = tuple((proxy, seed, error, sparsity) for proxy, seed, error, sparsity in entry.get("draws", ()))
    return Evaluation(**{**entry, "draws": draws})
