"""How much attention the blocks hold that a search finds at few steps, and those that are chosen anew at every step.

    python benchmarks/quality_recall.py                                                    # the shipped model
    python benchmarks/quality_recall.py --checkpoint .../checkpoint64 --name tiny64 --block 64 --prompts 1 --steps 8

A dense run is watched: at each step every choice is made on the true queries and keys of every head of every layer, and
nothing that it does is fed back. All keep as many blocks as the pooled one. In raster order and in the default
profile's columns:

    searched at every step    the blocks with most attention, a head's rows sharing its budget: no choice has more
    AdaSpa                    the same, found at two steps (a fifth and three fifths of the run; the second with the
                              log-sum-exp of the first) and read until the next; dense before the first
    pooled                    what `select_blocks` keeps by the mass of mean queries and keys, as compiled
    by error                  the same by expected error
    ..., by exact error       searched by a block's attention less what its mean key would give

Recall is the share of a head's attention in the kept blocks. Errors are those of the output, relative: with nothing in
the place of dropped blocks, and with their means and covariances. Means over heads, layers, prompts, and the steps
after the first search.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from dynamicrad_compile.kernels import search_cpu
from dynamicrad_compile.kernels.search_arguments import Search
from dynamicrad_compile.models.hook import Place, attention_hook
from dynamicrad_compile.plans.make import make_candidates
from dynamicrad_compile.plans.order import reordered
from dynamicrad_compile.plans.plan import Candidates
from dynamicrad_compile.plans.ratios import ratios_for
from dynamicrad_compile.plans.selection import select_blocks
from dynamicrad_compile.policy import CANDIDATE_FACTOR
from dynamicrad_compile.quality.blocks import masked_attention, oracle_mask
from dynamicrad_compile.quality.harness import write_json
from dynamicrad_compile.quality.tiny_video.model import CHECKPOINT
from dynamicrad_compile.quality.tiny_video.subject import prompts, subject

RESULTS = Path(__file__).resolve().parent / "results"
COLUMNS = {16: (16, 1, 1), 64: (16, 2, 2)}
Kept = tuple[Tensor, Tensor, Tensor]
"""What the last search left at a site: log-sum-exps [B, H, S], and its blocks by mass and by error."""


class Watch:
    """Makes all choices at each call of each site, and keeps what they hold.

    found: (order, choice) -> rows of (step, recall, error of dropping, error with second order, share of blocks kept).
    """

    def __init__(self, grid: tuple[int, int, int], block: int, sparsity: float, searches: tuple[int, int]) -> None:
        self.block, self.sparsity, self.searches = block, sparsity, searches
        self.candidates = {name: self._candidates(grid, box) for name, box in _boxes(block).items()}
        self.kept: dict[tuple[str, int], Kept] = {}
        self.found: dict[tuple[str, str], list[tuple[float, ...]]] = defaultdict(list)

    def _candidates(self, grid: tuple[int, int, int], box: Any) -> tuple[Candidates, float, float]:
        wide = max(0.0, 1.0 - CANDIDATE_FACTOR * (1.0 - self.sparsity))
        made = make_candidates(grid, self.block, profile="default", regime="mid", sparsity=wide, box=box, compensate=0)
        return made, *ratios_for(made, self.sparsity, 0.0)

    def __call__(self, place: Place, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> None:
        for name, (candidates, near, far) in self.candidates.items():
            order = candidates.plan.order
            asked, keys, values = (x if order is None else reordered(x, order) for x in (q, k, v))
            chosen = {
                rank: select_blocks(q, k, candidates, (near, far), "ratio", scale, rank=kind).block_mask()
                for rank, kind in (("pooled", "mass"), ("by error", "error"))
            }
            factor = q.shape[-1] ** -0.5 if scale is None else scale
            self._compare(name, place, (asked, keys, values), factor, chosen)

    def _compare(
        self, name: str, place: Place, qkv: tuple[Tensor, Tensor, Tensor], scale: float, chosen: dict[str, Tensor]
    ) -> None:
        q, k, v = qkv
        scores = q @ k.mT * scale
        lse = scores.logsumexp(-1)
        mass, error = self.masses(q, k, lse, scale)
        budget = max(mass.shape[-1], round(float(chosen["pooled"].sum((-1, -2)).double().mean())))
        exact = {"searched at every step": oracle_mask(mass, budget)}
        exact["searched, by exact error"] = oracle_mask(error, budget)
        chosen = {**exact, **chosen}
        kept = self.kept.get((name, place.site))
        if kept is not None and place.step > self.searches[0]:
            chosen |= {"AdaSpa": kept[1], "AdaSpa, by exact error": kept[2]}
        if place.step in self.searches:
            old_lse = lse if kept is None or place.step == self.searches[0] else kept[0]
            mass_then, error_then = self.masses(q, k, old_lse, scale)
            self.kept[name, place.site] = old_lse, oracle_mask(mass_then, budget), oracle_mask(error_then, budget)
        if place.step <= self.searches[0]:
            return
        dense, total = scores.softmax(-1) @ v, mass.sum((-1, -2))
        for choice, mask in chosen.items():
            recall = float(((mass * mask).sum((-1, -2)) / total).mean())
            errors = []
            for weight in (0.0, 1.0):
                out = masked_attention(q, k, v, mask, self.block, weight, scale, covariance=weight > 0)
                errors.append(float(((out - dense).norm(dim=(-1, -2)) / dense.norm(dim=(-1, -2))).mean()))
            share = float(mask.double().mean())
            self.found[name, choice].append((place.step, recall, *errors, share))

    def masses(self, q: Tensor, k: Tensor, lse: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """fp32 [B, H, M, M] each: attention of blocks by some log-sum-exps [B, H, S]; the same less their means'."""
        rows = -(-q.shape[2] // self.block)
        none = torch.zeros(1, 1, rows, dtype=torch.int32), torch.zeros(1, 1, rows, 0, dtype=torch.int32)
        return search_cpu.scores(Search(q, k, lse, *none, 0.0, 1.0, scale, self.block, self.block, None, "error"))


def _boxes(block: int) -> dict[str, Any]:
    return {"raster": "raster", "columns": COLUMNS[block]}


def page(found: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = [f"# Recall: {found['subject']}", "", found["about"], ""]
    lines += ["| order | choice | blocks kept | recall | worst step | error, dropped | error, covariances |"]
    lines += ["|-|-|-|-|-|-|-|"]
    for row in found["rows"]:
        lines.append(
            f"| {row['order']} | {row['choice']} | {row['kept']:.1%} | {row['recall']:.3f} | {row['worst']:.3f} "
            f"(step {row['worst_step']}) | {row['dropped']:.3f} | {row['second_order']:.3f} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Watch dense runs; returns what is written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--name", default="tiny", help="of the results' files (tiny)")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--block", type=int, choices=list(COLUMNS), default=16)
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--prompts", type=int, default=3, help="low, mid and high motion in turn (3)")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps (20)")
    args = parser.parse_args(argv)
    video = subject(args.checkpoint, steps=args.steps, guidance_scale=1.0)
    watch = Watch(video.grid, args.block, args.sparsity, (args.steps // 5, args.steps * 3 // 5))
    for number, prompt in enumerate(tqdm(prompts(args.prompts), unit="clip")):
        with torch.no_grad(), attention_hook(video.model, video.tokens, watch):
            video.generate(video.model, [prompt], [number])
    rows = []
    for (order, choice), seen in watch.found.items():
        by_step = {step: [row[1] for row in seen if row[0] == step] for step in sorted({row[0] for row in seen})}
        worst, at = min((sum(found) / len(found), step) for step, found in by_step.items())
        recall, dropped, second, kept = (float(x) for x in torch.tensor(seen).double().mean(0)[1:])
        row = {"order": order, "choice": choice, "kept": kept, "recall": recall, "worst": worst, "worst_step": int(at)}
        rows.append({**row, "dropped": dropped, "second_order": second})
    about = (
        f"`python benchmarks/quality_recall.py --name {args.name} --prompts {args.prompts} --steps {args.steps}`: "
        f"{args.sparsity:.0%} of the blocks of {args.block} dropped; torch {torch.__version__}, CPU."
    )
    found = {"subject": video.name, "about": about, "rows": rows}
    write_json(args.results / f"recall_{args.name}.json", found)
    (args.results / f"recall_{args.name}.md").write_text(page(found), encoding="utf-8")
    print(page(found))
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
