"""AdaSpa's claim, on a trained tiny model: do patterns and log-sum-exps hold from one denoising step to the next?

    python benchmarks/quality_drift.py --picture drift.png

A dense run is watched. At each step every head's blocks are searched exactly, once with the step's own log-sum-exp
(LSE) and once with that of an earlier search. Printed, and drawn:

    recall of old blocks   share of a head's attention at step t in the blocks that were best at step s, over the share
                           in the blocks that are best at t: 1 means nothing is lost by not searching again
    recall of old LSEs     the same for blocks chosen at t with the LSE of s: what a cached LSE costs a later search
    LSE drift              root mean square of lse_t - lse_s over the standard deviation of lse_t between queries
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynamicrad_compile.models.hook import Place, attention_hook
from dynamicrad_compile.quality.harness import write_json
from dynamicrad_compile.quality.pictures import save_figure
from dynamicrad_compile.quality.tiny_video.model import CHECKPOINT
from dynamicrad_compile.quality.tiny_video.subject import prompts, subject
from dynamicrad_compile.reporting.figure import new_figure

RESULTS = Path(__file__).resolve().parent / "results"


class Watch:
    """Keeps, of every site and step, the mean mass of blocks, the LSE and, of the mass, what old LSEs would give."""

    def __init__(self, block: int, sparsity: float) -> None:
        self.block, self.sparsity = block, sparsity
        self.seen: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self.scores: dict[tuple[int, int], Tensor] = {}

    def __call__(self, place: Place, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> None:
        scores = q[0].float() @ k[0].float().mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        lse = scores.logsumexp(-1)
        self.scores[place.site, place.step] = _by_query_block(scores, self.block)
        self.seen[place.site, place.step] = self.mass(place.site, place.step, lse), lse

    def mass(self, site: int, step: int, lse: Tensor) -> Tensor:
        """fp32 [H, M, M]: mass of blocks at a step, by some step's LSE [H, S]."""
        logs = self.scores[site, step]
        weight = (logs - lse[..., None]).exp()
        return weight.unflatten(1, (-1, self.block)).sum(2)

    def best(self, mass: Tensor) -> Tensor:
        """bool [H, M, M]: the best blocks of each head."""
        flat = mass.flatten(1)
        number = round((1 - self.sparsity) * flat.shape[1])
        return torch.zeros_like(flat, dtype=torch.bool).scatter_(1, flat.topk(number).indices, True).view(mass.shape)


def _by_query_block(scores: Tensor, block: int) -> Tensor:
    """fp32 [H, S, M]: log of the sum of exp(score) over the keys of each block."""
    return scores.unflatten(-1, (-1, block)).logsumexp(-1)


def drift(watch: Watch, sites: int, steps: int) -> dict[str, list[list[float]]]:
    """The three tables [from step s][at step t], t >= s, means over sites and heads."""
    names = ("blocks", "lse_blocks", "lse")
    tables = {name: [[float("nan")] * steps for _ in range(steps)] for name in names}
    for t in range(steps):
        for s in range(t + 1):
            rows: dict[str, list[float]] = {name: [] for name in names}
            for site in range(sites):
                mass, lse = watch.seen[site, t]
                old_mass, old_lse = watch.seen[site, s]
                top = (mass * watch.best(mass)).sum((1, 2))
                rows["blocks"].append(float(((mass * watch.best(old_mass)).sum((1, 2)) / top).mean()))
                chosen = watch.best(watch.mass(site, t, old_lse))
                rows["lse_blocks"].append(float(((mass * chosen).sum((1, 2)) / top).mean()))
                rows["lse"].append(float(((lse - old_lse).square().mean(1).sqrt() / lse.std(1)).mean()))
            for name in names:
                tables[name][s][t] = sum(rows[name]) / sites
    return tables


def picture(found: dict[str, Any], path: Path) -> None:
    """The three tables as heat maps."""
    made, axes = new_figure(f"{found['subject']}: what an earlier step still knows", (13.0, 4.0), 1, 3, "eval")
    recalls = ("recall of the blocks of step s at step t", "recall with the LSE of step s at step t")
    titles = (*recalls, "LSE drift from s to t")
    for axis, name, title in zip(axes, ("blocks", "lse_blocks", "lse"), titles, strict=True):
        shown = axis.imshow(found["tables"][name], origin="lower", cmap="viridis")
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("t, step it is used at")
        axis.set_ylabel("s, step it is from")
        made.colorbar(shown, ax=axis, shrink=0.8)
    save_figure(made, path)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Watch dense runs; returns what is written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--name", default="tiny", help="of the results' file (tiny)")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--picture", type=Path, help="where to draw it")
    parser.add_argument("--block", type=int, default=16, help="tokens of a block (16)")
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--prompts", type=int, default=3, help="low, mid and high motion in turn (3)")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps (20)")
    args = parser.parse_args(argv)
    video = subject(args.checkpoint, steps=args.steps, guidance_scale=1.0)
    sites, sums = len(video.model.blocks), None
    for number, prompt in enumerate(prompts(args.prompts)):
        watch = Watch(args.block, args.sparsity)
        with torch.no_grad(), attention_hook(video.model, video.tokens, watch):
            video.generate(video.model, [prompt], [number])
        one = {name: torch.tensor(table) for name, table in drift(watch, sites, args.steps).items()}
        sums = one if sums is None else {name: sums[name] + one[name] for name in one}
    assert sums is not None
    tables = {name: (table / args.prompts).tolist() for name, table in sums.items()}
    shown = {name: [[None if x != x else round(x, 4) for x in row] for row in table] for name, table in tables.items()}
    about = f"blocks of {args.block}, {args.sparsity:.0%} sparse, {args.prompts} prompts, {args.steps} steps, raster"
    found = {"subject": video.name, "about": about, "tables": tables}
    write_json(args.results / f"drift_{args.name}.json", {**found, "tables": shown})
    for name, table in tables.items():
        early = [max(1, args.steps // 10), args.steps // 2]
        for s in early:
            shown_at = (s, min(s + 1, args.steps - 1), args.steps * 3 // 4, args.steps - 1)
            late = {f"{t}": round(table[s][t], 3) for t in shown_at}
            print(f"{name:10s} from step {s}: at step {json.dumps(late)}")
    if args.picture:
        picture(found, args.picture)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
