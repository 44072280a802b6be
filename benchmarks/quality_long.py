"""Clips longer than those of the training: loops, flicker, likeness to real clips, by method, without and with RIFLEx.

    python benchmarks/quality_long.py                                      # the shipped model: 16, 32 and 64 frames
    python benchmarks/quality_long.py --checkpoint FOLDER --name tiny64 --block 64 --times 1 2 --steps 6

Methods: dense; LVSA's pattern by both rules; Radial Attention's nearest mask (research hook); ours, columns in time
chosen by error with covariances. Radial and ours aim at the share that "lvsa exact" skips, mean keys and covariances
counted; at 0.8 where that is dense. All denoising steps sparse, no guidance, the same prompts and noise for all. Real
clips have the trained length; the Frechet distance looks at 4 frames at a time, and few clips bias it upwards. Written
after each row: RESULTS/long_NAME.json and .md.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dynamicrad_compile.models.riflex import riflex
from dynamicrad_compile.plans.layout import Layout
from dynamicrad_compile.plans.patterns.lvsa import key_frame_interval, lvsa_plan
from dynamicrad_compile.profiles.parameters import LVSA
from dynamicrad_compile.quality import Dense, consistency, flicker, frechet_distance, loop_score, method, motion
from dynamicrad_compile.quality.harness import write_json
from dynamicrad_compile.quality.methods import Compiled
from dynamicrad_compile.quality.subject import Subject
from dynamicrad_compile.quality.tiny_video import data
from dynamicrad_compile.quality.tiny_video.model import CHECKPOINT, load, sample, size_of
from dynamicrad_compile.quality.tiny_video.subject import prompts, subject
from dynamicrad_compile.quality.vqeval import vqeval_loop

RESULTS = Path(__file__).resolve().parent / "results"
METHODS = ("dense", "lvsa published", "lvsa exact", "radial", "ours")
BOXES = {16: (16, 1, 1), 64: (16, 2, 2)}
PAID = {16: 0.08, 64: 0.03}
"""Share of dense attention, about, that mean keys and covariances take: ours is asked for as much more."""


def longer(checkpoint: Path, steps: int, times: int) -> Subject:
    """The tiny model at so many times the trained frames."""
    found = subject(checkpoint, steps=steps, guidance_scale=1.0)
    text, size = load(checkpoint)[1], size_of(checkpoint)
    frames, height, width = found.grid

    def generate(model: Any, prompts: Sequence[str], seeds: Sequence[int]) -> torch.Tensor:
        video = sample(model, text, prompts, seeds[0], frames * times, steps, 1.0, (size, size))
        return (video.transpose(1, 2) + 1) / 2

    return replace(found, generate=generate, grid=(frames * times, height, width))


def made(name: str, video: Subject, block: int, trained: int) -> Any:
    """The method of a row."""
    if name == "dense":
        return Dense()
    if name.startswith("lvsa"):
        options = {"pattern": "lvsa", "rule": name.split()[1], "reference_frames": trained, "block_size": block}
        return Compiled(name, 0.0, {"profile": "default", "dense_steps": 0, "dense_layers": 0, **options})
    exact = LVSA(reference_frames=trained, rule="exact")
    plans = [
        lvsa_plan(Layout(video.grid, block), exact.model_copy(update={"step": step}))
        for step in range(key_frame_interval(video.grid[0], exact))
    ]
    sparsity = round(sum(plan.sparsity for plan in plans) / len(plans), 3) or 0.8
    if name == "radial":
        return method("radial", video, sparsity, block)
    options = {"rank": "error", "covariance": True, "box": BOXES[block], "dense_steps": 0, "dense_layers": 0}
    return method("dynamic_threshold", video, sparsity + PAID[block], block, compensate=1.0, regime="mid", **options)


def scores(clips: torch.Tensor, real: torch.Tensor) -> dict[str, float]:
    """The mean of each score over the clips."""
    loops = loop_score(clips).score.double()
    return {
        "loop": float(loops.mean()),
        "loop_error": float(loops.std() / len(loops) ** 0.5) if len(loops) > 1 else math.nan,
        "vqeval": float(vqeval_loop(clips).score.mean()),
        "flicker": float(flicker(clips).nanmean()),
        "consistency": float(consistency(clips).mean()),
        "motion": float(motion(clips).mean()),
        "frechet_real": float(frechet_distance(clips, real)),
    }


def page(found: dict[str, Any]) -> str:
    """The results as a Markdown table."""
    lines = [f"# Longer clips: {found['subject']}", "", found["about"], ""]
    lines += [
        "| frames | RIFLEx | method | skipped | loop score, ours | standard error | VQeval's formulas | flicker "
        "| consistency | motion | Frechet to real | s a clip |",
        "|-|-|-|-|-|-|-|-|-|-|-|-|",
    ]
    for row in found["rows"]:
        lines.append(
            f"| {row['frames']} | {'yes' if row['riflex'] else 'no'} | {row['method']} | {row['skipped']:.1%} | "
            f"{row['loop']:.1f} | {row['loop_error']:.1f} | {row['vqeval']:.1f} | {row['flicker']:.2f} | "
            f"{row['consistency']:.3f} | {row['motion']:.4f} | {row['frechet_real']:.3f} | {row['seconds']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Make the rows that are not there yet; returns what is written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--name", default="tiny", help="of the results' files (tiny)")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--block", type=int, choices=(16, 64), default=16)
    parser.add_argument("--times", type=int, nargs="+", default=[1, 2, 4], help="the trained length (1 2 4)")
    parser.add_argument("--prompts", type=int, default=3, help="low, mid and high motion in turn (3)")
    parser.add_argument("--steps", type=int, default=8, help="denoising steps (8)")
    parser.add_argument("--only", nargs="+", choices=METHODS, default=METHODS, help="methods (all)")
    args = parser.parse_args(argv)
    file = args.results / f"long_{args.name}.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"rows": []}
    base = longer(args.checkpoint, args.steps, 1)
    assert base.real is not None
    real, trained, said = base.real(max(60, args.prompts)), data.FRAMES, prompts(args.prompts)
    found["subject"] = base.name
    command = f"python benchmarks/quality_long.py --name {args.name} --prompts {args.prompts} --steps {args.steps}"
    found["about"] = (
        f"`{command}`: all steps sparse, no guidance, blocks of {args.block}; trained on {trained} frames. Means over "
        "clips. Seconds are of one core, compilation included; the share skipped counts mean keys and covariances."
    )
    cases = [(t, rope, name) for t in args.times for rope in (False, True)[: 1 + (t > 1)] for name in args.only]
    for times, rope, name in tqdm(cases, unit="row"):
        key = {"frames": trained * times, "riflex": rope, "method": name}
        if any(all(old[part] == value for part, value in key.items()) for old in found["rows"]):
            continue
        video = longer(args.checkpoint, args.steps, times)
        started = time.perf_counter()
        changed = riflex(video.model, trained * times, trained) if rope else nullcontext()
        with changed, made(name, video, args.block, trained).run(video) as run:
            clips = torch.cat([video.generate(run.model, [p], [seed]) for seed, p in enumerate(said)])
            skipped = run.sparsity()
        seconds = (time.perf_counter() - started) / len(said)
        found["rows"].append({**key, "skipped": skipped, "seconds": seconds, **scores(clips, real)})
        write_json(file, found)
        file.with_suffix(".md").write_text(page(found), encoding="utf-8")
    print(page(found))
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
