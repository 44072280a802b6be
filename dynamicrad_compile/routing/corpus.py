"""Prompts labelled by how much moves, for fitting the motion router.

Labels:
    low    a static scene or object, subtle change (breathing, steam, ripples), a talking head, a still life,
           someone sitting, reading or sleeping, a slow pan or push-in; objects and places named without any action
    mid    walking and ordinary activity of people and animals (cooking, eating, riding a bicycle, grazing), vehicles
           at ordinary speed, moderate camera movement, drifting clouds and rolling waves, time lapse of slow things,
           and violent events in slow motion
    high   running, sports, dance, fights, chases, racing, explosions, storms and disasters, crowds in motion,
           a fast camera, time lapse of traffic and crowds
What counts is what the clip would show: "a photo of a race car" and "after the battle nothing moves" are low, and
a long calm description with one violent clause is high.

Files (package data, prompts/): motion.jsonl, written one by one; composed.jsonl, subjects, actions and places joined
from hand-written phrases at random. Composed prompts only support the fit: accuracy is measured on written ones.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from ..errors import RouterError, nearest
from ..runtime.router import CLASSES


@dataclass(frozen=True)
class Prompt:
    """A prompt and its label (0 low, 1 mid, 2 high). Prompts of one group stay on one side of every split."""

    text: str
    label: int
    style: str = ""
    language: str = ""
    group: str = ""
    composed: bool = False


PromptSource = str | os.PathLike[str] | Iterable[Any]


def load_prompts(source: PromptSource | None = None) -> list[Prompt]:
    """Labelled prompts: ours (None), those of a file, or a list of (text, label) pairs, dicts or Prompts.

    A .jsonl file has an object a line, a .csv file has a header; keys: text, label ("low", "mid", "high" or 0, 1, 2),
    and if wanted style, language, group. RouterError names the file and line of a mistake.
    """
    if source is None:
        folder = resources.files(__package__) / "prompts"
        written = _rows((folder / "motion.jsonl").read_text(encoding="utf-8"), "motion.jsonl")
        composed = _rows((folder / "composed.jsonl").read_text(encoding="utf-8"), "composed.jsonl")
        return _prompts(written, "motion.jsonl") + _prompts(composed, "composed.jsonl", composed=True)
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if path.suffix not in (".jsonl", ".csv"):
            raise RouterError(f"prompts are read from a .jsonl or .csv file, got {str(path)!r}.")
        if not path.is_file():
            raise RouterError(f"there is no file {path}.")
        try:
            text = path.read_text(encoding="utf-8-sig")
            rows = list(csv.DictReader(text.splitlines())) if path.suffix == ".csv" else _rows(text, str(path))
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise RouterError(f"{path} can't be read: {error}.") from None
        return _prompts(rows, str(path))
    return _prompts(list(source), "prompts")


def _rows(text: str, name: str) -> list[Any]:
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            rows.append(json.loads(line) if line.strip() else None)
        except ValueError as error:
            raise RouterError(f"{name}, line {number}: not valid JSON: {error}.") from None
    return rows


def _prompts(rows: Sequence[Any], name: str, composed: bool = False) -> list[Prompt]:
    prompts, labels = [], dict[str, int]()
    for number, row in enumerate(rows, 1):
        if row is None:
            continue
        prompt = _prompt(row, f"{name}, entry {number}", composed)
        if labels.setdefault(prompt.text, prompt.label) != prompt.label:
            raise RouterError(f"{name}, entry {number}: {prompt.text!r} is there with two different labels.")
        prompts.append(prompt)
    return prompts


def _prompt(row: Any, where: str, composed: bool) -> Prompt:
    if isinstance(row, Prompt):
        return row
    if isinstance(row, dict):
        unknown = set(row) - {"text", "label", "style", "language", "group"}
        if unknown or not {"text", "label"} <= set(row):
            raise RouterError(f"{where}: needs text and label, may have style, language, group; has {sorted(row)}.")
        values = dict(row)
    elif isinstance(row, (tuple, list)) and len(row) == 2:
        values = {"text": row[0], "label": row[1]}
    else:
        raise RouterError(f"{where}: expected (text, label), got {row!r}.")
    text, label = values.pop("text"), values.pop("label")
    if not isinstance(text, str) or not text.strip():
        raise RouterError(f"{where}: the text must be a non-empty string, got {text!r}.")
    names = {**{name: index for index, name in enumerate(CLASSES)}, **{str(i): i for i in range(len(CLASSES))}}
    key = str(label).strip().lower()
    if isinstance(label, bool) or key not in names:
        raise RouterError(f"{where}: label must be low, mid or high (0, 1, 2), got {label!r}.{nearest(key, CLASSES)}")
    values = {name: str(value or "") for name, value in values.items()}
    return Prompt(text.strip(), names[key], composed=composed, **values)
