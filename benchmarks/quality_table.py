"""Every method at equal executed sparsity, all costs counted: one table for a trained tiny model.

    python benchmarks/quality_table.py                                      # the shipped model, 1,024 tokens
    python benchmarks/quality_table.py --checkpoint .../checkpoint64 --name tiny64 --block 64 --prompts 3  # 4,096

Executed sparsity is what `drad.report` counts over the whole run: dense steps, searches, means and covariances are
paid for. Each method's own knob is turned until that is met on one clip; what it then skips is in the table. All run
compiled (inner compiler eager), but for SVG's, which classifies heads by their outputs and has no place in a compiled
graph: it runs by the research hook, its samples counted, and has no time. Radial, DynamicRad and SVG are rewritten from
their papers and code (static masks of blocks); DynamicRad's random choice of tokens is our choice of blocks by place.

Time a step is that of a compiled run after its first clip, on this machine, in this run, on one thread.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from dynamicrad_compile.quality import Dense, flicker, frechet_distance, loop_score, rmse, ssim
from dynamicrad_compile.quality.blocks import masked_attention
from dynamicrad_compile.quality.harness import make_clips, write_json
from dynamicrad_compile.quality.methods import Compiled, Hooked, Run, radial_near
from dynamicrad_compile.quality.pictures import figure, save_figure
from dynamicrad_compile.quality.tiny_video.model import CHECKPOINT
from dynamicrad_compile.quality.tiny_video.subject import prompts, subject

RESULTS = Path(__file__).resolve().parent / "results"
COLUMNS = {16: (16, 1, 1), 64: (16, 2, 2)}
SETTLED = {"profile": "default", "regime": "mid", "dense_layers": 0, "dense_steps": 0}
SAMPLES = 32  # queries by which SVG classifies a head
REACHED = 0.002


def svg(video: Any, sparsity: float, block: int, first: int) -> Hooked:
    """Sparse VideoGen: each head reads by place in the frame or by frame, whichever is nearer on SAMPLES queries."""
    frames, tokens = video.grid[0], video.grid[1] * video.grid[2]
    at = torch.arange(video.tokens)
    blocks = -(-video.tokens // block)
    frame, place = at // tokens, at % tokens
    width = max(1, round((1 - sparsity) * frames / 2))
    spatial = ((frame[:, None] - frame).abs() < width) | (frame[None] == 0)
    near = max(1, round((1 - sparsity) * tokens / 2))
    temporal = ((place[:, None] - place).abs() < near) | (frame[None] == 0)

    def best(wanted: Tensor) -> Tensor:
        """The share 1 - sparsity of the blocks that hold most of the wanted pairs, at least the own one."""
        share = torch.nn.functional.avg_pool2d(wanted.float()[None, None], block, ceil_mode=True)[0, 0]
        share = share + 2 * torch.eye(blocks) + 1e-6 * -(at[:blocks, None] - at[:blocks]).abs()
        kept = torch.zeros_like(share, dtype=torch.bool)
        number = max(blocks, round((1 - sparsity) * blocks * blocks))
        return kept.view(-1).index_fill(0, share.flatten().topk(number).indices, True).view(blocks, blocks)

    kinds = torch.stack([best(spatial), best(temporal)])

    class Classified(Hooked):
        @contextmanager
        def run(self, subject: Any) -> Any:
            from dynamicrad_compile.models.hook import attention_hook

            shares: list[float] = []

            def rule(where: Any, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor | None:
                if where.step < first:
                    shares.append(0.0)
                    return None
                some = torch.randperm(q.shape[2], generator=torch.Generator().manual_seed(0))[:SAMPLES]
                scores = q[:, :, some] @ k.mT * q.shape[-1] ** -0.5
                exact = scores.softmax(-1) @ v
                off = []
                for kind in kinds:
                    seen = kind.repeat_interleave(block, 0).repeat_interleave(block, 1)[some][:, : k.shape[2]]
                    off.append((scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v - exact).square().mean((2, 3)))
                mask = kinds[torch.stack(off).argmin(0)]
                shares.append(1 - float(mask.double().mean()) - 3 * SAMPLES / q.shape[2])
                return masked_attention(q, k, v, mask, block, scale=scale)

            with attention_hook(subject.model, subject.tokens, rule):
                yield Run(subject.model, lambda: sum(shares) / max(1, len(shares)))

    return Classified("SVG-like", sparsity, lambda *_: None, block, key={"first": first, "sparsity": sparsity})


def methods(video: Any, block: int, steps: int) -> dict[str, tuple[str, Callable[[float], Any]]]:
    """name -> (what it does, knob in 0..1 that grows with sparsity -> the method)."""
    early, late = max(1, steps // 10), max(2, steps // 2)
    columns = COLUMNS[block]

    def ours(name: str, **options: Any) -> Callable[[float], Any]:
        return lambda knob: Compiled(name, knob, {**SETTLED, "block_size": block, "sparsity": knob, **options})

    def radial(knob: float) -> Any:
        mask, params = radial_near(video, knob, block)
        return Compiled("Radial", knob, {"plan": mask[0, 0], "block_size": block, "compensate": 0.0}), params

    def lvsa(knob: float) -> Any:
        reads = max(2, round((1 - knob) * video.grid[0]))
        return Compiled(
            "LVSA",
            knob,
            {"pattern": "lvsa", "reference_frames": reads, "window": max(1, reads // 4), "rule": "exact"}
            | {"block_size": block},
        )

    plain = dict(box="raster", compensate=0.0, covariance=False)
    found = dict(box=columns, compensate=1.0, covariance=True)
    search = dict(pattern="adaspa", search_steps=(early, late))
    return {
        "Radial": ("static mask", lambda knob: radial(knob)[0]),
        "SVG-like": ("each head by place or by frame", lambda knob: svg(video, knob, block, early)),
        "DynamicRad static": ("blocks by place, raster", ours("DynamicRad static", mode="static_ratio", **plain)),
        "DynamicRad dynamic": (
            "blocks by pooled mass, raster",
            ours("DynamicRad dynamic", mode="dynamic_threshold", rank="mass", **plain),
        ),
        "LVSA": ("window and rotating frames", lvsa),
        "AdaSpa": ("exact search, raster", ours("AdaSpa", **search, **plain)),
        "AdaSpa, heads differ": (
            "the same, recall threshold 0.8",
            ours("AdaSpa h", **search, **plain, recall_threshold=0.8),
        ),
        "AdaSpa, our blocks": (
            "exact search by error, columns, covariances",
            ours("AdaSpa ours", **search, **found, rank="error"),
        ),
        "ours, static": (
            "by place, columns, covariances",
            ours("ours static", mode="static_ratio", **found),
        ),
        "ours": (
            "by pooled error, columns, covariances",
            ours("ours", mode="dynamic_threshold", rank="error", **found),
        ),
    }


def tuned(make: Callable[[float], Any], video: Any, wanted: float) -> tuple[Any, float]:
    """The method that skips `wanted` of a run, or comes nearest, and its knob."""
    low, high, best = wanted, 0.995, (float("inf"), make(wanted), wanted)
    knob = wanted
    for _ in range(6):
        item = make(knob)
        with torch.no_grad(), item.run(video) as run:
            video.generate(run.model, video.prompts[:1], [0])
            got = run.sparsity()
        best = min(best, (abs(got - wanted), item, knob), key=lambda row: row[0])
        if best[0] < REACHED or knob >= high:
            break
        low = max(low, knob) if got < wanted else low
        high = min(high, knob) if got > wanted else high
        # A run skips at most what its knob says: in proportion, within what is known.
        knob = min(high, max(low * 0.5, knob + (wanted - got) * max(1.0, knob / max(got, 0.1))))
    return best[1], best[2]


def seconds_a_step(item: Any, video: Any, steps: int) -> float | None:
    """Of one clip, after a first one; None by the hook."""
    if isinstance(item, Hooked):
        return None
    with torch.no_grad(), item.run(video) as run:
        video.generate(run.model, video.prompts[:1], [0])
        start = time.perf_counter()
        video.generate(run.model, video.prompts[:1], [0])
        return (time.perf_counter() - start) / steps


def measured(clips: Tensor, dense: Tensor, real: Tensor) -> dict[str, float]:
    """Numbers of a row."""
    off = rmse(clips, dense)
    return {
        "rmse": float(off.mean()),
        "psnr": float(-20 * off.mean().log10()),
        "ssim": float(ssim(clips, dense).mean()),
        "flicker": float(flicker(clips).nanmean()),
        "loop": float(loop_score(clips).score.mean()),
        "frechet": frechet_distance(clips, real),
    }


def page(found: dict[str, Any]) -> str:
    """The results as a Markdown table, best PSNR first."""
    lines = [f"# All methods at equal executed sparsity: {found['subject']}", "", found["about"], ""]
    for wanted in dict.fromkeys(row["wanted"] for row in found["rows"] if row["wanted"]):
        rows = [row for row in found["rows"] if row["wanted"] in (0, wanted)]
        lines += [
            f"## {wanted:.0%} of the run skipped",
            "",
            "| method | what it does | skipped | PSNR to dense, dB | SSIM | flicker | loop score | Frechet to real | "
            "time a step |",
            "|-|-|-|-|-|-|-|-|-|",
        ]
        for row in sorted(rows, key=lambda row: -(row["psnr"] or 0)):
            psnr = "-" if not row["wanted"] else f"{row['psnr']:.1f}"
            seconds = "-" if row["seconds"] is None else f"{1000 * row['seconds']:.0f} ms"
            lines.append(
                f"| {row['method']} | {row['what']} | {row['skipped']:.1%} | {psnr} | {row['ssim']:.3f} | "
                f"{row['flicker']:.2f} | {row['loop']:.1f} | {row['frechet']:.2f} | {seconds} |"
            )
        lines.append("")
    return "\n".join(lines)


def picture(results: Path, path: Path) -> None:
    """PSNR of each method, a panel for each model and sparsity in the results' files."""
    found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(results.glob("table_*.json"))]
    panels = [(one, w) for one in found for w in dict.fromkeys(row["wanted"] for row in one["rows"] if row["wanted"])]
    made, axes = figure(len(panels), "PSNR to the dense clips, dB, all costs counted", height=3.8)
    for axis, (one, wanted) in zip(axes, panels, strict=True):
        rows = sorted((r for r in one["rows"] if r["wanted"] == wanted), key=lambda row: row["psnr"])
        names = [f"{row['method']} ({row['skipped']:.0%})" for row in rows]
        colors = ["#2f9e44" if "our" in row["method"] else "#2a78b5" for row in rows]
        axis.barh(names, [row["psnr"] for row in rows], color=colors)
        axis.set_title(f"{one['tokens']:,} tokens, {wanted:.0%} of the run skipped", fontsize=10)
        axis.tick_params(axis="y", labelsize=8)
    save_figure(made, path)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Make the rows that are not there yet; returns what is written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--name", default="tiny", help="of the results' files (tiny)")
    parser.add_argument("--output", type=Path, default=Path("outputs/table"), help="clips, and what can be made again")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--picture", type=Path, help="where to draw all results there are")
    parser.add_argument("--block", type=int, choices=list(COLUMNS), default=16)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.6], help="of the whole run (0.6)")
    parser.add_argument("--prompts", type=int, default=9, help="low, mid and high motion in turn (9)")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps (20)")
    parser.add_argument("--batch", type=int, default=3, help="clips made together (3)")
    args = parser.parse_args(argv)
    video = subject(args.checkpoint, steps=args.steps, guidance_scale=1.0)
    said, seeds = prompts(args.prompts), list(range(args.prompts))
    assert video.real is not None
    real = video.real(64)
    file = args.results / f"table_{args.name}.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"rows": []}
    found["subject"], found["tokens"] = video.name, video.tokens
    found["about"] = (
        f"`python benchmarks/quality_table.py --name {args.name} --block {args.block} --prompts {args.prompts} "
        f"--steps {args.steps}`: "
        f"{'x'.join(map(str, video.grid))} tokens, blocks of {args.block}, {args.prompts} prompts, {args.steps} steps, "
        f"no guidance, torch {torch.__version__}, {platform.machine()} CPU, one thread."
    )
    clips = args.output / "clips"
    dense, _, _ = make_clips(video, Dense(), said, seeds, clips, args.batch)
    table = methods(video, args.block, args.steps)
    rows = [("dense", 0.0), *((name, wanted) for wanted in args.sparsities for name in table)]
    for name, wanted in tqdm(rows, unit="row"):
        if any((row["method"], row["wanted"]) == (name, wanted) for row in found["rows"]):
            continue
        what, make = table.get(name, ("", lambda knob: Dense()))
        item, knob = (Dense(), 0.0) if name == "dense" else tuned(make, video, wanted)
        got, skipped = dense, 0.0
        if name != "dense":
            got, skipped, _ = make_clips(video, item, said, seeds, clips, args.batch)
        numbers = measured(got, dense, real)
        seconds = seconds_a_step(item, video, args.steps)
        row = {"method": name, "what": what, "wanted": wanted, "knob": knob, "skipped": skipped, "seconds": seconds}
        found["rows"].append({**row, **numbers})
        write_json(file, found)
        file.with_suffix(".md").write_text(page(found), encoding="utf-8")
    print(page(found))
    if args.picture:
        picture(args.results, args.picture)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
