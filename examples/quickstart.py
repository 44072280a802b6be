"""Videos dense and block-sparse, from the same noise, side by side: what `make demo` runs.

    python examples/quickstart.py
    python examples/quickstart.py --sparsity 0.65 --prompt "A red circle bounces quickly on a gray background."

The model is diffusers' WanTransformer3DModel, unchanged, trained on small clips (4,096 tokens); it is shipped with the
package. It goes through torch.compile twice, once with the default backend and once with backend="dynamicrad".
For a checkpoint of your own see examples/wan_pipeline.py.

Writes to outputs/: comparison.webp (dense left, sparse right), comparison.png (one of its frames), mask.png (the blocks
that one head read), report.html.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

import dynamicrad_compile as drad
from dynamicrad_compile.beforehand import output_file, usable_device
from dynamicrad_compile.optional import optional
from dynamicrad_compile.plans.plan import BlockPlan
from dynamicrad_compile.quality.tiny_video import model
from dynamicrad_compile.reporting.plot import plot_mask

CHECKPOINT = model.CHECKPOINT.with_name("checkpoint64")
FRAMES, PATCH = 16, 4
FILES = ["comparison.webp", "comparison.png", "mask.png", "report.html"]
PROMPTS = [
    "A striped yellow square stands still on a blue background.",
    "A red square slides right on a gray background.",
    "A green triangle stands as the camera pans left on a black background.",
    "A blue square flickers quickly on a gray background.",
]
DENSE_STEPS = 4  # a share of one in so many steps, the noisiest, stays dense
OPTIONS = {
    "mode": "dynamic_threshold",  # blocks by what queries and keys say, not by their place alone
    "block_size": 64,
    "box": (16, 2, 2),  # all frames of 2x2 tokens
}


@dataclass
class Run:
    """Videos [prompts, 3, frames, height, width] in -1..1, seconds of each step, arguments of the middle step."""

    videos: Tensor
    seconds: list[float]
    middle: dict[str, Any]

    @property
    def step(self) -> float:
        """Seconds of a usual step, of the last half."""
        return statistics.median(self.seconds[len(self.seconds) // 2 :])

    def compilation(self, first: float) -> float:
        """Seconds that the first step took longer than `first`, what it usually takes."""
        return max(0.0, self.seconds[0] - first)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments, checked as far as can be before anything is loaded."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompt", nargs="+", default=PROMPTS, help="one or more sentences of the model's words")
    parser.add_argument("--sparsity", type=float, default=0.85, help="share of attention that sparse steps skip (0.85)")
    parser.add_argument("--steps", type=int, default=8, help=f"denoising steps, at least {DENSE_STEPS} (8)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (0)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs"))
    args = parser.parse_args(argv)
    if args.steps < DENSE_STEPS:
        parser.error(f"--steps must be at least {DENSE_STEPS}, got {args.steps}")
    try:
        drad.Options(sparsity=args.sparsity)
        usable_device(args.device)
        for module in ("PIL", "diffusers", "safetensors", "rich"):
            optional(module, "the demo needs", "demo")
        for name in FILES:
            output_file(args.output_dir / name)
    except drad.DynamicRadError as error:
        parser.error(str(error))
    return args


def known_words(text: model.TextEncoder, prompts: list[str]) -> None:
    """Raises SystemExit for words that the small model has never seen."""
    unknown = sorted({word for prompt in prompts for word in text.words(prompt)} - set(text.ids))
    if unknown:
        raise SystemExit(
            f"the small model does not know {', '.join(unknown)}; its words are {', '.join(text.ids)}. "
            "examples/wan_pipeline.py takes any sentence, with a checkpoint of Wan."
        )


def generate(name: str, compiled: Callable[..., Any], text: model.TextEncoder, args: argparse.Namespace) -> Run:
    """Videos of all prompts in one batch; a bar shows what is compiled, then the steps."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    seconds: list[float] = []
    middle: dict[str, Any] = {}
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), transient=True) as bar:
        task = bar.add_task(f"{name}: Dynamo captures the model, Inductor compiles it", total=None)

        def timed(**inputs: Any) -> Any:
            if len(seconds) == args.steps // 2:
                middle.update(inputs)
            start = time.perf_counter()
            out = compiled(**inputs)
            if args.device.startswith("cuda"):
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
            if len(seconds) == 1:
                gc.freeze()  # what compiling left behind, some million objects, is not looked through at every step
            bar.update(task, description=f"{name}: steps", total=args.steps, completed=len(seconds))
            return out

        size = model.size_of(CHECKPOINT)
        sizes = {"frames": FRAMES, "size": (size, size), "steps": args.steps, "seed": args.seed}
        videos = model.sample(timed, text, args.prompt, **sizes)
        gc.unfreeze()
    return Run(videos, seconds, middle)


class Watched(torch.fx.Interpreter):
    """Runs a graph node by node and keeps the blocks that it chooses: counts and indices of each attention."""

    chosen: ClassVar[list[tuple[Tensor, Tensor]]] = []

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """The node's own result."""
        out = super().call_function(target, args, kwargs)
        if target is torch.ops.dynamicrad.select_blocks.default:
            self.chosen.append(out[:2])
        return out


@torch._dynamo.register_backend
def watched(gm: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
    """An inner compiler that compiles nothing."""
    return Watched(gm).run


def blocks_read(transformer: torch.nn.Module, options: dict[str, Any], inputs: dict[str, Any]) -> BlockPlan:
    """The blocks that the attention of the middle layer reads for the first prompt, in a step with these inputs.

    The step runs once more, and is watched while it does.
    """
    Watched.chosen.clear()
    with torch.no_grad():
        drad.compile(transformer, **{**options, "dense_steps": 0, "inner": "watched"})(**inputs)
    counts, indices = Watched.chosen[len(Watched.chosen) // 2]
    block = options["block_size"]
    tokens = indices.shape[2] * block
    return BlockPlan(counts[:1].cpu(), indices[:1].cpu(), block, block, tokens, tokens)


def table(runs: dict[str, Run]) -> str:
    """Compile time, a step, and all steps of each run, as lines."""
    usual = {name: run.step for name, run in runs.items()}
    first = usual["dense"]  # the first steps of both runs are dense
    lines = [f"{'':8s} {'compile':>9s} {'a step':>9s} {'all steps':>10s}"]
    for name, run in runs.items():
        compiled = run.compilation(first)
        lines.append(f"{name:8s} {compiled:7.1f} s {usual[name]:7.2f} s {sum(run.seconds) - compiled:8.1f} s")
    return "\n".join(lines)


def decibels(runs: dict[str, Run]) -> list[float]:
    """PSNR of each sparse clip to the dense one, of values from -1 to 1."""
    error = (runs["sparse"].videos - runs["dense"].videos).square().flatten(1).mean(1)
    return (10 * torch.log10(4 / error)).tolist()


def main(argv: list[str] | None = None) -> None:
    """Run both variants, print what was done and what came out, write the files."""
    args = parse(argv)
    transformer, text = model.load(CHECKPOINT, args.device)
    known_words(text, args.prompt)
    dense_steps = args.steps // DENSE_STEPS
    options = {**OPTIONS, "sparsity": args.sparsity, "dense_steps": dense_steps}
    variants = {
        "dense": torch.compile(transformer),
        "sparse": torch.compile(transformer, backend="dynamicrad", options=options),
    }
    tokens = FRAMES * (model.size_of(CHECKPOINT) // PATCH) ** 2
    print(f"{len(args.prompt)} clips of {FRAMES} frames, {tokens:,} tokens each, on {args.device}")
    print(
        f"A sparse step skips {args.sparsity:.0%} of the attention. The first {dense_steps} of {args.steps} steps are "
        f"dense, so that the whole run skips about {args.sparsity * (1 - dense_steps / args.steps):.0%}: the report's "
        "sparsity."
    )
    runs = {}
    for name, compiled in variants.items():
        runs[name] = generate(name, compiled, text, args)
        print(f"{name}: done in {sum(runs[name].seconds):.0f} s, compilation included")
    report = drad.report(variants["sparse"])
    print(f"\n{report}\n\n{table(runs)}\n")
    close = decibels(runs)
    gain = runs["dense"].step / runs["sparse"].step
    print(f"a sparse step is {gain:.2f}x as fast as a dense one")
    for prompt, value in zip(args.prompt, close, strict=True):
        print(f"  {value:4.1f} dB to the dense clip  {prompt}")

    from tiny_video import pictures

    args.output_dir.mkdir(parents=True, exist_ok=True)
    video, still, mask, page = (args.output_dir / name for name in FILES)
    pictures.side_by_side(
        runs["dense"].videos,
        runs["sparse"].videos,
        ("dense", f"sparse: {args.sparsity:.0%} of attention skipped"),
        (args.prompt, [f"{value:.1f} dB to the dense clip" for value in close]),
        (f"{runs['dense'].step:.2f} s a step", f"{runs['sparse'].step:.2f} s a step: {gain:.1f}x"),
        video,
    )
    report.to_html(page)
    plot_mask(blocks_read(transformer, options, runs["sparse"].middle), mask, title="What one head read")
    print("\nwrote", ", ".join(map(str, (video, still, mask, page))))


if __name__ == "__main__":
    main()
