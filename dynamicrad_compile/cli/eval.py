"""The command `dynamicrad eval`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..beforehand import output_file
from ..errors import DynamicRadError
from ..optional import optional
from ..options import Options
from ..quality.methods import METHODS, check_method
from ..quality.subject_arguments import add_subject, chosen_subject


def add_eval(commands: Any) -> None:
    """Add the command to the parser of `dynamicrad`."""
    parser = commands.add_parser(
        "eval",
        help="compare the videos of sparse attention with dense ones and with real clips",
        description="Make the same clips by several methods; write a table, results.json, pareto.png and clips.gif. "
        "An interrupted run goes on where it was.",
    )
    add_subject(parser)
    parser.add_argument("--prompts", type=int, default=6, help="how many of the subject's own prompts (6)")
    parser.add_argument("--seeds", type=int, default=1, help="clips of each prompt (1)")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help=f"{', '.join(METHODS)} (all)")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.7, 0.8, 0.9], help="(0.5 0.7 0.8 0.9)")
    parser.add_argument("--block-size", type=int, default=16, help="tokens of a block (16)")
    parser.add_argument("--profile", default="default", help="of our methods (default)")
    parser.add_argument("--compensate", type=float, help="of our methods, 0 to 1 (the profile's)")
    parser.add_argument("--dense-steps", type=int, default=0, help="first steps that stay dense, ours (0)")
    parser.add_argument("--batch", type=int, default=2, help="clips made together (2)")
    parser.add_argument("--real", type=int, default=64, help="held-out real clips to compare with (64)")
    parser.add_argument("--clips", type=Path, nargs="+", metavar="FILE", help="only the loop score of these animations")
    parser.add_argument("-o", "--output", type=Path, default=Path("outputs/eval"), help="folder (outputs/eval)")
    parser.set_defaults(run=_eval)


def _eval(args: argparse.Namespace) -> int:
    if args.clips:
        return _loops(args.clips)
    from ..quality.harness import evaluate
    from ..quality.methods import method
    from ..quality.pictures import save_gif, save_pareto

    _check(args)
    subject = chosen_subject(args)
    prompts = args.prompt or list(subject.prompts)[: args.prompts]
    methods = [
        method(name, subject, sparsity, args.block_size, args.profile, args.compensate, dense_steps=args.dense_steps)
        for name in args.methods
        if name != "dense"
        for sparsity in args.sparsity
    ]
    try:
        results = evaluate(subject, methods, prompts, args.output, seeds=args.seeds, batch=args.batch, real=args.real)
    except KeyboardInterrupt:
        print(f"\nInterrupted. The same command goes on with what is in {args.output}.")
        return 130
    print(results.table())
    save_pareto(results, args.output / "pareto.png")
    strongest = max(args.sparsity)
    shown = {n: c[:4] for n, c in results.clips.items() if n == "dense" or n.endswith(f"{strongest:.0%}")}
    save_gif(shown, args.output / "clips.gif", titles=prompts[:4])
    print(f"wrote {args.output}/results.json, pareto.png, clips.gif (at {strongest:.0%})")
    return 0


def _check(args: argparse.Namespace) -> None:
    """Raises DynamicRadError for what can be told before a model is loaded."""
    for library in ("tqdm", "safetensors.torch", "skimage.metrics", "PIL.Image", "matplotlib.figure"):
        optional(library, "evaluating needs", "eval")
    for name, least in (("prompts", 1), ("seeds", 1), ("batch", 1), ("real", 0)):
        if getattr(args, name) < least:
            raise DynamicRadError(f"--{name} must be at least {least}, got {getattr(args, name)}.")
    for name in args.methods:
        check_method(name)
    for sparsity in args.sparsity:
        options = {"profile": args.profile, "block_size": args.block_size, "dense_steps": args.dense_steps}
        Options(**options, sparsity=sparsity, compensate=args.compensate)
    for name in ("results.json", "pareto.png", "clips.gif", "clips/clips.safetensors"):
        output_file(args.output / name)


def _loops(files: list[Path]) -> int:
    from ..quality.loops import loop_score
    from ..quality.pictures import read_clip

    clips = [read_clip(file) for file in files]
    print(f"{'score':>6s} {'repetition':>11s} {'lag':>4s} {'duplicates':>11s} {'periodicity':>12s} {'stillness':>10s}")
    for file, clip in zip(files, clips, strict=True):
        found = loop_score(clip)
        parts = (found.repetition, found.lag, found.duplicates, found.periodicity, found.stillness)
        repetition, lag, duplicates, periodicity, still = (float(part) for part in parts)
        print(
            f"{float(found.score):6.1f} {repetition:11.2f} {lag:4.0f} {duplicates:11.2f} {periodicity:12.2f} "
            f"{still:10.2f}  {file}"
        )
    return 0
