"""Which blocks, chosen how, and what stands for the dropped ones: clips by the compiled backend against dense ones.

    python benchmarks/quality_method.py                                     # the shipped model, blocks of 16 and 64
    python benchmarks/quality_method.py --checkpoint FOLDER --blocks 64     # another one
    python benchmarks/quality_method.py --only "error/covariances" --sparsities 0.9

    python benchmarks/quality_method.py --routed --boxes 16x1x1 --only error/covariances    # and by regime

Every row is one setting of the options box, rank, compensate, covariance and sparsity: all denoising steps sparse, no
guidance, prompts of low, mid and high motion in turn, the same noise for all. Radial Attention's nearest mask runs in
the same table, by the research hook. With --routed each box has a second row: a router fitted on the model's own
captions gives low motion fewer blocks and high motion more, in the mean as many (GRADES). RMSE of clips in 0..1 to the
dense clips, mean over prompts and by regime.

Written after each row: RESULTS/method_NAME.json and .md; clips that are in --output are not made again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import dynamicrad_compile as drad
from dynamicrad_compile.quality import Dense, method, rmse
from dynamicrad_compile.quality.harness import make_clips, write_json
from dynamicrad_compile.quality.methods import Compiled
from dynamicrad_compile.quality.tiny_video import data
from dynamicrad_compile.quality.tiny_video.model import CHECKPOINT, load
from dynamicrad_compile.quality.tiny_video.subject import prompts, subject

RESULTS = Path(__file__).resolve().parent / "results"
REGIMES = ("low", "mid", "high")
BOXES: dict[int, list[Any]] = {
    16: ["raster", (1, 4, 4), (2, 2, 4), (4, 2, 2), (16, 1, 1)],
    64: ["raster", (1, 8, 8), (4, 4, 4), (8, 2, 4), (16, 2, 2)],
    128: ["raster", (4, 4, 8), (8, 4, 4), (16, 2, 4)],
}
# name: (rank or None for static_ratio, compensate, covariance)
CHOICES: dict[str, tuple[str | None, float, bool]] = {
    "error/covariances": ("error", 1.0, True),
    "error/means": ("error", 1.0, False),
    "mass/covariances": ("mass", 1.0, True),
    "mass/nothing": ("mass", 0.0, False),
    "place/covariances": (None, 1.0, True),
    "place/nothing": (None, 0.0, False),
}
GRADES = {"low": 1.5, "mid": 1.0, "high": 0.5}
"""What a regime skips more than another: the share that is read, times 1 / GRADE, scaled to the mean of all."""
SETTLED = {
    "profile": "default",
    "regime": "mid",
    "decay_factor": 1.0,
    "sink_frames": 1,
    "dense_steps": 0,
    "dense_layers": 0,
}


def settings(args: argparse.Namespace) -> Iterator[tuple[str, int, float, str, str]]:
    """(what, block, sparsity, box, choice) of every row, the most telling ones first."""
    for block in args.blocks:
        for sparsity in args.sparsities:
            yield "radial", block, sparsity, "raster", "place/nothing"
            for choice in args.only or CHOICES:
                for box in BOXES[block]:
                    name = box if box == "raster" else "x".join(map(str, box))
                    yield "ours", block, sparsity, name, choice
                    if args.routed:
                        yield "routed", block, sparsity, name, choice


def routed(options: dict[str, Any], folder: Path, checkpoint: Path) -> dict[str, Any]:
    """The same options with a router and a profile that grades the share which is read by regime."""
    text = load(checkpoint)[1]
    corpus = [data.clip(1, index) for index in range(600)]
    labelled = [(item.caption, item.regime) for item in corpus]
    router = drad.fit_router(lambda texts: text.encode(list(texts)).detach(), labelled, progress=False)
    router.save(folder / "router.safetensors")
    weights = {name: 1.0 / grade for name, grade in GRADES.items()}
    mean = sum(weights.values()) / len(weights)
    read = {name: (1.0 - options["sparsity"]) * weight / mean for name, weight in weights.items()}
    lines = ["schema = 1", "[profile]", 'name = "graded"', f"block_size = {options['block_size']}"]
    for name in REGIMES:
        lines += [f"[regimes.{name}.static_ratio]", f"sparsity = {1.0 - read[name]:.4f}"]
    (folder / "graded.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    others = {name: value for name, value in options.items() if name not in ("sparsity", "regime")}
    return {**others, "profile": str(folder / "graded.toml"), "router": str(folder / "router.safetensors")}


def made(what: str, block: int, sparsity: float, box: str, choice: str, video: Any, args: argparse.Namespace) -> Any:
    """The method of a row."""
    if what == "radial":
        return method("radial", video, sparsity, block)
    rank, compensate, covariance = CHOICES[choice]
    options: dict[str, Any] = {
        **SETTLED,
        "sparsity": sparsity,
        "block_size": block,
        "box": box if box == "raster" else tuple(map(int, box.split("x"))),
        "mode": "static_ratio" if rank is None else "dynamic_threshold",
        "compensate": compensate,
        "covariance": covariance,
    }
    if rank is not None:
        options["rank"] = rank
    if what == "routed":
        options = routed(options, args.output, args.checkpoint)
    return Compiled(f"{box} {choice} {what}", sparsity, options)


def page(found: dict[str, Any]) -> str:
    """The results as Markdown tables, one for each size of blocks and sparsity."""
    lines = [f"# Blocks, choices and what stands for dropped blocks: {found['subject']}", "", found["about"], ""]
    for key in dict.fromkeys((row["block"], row["sparsity"]) for row in found["rows"]):
        rows = [row for row in found["rows"] if (row["block"], row["sparsity"]) == key]
        lines += [
            f"## Blocks of {key[0]} tokens, {key[1]:.0%} skipped, means counted",
            "",
            "| blocks | chosen by / for dropped ones | RMSE | standard error | PSNR, dB | low | mid | high | skipped |",
            "|-|-|-|-|-|-|-|-|-|",
        ]
        for row in sorted(rows, key=lambda row: row["rmse"]):
            name = "Radial Attention" if row["what"] == "radial" else row["choice"].replace("/", " / ")
            name += ", routed" if row["what"] == "routed" else ""
            by = " | ".join(f"{row['by_regime'][regime]:.3f}" for regime in REGIMES)
            lines.append(
                f"| {row['box']} | {name} | {row['rmse']:.4f} | {row['error']:.4f} | {row['psnr']:.1f} | {by} | "
                f"{row['skipped']:.1%} |"
            )
        lines.append("")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Make the rows that are not there yet; returns what is written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--name", default="tiny", help="of the results' files (tiny)")
    parser.add_argument("--output", type=Path, default=Path("outputs/method"), help="clips, and what can be made again")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--blocks", type=int, nargs="+", choices=list(BOXES), default=[16, 64])
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.8, 0.9])
    parser.add_argument("--prompts", type=int, default=9, help="low, mid and high motion in turn (9)")
    parser.add_argument("--steps", type=int, default=10, help="denoising steps (10)")
    parser.add_argument("--only", nargs="+", choices=list(CHOICES), help="choices (all)")
    parser.add_argument("--routed", action="store_true", help="also graded by regime, with a router")
    parser.add_argument("--boxes", nargs="+", help="such as raster 16x1x1 (all)")
    args = parser.parse_args(argv)
    video = subject(args.checkpoint, steps=args.steps, guidance_scale=1.0)
    said, seeds = prompts(args.prompts), list(range(args.prompts))
    file = args.results / f"method_{args.name}.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"rows": []}
    found["subject"] = video.name
    found["about"] = (
        f"`python benchmarks/quality_method.py --name {args.name}`: {'x'.join(map(str, video.grid))} tokens, "
        f"{args.prompts} prompts, {args.steps} steps, all sparse, no guidance; through torch.compile, CPU. "
        "The share skipped counts mean keys and covariances; the budget of blocks counts the means."
    )
    clips = args.output / "clips"
    dense, _, _ = make_clips(video, Dense(), said, seeds, clips, batch=3)
    rows = [row for row in settings(args) if not args.boxes or row[3] in args.boxes or row[0] == "radial"]
    names = ("what", "block", "sparsity", "box", "choice")
    for row in tqdm(rows, unit="row"):
        if any(tuple(old[name] for name in names) == row for old in found["rows"]):
            continue
        got, skipped, _ = make_clips(video, made(*row, video, args), said, seeds, clips, batch=3)
        off = rmse(got, dense).double()
        found["rows"].append(
            {
                **dict(zip(names, row, strict=True)),
                "rmse": float(off.mean()),
                "error": float(off.std() / len(off) ** 0.5),
                "psnr": float(-20 * off.mean().log10()),
                "by_regime": {regime: float(off[i::3].mean()) for i, regime in enumerate(REGIMES)},
                "skipped": skipped,
            }
        )
        write_json(file, found)
        file.with_suffix(".md").write_text(page(found), encoding="utf-8")
    print(page(found))
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
