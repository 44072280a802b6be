"""Text-to-video, dense and block-sparse, side by side.

    python examples/quickstart.py                 # the small model that was trained in examples/tiny_video
    python examples/quickstart.py --frames 32 --prompt "A red circle bounces quickly on a gray background."
    python examples/quickstart.py --random        # times at 8,000 tokens: the widths of Wan2.1-1.3B, random weights
    python examples/quickstart.py --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --prompt "A cat on a surfboard"

Nothing in the model is changed: its transformer goes through torch.compile, once with the default backend and once
with backend="dynamicrad".

Writes to outputs/: comparison.webp (dense left, sparse right), mask.png (which blocks are read), report.html.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

import dynamicrad_compile as drad
from dynamicrad_compile.beforehand import output_file, usable_device
from dynamicrad_compile.optional import optional
from dynamicrad_compile.reporting.plot import frame_boundaries, plot_mask

CHECKPOINT = Path(__file__).parent / "tiny_video" / "checkpoint"
FILES = ["comparison.webp", "report.html", "mask.png"]
PROMPTS = [
    "A striped yellow square stands still on a blue background.",
    "A red square slides right on a gray background.",
    "A green triangle stands as the camera pans left on a black background.",
    "A purple circle bounces quickly on a black background.",
]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments; what is left out depends on the model."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", help="folder or hub name of a Wan text-to-video pipeline")
    which.add_argument("--random", action="store_true", help="random weights at the widths of Wan2.1-1.3B")
    parser.add_argument("--prompt", nargs="+", help="one or more, not with --random")
    parser.add_argument("--sparsity", type=float, help="share of blocks to skip (0.6; 0.8 with --model or --random)")
    parser.add_argument("--frames", type=int, help="of the video (16; 81 with --model, 49 with --random: 4 n + 1)")
    parser.add_argument("--height", type=int, help="pixels, a multiple of 16 (480 with --model, 320 with --random)")
    parser.add_argument("--width", type=int, help="pixels, a multiple of 16 (832 with --model, 512 with --random)")
    parser.add_argument("--steps", type=int, help="denoising steps, at least 2 (20; 30 with --model, 4 with --random)")
    parser.add_argument("--layers", type=int, default=2, help="layers of the random transformer (2)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs"))
    args = parser.parse_args(argv)
    small = not (args.model or args.random)
    if small and (args.height or args.width):
        parser.error("--height and --width need --model or --random: the small model draws 32x32 pixels")
    if args.random and args.prompt:
        parser.error("--prompt cannot go with --random, which has no text encoder")
    if args.model and args.prompt and len(args.prompt) > 1:
        parser.error("--model takes one prompt; quote it")
    sizes = {"frames": (16, 49, 81), "height": (32, 320, 480), "width": (32, 512, 832), "steps": (20, 4, 30)}
    for name, defaults in {**sizes, "sparsity": (0.6, 0.8, 0.8)}.items():
        if getattr(args, name) is None:
            setattr(args, name, defaults[0 if small else 2 if args.model else 1])
    if not small and (args.frames % 4 != 1 or args.height % 16 or args.width % 16):
        parser.error("--frames must be 4 n + 1, --height and --width multiples of 16")
    if args.frames < 1:
        parser.error(f"--frames must be at least 1, got {args.frames}")
    if args.steps < 2:
        parser.error("--steps must be at least 2: the first one compiles")
    if args.layers < 1:
        parser.error(f"--layers must be at least 1, got {args.layers}")
    try:
        check(args)
    except drad.DynamicRadError as error:
        parser.error(str(error))
    return args


def check(args: argparse.Namespace) -> None:
    """Raises DynamicRadError for what would stop the run at its end, or before its first step."""
    drad.Options(sparsity=args.sparsity)
    usable_device(args.device)
    optional("PIL", "pictures need", "plot")
    if args.model or args.random:
        optional("diffusers", "--model and --random need", "diffusers")
    for name in FILES:
        output_file(args.output_dir / name)


class SmallModel:
    """The model trained in examples/tiny_video: 16 frames of 32x32 pixels are 1,024 tokens."""

    def __init__(self, args: argparse.Namespace) -> None:
        from dynamicrad_compile.quality.tiny_video import model

        self.args, self.prompts = args, args.prompt or PROMPTS
        self.transformer, self.text = model.load(CHECKPOINT, args.device)
        words = {word for prompt in self.prompts for word in self.text.words(prompt)}
        if unknown := sorted(words - set(self.text.ids)):
            known = ", ".join(self.text.ids)
            raise SystemExit(f"the small model does not know {', '.join(unknown)}; its words are {known}.")
        self.tokens = args.frames * (args.height // 4) * (args.width // 4)
        # As small as blocks can be: with 1,024 tokens there are only 64 of this size.
        self.dense_steps = args.steps // 5
        self.options = {"min_tokens": 0, "block_size": 16, "mode": "dynamic_threshold"}
        self.options["dense_steps"] = self.dense_steps

    def generate(self, compiled: Any) -> tuple[torch.Tensor, list[float]]:
        """Videos [prompts, 3, frames, height, width] in -1..1 and the seconds of each step."""
        from dynamicrad_compile.quality.tiny_video import model

        ends = [time.perf_counter()]

        def timed(timesteps: Any) -> Iterator[Any]:
            for timestep in timesteps:
                yield timestep
                synchronise(self.args.device)
                ends.append(time.perf_counter())

        sizes = {"frames": self.args.frames, "steps": self.args.steps, "seed": self.args.seed}
        videos = model.sample(compiled, self.text, self.prompts, **sizes, progress=timed)
        return videos, [end - begin for begin, end in pairwise(ends)]

    def compare(self, results: dict[str, torch.Tensor]) -> None:
        """Print how far apart the videos are, and what this run can't show."""
        error = (results["sparse"] - results["dense"]).square().flatten(1).mean(1)
        print("\nsparse against dense video, PSNR (higher is closer; 30 dB is hard to see):")
        for prompt, value in zip(self.prompts, 10 * torch.log10(4 / error), strict=True):
            print(f"  {value:5.1f} dB  {prompt}")
        print(
            f"\nThis costs time instead of saving it: with {self.tokens:,} tokens attention is little of a step,\n"
            "and blocks of 16 are too small to be fast; by itself the backend would stay dense here.\n"
            "It shows what happens to the video. For times: --random (8,000 tokens), or `make bench`."
        )

    def write(self, results: dict[str, torch.Tensor], path: Path) -> None:
        """Animated WebP: dense, sparse and their difference for each prompt."""
        from tiny_video import pictures

        difference = (results["sparse"] - results["dense"]).abs() - 1
        pictures.comparison({**results, "difference": difference}, self.prompts, path)


def synchronise(device: str) -> None:
    """Wait for the GPU, if there is one, so that a clock can be read."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def write_mask(report: drad.Report, path: Path) -> None:
    """Picture of the plan of the first attention that was replaced."""
    site = report.replaced[0]
    assert site.plan is not None
    assert site.grid is not None
    plot_mask(site.plan, path, title=site.path, boundaries=frame_boundaries(site.grid, site.text_tokens.before or 0))


def main(argv: list[str] | None = None) -> None:
    """Run both variants, print report and times, write the files."""
    args = parse(argv)
    demo: Any
    if args.model or args.random:
        from wan_pipeline import WanModel

        demo = WanModel(args)
    else:
        demo = SmallModel(args)
    print(f"{args.frames} frames of {args.width}x{args.height}: {demo.tokens:,} video tokens, on {args.device}\n")

    options = {"sparsity": args.sparsity, **demo.options}
    variants: dict[str, Callable[..., Any]] = {
        "dense": torch.compile(demo.transformer),
        "sparse": torch.compile(demo.transformer, backend="dynamicrad", options=options),
    }
    print("options:", ", ".join(f"{name}={value}" for name, value in options.items()))
    results, seconds = {}, {}
    for name, compiled in variants.items():
        print(f"{name}: {args.steps} steps, the first one compiles")
        results[name], seconds[name] = demo.generate(compiled)
    report = drad.report(variants["sparse"])

    print(f"\n{report}\n")
    warm = {name: min(times[max(1, demo.dense_steps) :]) for name, times in seconds.items()}
    for name, times in seconds.items():
        print(f"{name:7s} first step {times[0]:6.1f} s (with compilation)   then {warm[name]:7.3f} s (the fastest)")
    print(f"        {warm['dense'] / warm['sparse']:.2f}x the speed of dense, a step")
    demo.compare(results)

    args.output_dir.mkdir(parents=True, exist_ok=True)
    video, page, mask = written = [args.output_dir / name for name in FILES]
    demo.write(results, video)
    report.to_html(page)
    if report.replaced:
        write_mask(report, mask)
    else:
        written.remove(mask)
    print("\nwrote", ", ".join(map(str, written)))


if __name__ == "__main__":
    main()
