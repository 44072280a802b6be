"""The command `dynamicrad eval`."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from ..beforehand import output_file
from ..errors import DynamicRadError
from ..optional import optional
from ..options import Options
from ..quality.methods import METHODS, check_method
from ..quality.subject_arguments import add_subject, chosen_subject
from .on_dask import add_dask, dask_executor


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
    parser.add_argument(
        "--clips", type=Path, nargs="+", metavar="FILE", help="only the loop scores of these animations"
    )
    parser.add_argument(
        "--features",
        type=Path,
        metavar="FOLDER",
        help="a CLIP model that VQeval's score and consistency compare frames by (coarse pixels)",
    )
    parser.add_argument(
        "--fps", type=float, help="of the clips, by which VQeval samples those of over 5 s (all frames)"
    )
    add_dask(parser)
    parser.add_argument("-o", "--output", type=Path, default=Path("outputs/eval"), help="folder (outputs/eval)")
    parser.set_defaults(run=_eval)


def _eval(args: argparse.Namespace) -> int:
    if args.clips:
        return _loops(args)
    from ..quality.frame_features import clip_features, coarse_features
    from ..quality.harness import evaluate
    from ..quality.methods import method
    from ..quality.pictures import save_gif, save_pareto

    _check(args)
    features = clip_features(args.features) if args.features else coarse_features
    with dask_executor(args.dask) as executor:
        subject = chosen_subject(args)
        prompts = args.prompt or list(subject.prompts)[: args.prompts]
        methods = [
            method(
                name, subject, sparsity, args.block_size, args.profile, args.compensate, dense_steps=args.dense_steps
            )
            for name in args.methods
            if name != "dense"
            for sparsity in args.sparsity
        ]
        try:
            results = evaluate(
                subject,
                methods,
                prompts,
                args.output,
                seeds=args.seeds,
                batch=args.batch,
                real=args.real,
                features=features,
                fps=args.fps,
                executor=executor,
            )
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
    _check_fps(args)
    for name in args.methods:
        check_method(name)
    for sparsity in args.sparsity:
        options = {"profile": args.profile, "block_size": args.block_size, "dense_steps": args.dense_steps}
        Options(**options, sparsity=sparsity, compensate=args.compensate)
    for name in ("results.json", "pareto.png", "clips.gif", "clips/clips.safetensors"):
        output_file(args.output / name)


def _check_fps(args: argparse.Namespace) -> None:
    if args.fps is not None and not 0 < args.fps < math.inf:
        raise DynamicRadError(f"--fps must be a positive number, got {args.fps:g}.")


def _loops(args: argparse.Namespace) -> int:
    from ..quality.frame_features import clip_features, coarse_features, consistency
    from ..quality.loops import loop_score
    from ..quality.pictures import read_clip
    from ..quality.vqeval import enough_frames, vqeval_loop

    _check_fps(args)
    features = clip_features(args.features) if args.features else coarse_features
    clips = [read_clip(file) for file in args.clips]
    ours = ("repetition", "duplicates", "periodicity", "stillness")
    theirs = ("cycle", "duplicates", "flow", "autocorrelation")
    print("  ".join(["score", *ours, "lag", "| VQeval", *theirs, "lag", "| consistency"]))
    for file, clip in zip(args.clips, clips, strict=True):
        loop = loop_score(clip)
        vqeval = vqeval_loop(clip, features, args.fps) if enough_frames(clip.shape[1], args.fps) else None
        parts = [("score", loop.score, ".1f"), *((name, getattr(loop, name), ".2f") for name in ours)]
        parts += [("lag", loop.lag, ".0f"), ("| VQeval", getattr(vqeval, "score", math.nan), ".1f")]
        parts += [(name, getattr(vqeval, name, math.nan), ".2f") for name in theirs]
        parts += [("lag", getattr(vqeval, "lag", math.nan), ".0f")]
        parts += [("| consistency", consistency(clip, features), ".3f")]
        print("  ".join(f"{float(value):>{len(name)}{form}}" for name, value, form in parts), f"  {file}")
    return 0
