"""Schedules of sparsity against a constant one of equal mean, and runs of few steps.

    python benchmarks/quality_schedules.py                                     # tuned at 20 steps and at 4
    python benchmarks/quality_schedules.py --steps 4 --budget 16

A run is cut into stages (a quarter each, or a step each at 4 steps). Nevergrad looks for the sparsities of the stages
whose mean over the run is that of the constant one and whose clips are nearest to the dense ones, on its own prompts;
the best one, some simple ones (dense first, falling, rising) and the constant one are then compared on others. Method:
the default profile's (columns, by error, covariances), all steps sparse, no guidance. RMSE of clips in 0..1 to dense.
What was really skipped is printed: covariances are paid for in each sparse stage, and rows always read some blocks.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from dynamicrad_compile.optional import optional
from dynamicrad_compile.quality import Dense, rmse
from dynamicrad_compile.quality.harness import make_clips, write_json
from dynamicrad_compile.quality.methods import Compiled
from dynamicrad_compile.quality.tiny_video.model import CHECKPOINT
from dynamicrad_compile.quality.tiny_video.subject import prompts, subject

RESULTS = Path(__file__).resolve().parent / "results"
COLUMNS = {16: (16, 1, 1), 64: (16, 2, 2)}
STAGES = 4
MOST = 0.97


def with_mean(shape: np.ndarray, mean: float) -> list[float]:
    """Sparsities in 0..MOST of this shape, shifted until their mean is the wanted one."""
    low, high = -2.0, 2.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if np.clip(shape + middle, 0.0, MOST).mean() < mean else (low, middle)
    return [round(float(x), 4) for x in np.clip(shape + low, 0.0, MOST)]


def simple(mean: float) -> dict[str, list[float]]:
    """Schedules that need no search; each has the same mean."""
    slope = np.linspace(-0.5, 0.5, STAGES)
    return {
        "constant": [mean] * STAGES,
        "first stage dense": with_mean(np.array([-9.0, 0, 0, 0]), mean),
        "rising": with_mean(slope * 0.6, mean),
        "rising steeply": with_mean(slope * 1.2, mean),
        "falling": with_mean(-slope * 0.6, mean),
    }


def method(values: list[float], block: int, steps: int) -> Compiled:
    """The default profile's method under a schedule."""
    schedule = [(n / STAGES, value) for n, value in enumerate(values)]
    options = {
        "profile": "default", "regime": "mid", "mode": "dynamic_threshold", "rank": "error", "block_size": block,
        "box": COLUMNS[block], "compensate": 1.0, "covariance": True, "sparsity": schedule, "steps": steps,
    }  # fmt: skip
    return Compiled("schedule " + " ".join(f"{value:.2f}" for value in values), float(np.mean(values)), options)


def off(video: Any, item: Compiled, said: list[str], which: slice, clips: Path) -> tuple[torch.Tensor, float]:
    """RMSE to dense of some prompts' clips, and what was skipped."""
    seeds = list(range(len(said)))[which]
    dense, _, _ = make_clips(video, Dense(), said[which], seeds, clips, 3)
    got, skipped, _ = make_clips(video, item, said[which], seeds, clips, 3)
    return rmse(got, dense), skipped


def page(found: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [f"# Schedules of sparsity: {found['subject']}", "", found["about"], ""]
    for steps in dict.fromkeys(row["steps"] for row in found["rows"]):
        lines += [f"## {steps} steps", ""]
        lines += ["| schedule | stages | RMSE | standard error | against constant | skipped |", "|-|-|-|-|-|-|"]
        rows = [row for row in found["rows"] if row["steps"] == steps]
        constant = next(row for row in rows if row["name"] == "constant")
        for row in sorted(rows, key=lambda row: row["rmse"]):
            change = np.array(row["each"]) - np.array(constant["each"])
            error = change.std(ddof=1) / len(change) ** 0.5
            values = ", ".join(f"{value:.2f}" for value in row["values"])
            lines.append(
                f"| {row['name']} | {values} | {row['rmse']:.4f} | {row['error']:.4f} "
                f"| {change.mean():+.4f} ± {error:.4f} | {row['skipped']:.1%} |"
            )
        lines.append("")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Tune and compare; returns what is written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--name", default="tiny", help="of the results' files (tiny)")
    parser.add_argument("--output", type=Path, default=Path("outputs/schedules"), help="clips")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--block", type=int, choices=list(COLUMNS), default=16)
    parser.add_argument("--sparsity", type=float, default=0.8, help="mean over a run (0.8)")
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 4], help="denoising steps (20 4)")
    parser.add_argument("--prompts", type=int, default=9, help="to compare on (9); the tuner has 3 others")
    parser.add_argument("--budget", type=int, default=16, help="schedules that the tuner tries (16)")
    args = parser.parse_args(argv)
    ng = optional("nevergrad", "tuning schedules needs", "tune")
    file = args.results / f"schedules_{args.name}.json"
    found: dict[str, Any] = {"rows": []}
    said = prompts(args.prompts + 3)
    clips = args.output / "clips"
    for steps in args.steps:
        video = subject(args.checkpoint, steps=steps, guidance_scale=1.0)
        found["subject"] = video.name.split(",")[0]
        found["about"] = (
            f"`python benchmarks/quality_schedules.py --name {args.name} --prompts {args.prompts}`: mean "
            f"{args.sparsity}, tuned on 3 others in {args.budget} trials; blocks of {args.block}; torch "
            f"{torch.__version__}, CPU."
        )

        tuning, rest = slice(args.prompts, args.prompts + 3), slice(0, args.prompts)
        space = ng.p.Array(init=np.zeros(STAGES), lower=-1.0, upper=1.0)
        space.random_state.seed(0)
        optimizer = ng.optimizers.registry["OnePlusOne"](space, budget=args.budget)
        best = (float("inf"), [args.sparsity] * STAGES)
        for _ in tqdm(range(args.budget), desc=f"tuning at {steps} steps", unit="schedule"):
            candidate = optimizer.ask()
            values = with_mean(candidate.value, args.sparsity)
            loss = float(off(video, method(values, args.block, steps), said, tuning, clips)[0].mean())
            optimizer.tell(candidate, loss)
            best = min(best, (loss, values))
        for name, values in {**simple(args.sparsity), "tuned": best[1]}.items():
            each, skipped = off(video, method(values, args.block, steps), said, rest, clips)
            row = {"steps": steps, "name": name, "values": values, "rmse": float(each.mean()), "skipped": skipped}
            error = float(each.std() / len(each) ** 0.5)
            found["rows"].append({**row, "error": error, "each": [round(float(x), 5) for x in each]})
        write_json(file, found)
        file.with_suffix(".md").write_text(page(found), encoding="utf-8")
    print(page(found))
    print(json.dumps({"written": str(file)}))
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
