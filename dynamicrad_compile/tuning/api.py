"""`drad.tune` and what the command `dynamicrad tune` calls."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..beforehand import output_file
from ..errors import OptionsError
from ..executors import Workers, check_executor
from ..files import to_toml, write_file
from ..optional import optional
from ..profiles import REGIMES, Profile
from ..profiles.loader import parse_profile
from .captures import read_capture
from .journal import Journal
from .output import package_versions, profile_tables, unreached
from .pictures import plot_convergence, plot_pareto
from .search import Runner, Winners, anything, check_optimizer, count_evaluations, search
from .task import DEFAULT_OPTIMIZER, MODES, Task


def tune(
    grid: Sequence[int],
    output: str | Path = "outputs/tuned.toml",
    *,
    block_size: int = 128,
    text_before: int = 0,
    text_after: int = 0,
    heads: int = 4,
    head_dim: int | None = None,
    sparsity: float = 0.8,
    budget: int = 30,
    optimizer: str = DEFAULT_OPTIMIZER,
    seed: int = 0,
    workers: int = 1,
    executor: Any = None,
    proxies: Sequence[str] | None = None,
    captures: Sequence[str | Path] = (),
    modes: Sequence[str] = MODES,
    seeds: Sequence[int] = (1, 2, 3),
    rows: int | None = None,
    fixed: Mapping[str, Any] | None = None,
    boxes: Sequence[Any] = (),
    header: Mapping[str, Any] | None = None,
    match: Mapping[str, Any] | None = None,
    resume: bool = False,
    pictures: bool = True,
    progress: bool = True,
) -> Profile:
    """Search the parameters of all regimes and modes on captured or proxy attention, write a profile, return it.

    grid        (frames, height, width) of the video in latent tokens
    output      the profile to write; beside it come NAME.jsonl (the journal), NAME_convergence.png, NAME_pareto.png
    sparsity    share of dense attention that must be skipped, compensation counted
    budget      evaluations for each of the three regimes and each mode
    optimizer   name in Nevergrad's registry
    workers     points that the search asks for at once, so its result depends on it, and processes that evaluate them
    executor    evaluates them instead: any with `submit` as concurrent.futures has it, such as a client of Dask, on any
                machines; the result is the same. Captures are read there, at the same paths
    captures    files of `record_attention`: the search is on that attention, and on no proxies unless they are named.
                A third of each regime's files is held out, none of a single one; a regime without files takes
                all. head_dim is theirs
    proxies     without captures the default is "published" and "video", and head_dim 128
    header      keys for the [profile] table, such as description and dense_layers; the name is that of the file
    match       the [match] table: what the profile is for (heads, layers, ...); grid and head_dim are filled in
    resume      go on with the journal of an interrupted search
    The rest is explained in `tuning.task.Task`.

    Everything is in the journal before the search goes on, so an interruption loses at most what was being
    evaluated; with `resume` the result is that of an uninterrupted search. A job whose worker died is given out again,
    two times at most. With workers > 1 a script needs the usual
    `if __name__ == "__main__":`, since processes are spawned.
    Raises OptionsError for values out of range, and DynamicRadError without nevergrad (or matplotlib for pictures) or
    where no worker comes back with a job.
    """
    path = _checked_output(output, pictures)
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise OptionsError(f"workers must be an integer of at least 1, got {workers!r}.")
    check_executor(executor)
    read = tuple(read_capture(file) for file in captures)
    if head_dim is None:
        head_dim = read[0].head_dim if read else 128
    if proxies is None:
        proxies = () if read else ("published", "video")
    named = tuple(proxies) if not read or "captured" in proxies else (*proxies, "captured")
    task = Task(
        grid=tuple(grid),  # type: ignore[arg-type]
        block_size=block_size,
        text_before=text_before,
        text_after=text_after,
        heads=heads,
        head_dim=head_dim,
        proxies=named,
        modes=tuple(modes),
        sparsity=sparsity,
        seeds=tuple(seeds),
        rows=rows,
        budget=budget,
        optimizer=optimizer,
        seed=seed,
        batch=workers,
        fixed=dict(fixed or {}),
        boxes=tuple(boxes),
        captures=read,
    )
    if match is not None:
        match = {"grid": list(task.grid), "head_dim": head_dim, **match}
    header = {"name": path.stem, "description": "", **(header or {})}

    def written(winners: Winners) -> str:
        source = "; ".join(filter(None, (_source(task), unreached(task, winners))))
        return to_toml(profile_tables(task, winners, header, match, source))

    check_optimizer(task)
    parse_profile(written(anything(task)), str(path))
    journal = Journal(path.with_suffix(".jsonl"), task, package_versions(), resume)
    winners = _run(task, journal, executor, progress)
    text = written(winners)
    profile = parse_profile(text, str(path))
    write_file(path, text)
    if pictures:
        for plot, file in zip((plot_convergence, plot_pareto), picture_files(path), strict=True):
            plot(journal, task, file)
    if progress:
        print(summary(task, winners), file=sys.stderr)
    return profile


def _checked_output(output: str | Path, pictures: bool) -> Path:
    """The path, if all that is written there can be; else OptionsError, or DynamicRadError for a missing library."""
    path = Path(output)
    if path.suffix != ".toml":
        raise OptionsError(f"output must be the path of a .toml file, got {str(output)!r}.")
    for library in ("nevergrad", "tqdm", *["matplotlib"] * pictures):
        optional(library, "tuning needs", "tune")
    for place in (path, path.with_suffix(".jsonl"), *picture_files(path)[: 2 * pictures]):
        output_file(place, OptionsError)
    return path


def picture_files(path: Path) -> tuple[Path, Path]:
    """The pictures beside a profile: convergence, and error against sparsity."""
    return path.with_name(f"{path.stem}_convergence.png"), path.with_name(f"{path.stem}_pareto.png")


def summary(task: Task, winners: Winners) -> str:
    """A table of losses and sparsities: tuned, and held out; then what to know of them."""
    lines = [f"{'regime':6s} {'mode':18s} {'loss':>9s} {'sparsity':>9s} {'held out':>9s} {'sparsity':>9s}"]
    for (regime, mode), found in winners.tuned.items():
        held = winners.held_out.get((regime, mode))
        unseen = f"{held.loss:9.3f} {held.sparsity:9.4f}" if held else f"{'-':>9s} {'-':>9s}"
        lines.append(f"{regime:6s} {mode:18s} {found.loss:9.3f} {found.sparsity:9.4f} {unseen}")
    if seen := [regime for regime in REGIMES if not task.holds_out(regime)]:
        lines.append(f"nothing is held out of {', '.join(seen)}: one capture. Record at least two runs of a regime.")
    if lacking := unreached(task, winners):
        lines.append(f"{lacking}. There are {task.blocks} blocks of {task.block_size} tokens: try smaller blocks.")
    return "\n".join(lines)


def _run(task: Task, journal: Journal, executor: Any, progress: bool) -> Winners:
    tqdm = optional("tqdm", "tuning needs", "tune").tqdm
    with tqdm(total=count_evaluations(task), disable=not progress, unit="eval", dynamic_ncols=True) as bar:

        def tick(text: str) -> None:
            bar.set_postfix_str(text, refresh=False)
            bar.update()

        workers = Workers(executor, task.batch, goes_on="resume=True (--resume)", say=bar.set_postfix_str)
        try:
            return search(task, Runner(journal, workers, tick))
        finally:
            workers.close()


def _source(task: Task) -> str:
    sequence = f"{'x'.join(map(str, task.grid))} tokens"
    if task.text_before or task.text_after:
        sequence += f" with {task.text_before} text tokens before and {task.text_after} after"
    kinds = []
    if task.captures:
        heads = sum(capture.heads for capture in task.captures)
        kinds.append(f"{heads} heads of {task.head_dim} captured in {len(task.captures)} runs of a model")
    if drawn := [proxy for proxy in task.proxies if proxy != "captured"]:
        kinds.append(
            f"the {' and '.join(drawn)} proxy, {task.heads} heads of {task.head_dim}, seeds {list(task.seeds)}"
        )
    return f"search on {' and '.join(kinds)}, {sequence}, target sparsity {task.sparsity:g}, {len(REGIMES)} regimes"
