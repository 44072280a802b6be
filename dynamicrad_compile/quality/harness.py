"""The harness: the same prompts and seeds by every method, and what changed against dense and against real clips."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import DynamicRadError
from ..files import write_file
from ..optional import optional
from .features import WINDOW, feature_distance, frechet_distance
from .frame_features import FrameFeatures, coarse_features, consistency
from .loops import MIN_FRAMES, loop_score
from .making import check_workers, ignore, make_ahead, make_clips
from .methods import Dense, Method
from .metrics import SSIM_PIXELS, flicker, motion, motion_ratio, psnr, rmse, ssim
from .subject import Subject
from .vqeval import enough_frames, vqeval_loop


@dataclass(frozen=True)
class Row:
    """What one method gave; means over the clips, NaN where there is nothing to compare with.

    wanted, sparsity  share of dense attention: asked for, and skipped over the whole run
    rmse, psnr, ssim, feature   against the dense clip of the same prompt and seed
    motion, flicker   of the clips; motion_ratio: energy of frame differences over the dense clip's (median)
    loop, vqeval      our loop and freeze score and VQeval's loop score, 100 is good
    consistency       likeness of frames as VBench has it, 1 is frozen
    frechet_dense, frechet_real  distances of the whole set to the dense clips and to held-out real ones
    clips, seconds    number of clips, and the time to make one on this machine, compilation included
    """

    method: str
    wanted: float
    sparsity: float
    rmse: float
    psnr: float
    ssim: float
    feature: float
    motion: float
    motion_ratio: float
    flicker: float
    loop: float
    vqeval: float
    consistency: float
    frechet_dense: float
    frechet_real: float
    clips: int
    seconds: float


COLUMNS = (
    *("sparsity", "psnr", "ssim", "feature", "flicker", "motion_ratio"),
    *("loop", "vqeval", "consistency", "frechet_dense", "frechet_real"),
)


LACKING = 0.005
"""What was asked for is skipped where no more of it is lacking."""


@dataclass
class Results:
    """Rows in order, dense first, and a row "real" for the held-out clips; `clips` by label, for pictures."""

    subject: str
    prompts: list[str]
    seeds: list[int]
    rows: list[Row]
    clips: dict[str, Tensor]

    def table(self) -> str:
        """The rows as text, aligned; then those that skip less than was asked for."""
        lines = ["  ".join([f"{'method':20s}", *(f"{name:>13s}" for name in COLUMNS)])]
        for row in self.rows:
            numbers = [getattr(row, name) for name in COLUMNS]
            lines.append("  ".join([f"{row.method:20s}", *(_shown(number) for number in numbers)]))
        for row in self.rows:
            if row.sparsity < row.wanted - LACKING:
                lines.append(f"{row.method}: {row.wanted:.3g} was asked for, {row.sparsity:.3g} of the run was skipped")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Plain values; NaN is null."""
        rows = [{k: _rounded(v) for k, v in asdict(row).items()} for row in self.rows]
        return {"subject": self.subject, "prompts": self.prompts, "seeds": self.seeds, "rows": rows}


def evaluate(
    subject: Subject,
    methods: Sequence[Method],
    prompts: Sequence[str],
    folder: str | Path,
    *,
    seeds: int = 1,
    first_seed: int = 0,
    batch: int = 2,
    real: int = 64,
    progress: bool = True,
    features: FrameFeatures = coarse_features,
    fps: float | None = None,
    executor: Any = None,
) -> Results:
    """Make clips of all prompts by every method, dense first, measure them, write FOLDER/results.json.

    seeds   clips of each prompt; clip i of all has seed first_seed + i
    batch   clips that are made together
    real    held-out real clips to compare with, if the subject has any
    features, fps  what frames are compared by, and how VQeval samples them (`vqeval.vqeval_loop`)
    executor  its workers make the clips, a job all those of one method: any with `submit` as concurrent.futures has it.
            They load the subject themselves, so it must have a `source`

    Clips are kept in FOLDER/clips, named by what decides them, so an interrupted evaluation goes on where it was and
    another one with more methods makes only the new ones. Raises DynamicRadError for unusable clips, a subject without
    source where an executor is given, and where no worker comes back with a job; OptionsError for an executor that is
    none.
    """
    tqdm = optional("tqdm", "evaluating needs", "eval").tqdm

    if not prompts or seeds < 1 or batch < 1:
        raise DynamicRadError("an evaluation needs at least one prompt, one seed and a batch of 1.")
    check_workers(executor, subject)
    folder = Path(folder)
    cases = [*prompts] * seeds
    numbers = list(range(first_seed, first_seed + len(cases)))
    everything: list[Method] = [Dense(), *(m for m in methods if not isinstance(m, Dense))]
    seen = partial(_row, features=features, fps=fps)
    made = (cases, numbers, folder / "clips", batch)
    held_out = subject.real(real) if subject.real is not None and real else None
    results = Results(subject.name, list(prompts), numbers, [], {})
    if held_out is not None:
        results.rows.append(seen("real", 0.0, 0.0, held_out, None, held_out, 0.0))
    with tqdm(total=len(everything) * len(cases), disable=not progress, unit="clip", dynamic_ncols=True) as bar:
        if executor is not None:
            make_ahead(executor, subject, everything, *made, bar.update, bar.set_postfix_str)
        for item in everything:
            bar.set_postfix_str(f"{item.name} {item.wanted:g}")
            clips, sparsity, seconds = make_clips(subject, item, *made, bar.update if executor is None else ignore)
            dense = results.clips.setdefault("dense", clips)
            results.clips[_label(item)] = clips
            results.rows.append(seen(item.name, item.wanted, sparsity, clips, dense, held_out, seconds))
            write_json(folder / "results.json", results.to_json())
    return results


def _label(item: Method) -> str:
    return "dense" if isinstance(item, Dense) else f"{item.name} {item.wanted:.0%}"


def _row(
    name: str,
    wanted: float,
    sparsity: float,
    clips: Tensor,
    dense: Tensor | None,
    real: Tensor | None,
    seconds: float,
    *,
    features: FrameFeatures,
    fps: float | None,
) -> Row:
    nan = math.nan
    pair = dict.fromkeys(("rmse", "psnr", "ssim", "feature", "motion_ratio", "frechet_dense"), nan)
    if dense is not None:
        ratio = motion_ratio(clips, dense)
        pair = {
            "rmse": float(rmse(clips, dense).mean()),
            "psnr": float(psnr(clips, dense).mean()),
            "ssim": float(ssim(clips, dense).mean()) if min(clips.shape[-2:]) >= SSIM_PIXELS else nan,
            "feature": float(feature_distance(clips, dense).mean()),
            "motion_ratio": float(ratio.nanmedian()),
            "frechet_dense": _frechet(clips, dense),
        }
    if real is None:
        frechet_real = nan
    elif dense is None:  # real against real: two halves
        half = len(real) // 2
        frechet_real = _frechet(real[:half], real[half : 2 * half])
    else:
        frechet_real = _frechet(clips, real)
    return Row(
        method=name,
        wanted=wanted,
        sparsity=sparsity,
        **pair,
        motion=float(motion(clips).mean()),
        flicker=float(flicker(clips).nanmean()) if clips.shape[1] > 2 else nan,
        loop=float(loop_score(clips).score.mean()) if clips.shape[1] >= MIN_FRAMES else nan,
        vqeval=float(vqeval_loop(clips, features, fps).score.mean()) if enough_frames(clips.shape[1], fps) else nan,
        consistency=float(consistency(clips, features).mean()) if clips.shape[1] > 1 else nan,
        frechet_real=frechet_real,
        clips=len(clips),
        seconds=seconds,
    )


def _frechet(clips: Tensor, reference: Tensor) -> float:
    """The Frechet distance, or nan where there are too few frames for one."""
    least = min(len(x) * (x.shape[1] // WINDOW) for x in (clips, reference))
    return frechet_distance(clips, reference) if least >= 2 else math.nan


def write_json(path: Path, value: Any) -> None:
    """Write JSON in one piece."""
    write_file(path, json.dumps(value, indent=1) + "\n")


def _shown(number: float) -> str:
    return f"{'-':>13s}" if math.isnan(number) else f"{number:13.4g}"


def _rounded(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None
