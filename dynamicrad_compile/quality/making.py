"""Clips of one method, kept in a folder; made here, or by the workers of an executor.

All clips of a method are one job. It is compiled once for them, and its sparsity is that of its whole run, so clips and
sparsity are the same, wherever they are made.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import DynamicRadError
from ..executors import Workers, check_executor
from ..files import whole_file
from ..optional import optional
from .methods import Method
from .metrics import check_clips
from .subject import Source, Subject, load_subject

Tick = Callable[[int], Any]


def ignore(count: int) -> None:
    """For those who want no word of how many clips have come."""


def make_clips(
    subject: Subject,
    item: Method,
    prompts: Sequence[str],
    seeds: Sequence[int],
    folder: Path,
    batch: int = 2,
    tick: Tick = ignore,
) -> tuple[Tensor, float, float]:
    """Clips [N, F, C, H, W] of one method, the sparsity of the run, and seconds a clip; kept in the folder.

    They are read from there if the same subject, prompts, seeds and method have made them before. `tick` is told how
    many clips have come.
    """
    safetensors = optional("safetensors.torch", "evaluating needs", "eval")

    file = _file(subject, item, prompts, seeds, folder)
    if file.is_file():
        found = safetensors.load_file(file)
        tick(len(prompts))
    else:
        found = _generate(subject, item, prompts, seeds, batch, tick)
        _save(found, file)
    return found["clips"].float(), float(found["sparsity"]), float(found["seconds"])


@dataclass(frozen=True)
class Job:
    """The clips of one method; the subject is loaded by its source, and must have the name."""

    source: Source
    subject: str
    item: Method
    prompts: Sequence[str]
    seeds: Sequence[int]
    batch: int


def check_workers(executor: Any, subject: Subject) -> None:
    """Raises OptionsError for an executor that is none, DynamicRadError for a subject that its workers can't load."""
    check_executor(executor)
    if executor is not None and subject.source is None:
        raise DynamicRadError(
            f"an executor's workers load the subject themselves, but {subject.name!r} does not say how. Make it by "
            'quality.load_subject("package.module:function"), or give Subject a source.'
        )


def make_ahead(
    executor: Any,
    subject: Subject,
    methods: Sequence[Method],
    prompts: Sequence[str],
    seeds: Sequence[int],
    folder: Path,
    batch: int,
    tick: Tick,
    say: Callable[[str], None],
) -> None:
    """Have the workers of an executor make what `make_clips` would not find; each method is kept when it is done.

    Raises DynamicRadError where no worker comes back with a method. What else must hold `check_workers` tells.
    """
    assert subject.source is not None
    files = {_file(subject, item, prompts, seeds, folder): item for item in methods}
    missing = [file for file in files if not file.is_file()]
    tick(len(prompts) * (len(methods) - len(missing)))
    jobs = [Job(subject.source, subject.name, files[file], prompts, seeds, batch) for file in missing]
    say(f"{len(jobs)} methods given out")
    workers = Workers(executor, goes_on="the same evaluation", say=say)
    for place, found in workers.run(run_job, jobs, _name):
        _save(found, missing[place])
        tick(len(prompts))


def _name(job: Job) -> str:
    return f"{job.item.name} {job.item.wanted:g}"


_one_at_a_time = threading.Lock()  # Dynamo's caches, the hook and the model are the process's
_loaded: tuple[Source, Subject] | None = None


def run_job(job: Job) -> dict[str, Tensor]:
    """What the file of a method holds, made in this process, which keeps the subject for the next job."""
    global _loaded
    with _one_at_a_time:
        if _loaded is None or _loaded[0] != job.source:
            _loaded = None
            where, arguments = job.source
            _loaded = (job.source, load_subject(where, **arguments))
        subject = _loaded[1]
        if subject.name != job.subject:
            raise DynamicRadError(
                f"a worker loaded the subject {subject.name!r} by {job.source[0]}, not {job.subject!r}. It must find "
                "the same code and files."
            )
        return _generate(subject, job.item, job.prompts, job.seeds, job.batch, ignore)


def _file(subject: Subject, item: Method, prompts: Sequence[str], seeds: Sequence[int], folder: Path) -> Path:
    """Where the clips are kept: named by what decides them."""
    identity = {"subject": subject.name, "prompts": [*prompts], "seeds": [*seeds], **item.describe()}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    return folder / f"{re.sub(r'[^A-Za-z0-9_]+', '-', item.name)}-{digest}.safetensors"


def _save(found: dict[str, Tensor], file: Path) -> None:
    with whole_file(file) as unfinished:
        optional("safetensors.torch", "evaluating needs", "eval").save_file(found, unfinished)


def _generate(
    subject: Subject, item: Method, prompts: Sequence[str], seeds: Sequence[int], batch: int, tick: Tick
) -> dict[str, Tensor]:
    """clips [N, F, C, H, W] float16, the sparsity of the run, float64 [], and seconds a clip, float32 []."""
    made: list[Tensor] = []
    start = time.perf_counter()
    with torch.no_grad(), item.run(subject) as run:
        for low in range(0, len(prompts), batch):
            part = slice(low, low + batch)
            clips = subject.generate(run.model, prompts[part], seeds[part])
            check_clips(clips, f"the clips of {item.name}")
            made.append(clips.float().cpu())
            tick(len(clips))
        sparsity = run.sparsity()
    seconds = (time.perf_counter() - start) / len(prompts)
    return {
        "clips": torch.cat(made).clamp(0.0, 1.0).half(),
        "sparsity": torch.tensor(sparsity, dtype=torch.float64, device="cpu"),
        "seconds": torch.tensor(seconds, dtype=torch.float32, device="cpu"),
    }
