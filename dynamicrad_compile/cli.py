"""The command `dynamicrad`: doctor, explain, plot, route, record, tune, lora, export, eval.

Exit codes: 0 fine, 1 the doctor found something that must be mended, 2 wrong input.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import __version__
from .errors import DynamicRadError
from .export.command import add_export
from .lora.command import add_lora
from .quality.command import add_eval
from .tuning.command import add_tune
from .tuning.record_command import add_record


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code. A user's mistake gives a message on stderr, not a traceback."""
    args = _parser().parse_args(argv)
    try:
        return int(args.run(args))
    except DynamicRadError as error:
        message = str(error)
    except OSError as error:  # files that can't be read or written
        message = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    print(f"dynamicrad {args.command}: {message}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dynamicrad", description="Block-sparse attention for video diffusion transformers."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    doctor = commands.add_parser("doctor", help="check the installation and the machine")
    doctor.set_defaults(run=_doctor)
    _add_explain(commands)
    _add_plot(commands)
    _add_route(commands)
    add_record(commands)
    add_tune(commands)
    add_export(commands, _key_value)
    add_lora(commands)
    add_eval(commands)
    return parser


def _add_explain(commands: Any) -> None:
    parser = commands.add_parser(
        "explain",
        help="say which attentions of a model would be replaced, on which grid, and why others stay dense",
        description="Capture a diffusers transformer without its weights and report what the backend would do.",
    )
    parser.add_argument(
        "--model",
        required=True,
        help="a preset (`--model list` shows them), a transformer class of diffusers, "
        "or the path of a pipeline folder; only its config.json is read",
    )
    parser.add_argument("--frames", type=int, default=81, help="frames of the video (81)")
    parser.add_argument("--height", type=int, default=480, help="pixels (480)")
    parser.add_argument("--width", type=int, default=832, help="pixels (832)")
    parser.add_argument("--layers", type=int, default=2, help="capture only so many layers; 0 = all (2)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="options",
        help="an option of the backend, such as sparsity=0.9 or grid=21,30,52; may be repeated",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--html", type=Path, metavar="FILE", help="also write the report as a web page")
    parser.set_defaults(run=_explain)


def _add_plot(commands: Any) -> None:
    parser = commands.add_parser(
        "plot",
        help="draw which blocks a plan reads",
        description="Write the block mask of a plan as a PNG. What is left out comes from pattern and profile.",
    )
    parser.add_argument(
        "--grid",
        type=int,
        nargs=3,
        required=True,
        metavar=("F", "H", "W"),
        help="frames, height, width in latent tokens",
    )
    parser.add_argument("--pattern", default="dynamicrad", help="dynamicrad (default), radial or dense")
    parser.add_argument("--block-size", type=int, default=128, help="tokens of a block (128)")
    parser.add_argument("--text-before", type=int, default=0, help="text tokens before the video (0)")
    parser.add_argument("--text-after", type=int, default=0, help="text tokens after the video (0)")
    parser.add_argument("--sparsity", type=float, help="share of blocks to skip")
    parser.add_argument("--decay-factor", type=float, help="width of the windows")
    parser.add_argument("--sink-frames", type=int, help="leading frames that every block may read")
    parser.add_argument("--regime", help="low, mid or high motion")
    parser.add_argument("--profile", help="name or path of a profile")
    parser.add_argument("-o", "--output", type=Path, default=Path("mask.png"), help="file to write (mask.png)")
    parser.set_defaults(run=_plot)


def _add_route(commands: Any) -> None:
    parser = commands.add_parser(
        "route",
        help="say which motion regime a prompt gets, or fit a router to a text encoder",
        description="Encode prompts and route them. With --fit, first fit a router to the encoder and save it.",
    )
    parser.add_argument("prompts", nargs="*", metavar="PROMPT")
    parser.add_argument("--router", type=Path, required=True, metavar="PATH", help="PATH.safetensors and PATH.toml")
    parser.add_argument(
        "--encoder",
        metavar="NAME",
        help="minilm, or the folder of a diffusers pipeline; the one the router is fitted to",
    )
    parser.add_argument("--fit", action="store_true", help="fit a router to --encoder and save it as --router")
    parser.add_argument("--corpus", type=Path, metavar="FILE", help="labelled prompts to fit, .jsonl or .csv (ours)")
    parser.set_defaults(run=_route)


def _doctor(args: argparse.Namespace) -> int:
    from .doctor import diagnose

    findings = diagnose()
    for finding in findings:
        print(finding)
    failed = sum(finding.status == "fail" for finding in findings)
    print(f"\n{failed} problem{'s' * (failed != 1)}." if failed else "\nEverything needed is there.")
    return 1 if failed else 0


def _explain(args: argparse.Namespace) -> int:
    from .presets import PRESETS

    if args.model == "list":
        for name, (class_name, _) in PRESETS.items():
            print(f"{name:14s} {class_name}")
        return 0
    from . import explain
    from .fake_model import build
    from .options import Options

    options = dict(_key_value(text) for text in args.options)
    Options.from_mapping(options)  # a mistake is told before the model is built
    model, inputs = build(args.model, frames=args.frames, height=args.height, width=args.width, layers=args.layers)
    report = _unwrapped(lambda: explain(model, options=options, **inputs))
    if args.json:
        print(report.to_json())
    else:
        depth = f"{args.layers} layers of each kind" if args.layers else "all layers"
        print(f"{type(model).__name__}, {depth}, {args.frames} frames of {args.width}x{args.height}\n\n{report}")
    if args.html:
        report.to_html(args.html)
    return 0


def _plot(args: argparse.Namespace) -> int:
    from . import make_plan
    from .plot import frame_boundaries, plot_mask

    names = ("sparsity", "decay_factor", "sink_frames", "regime", "profile")
    params = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    plan = make_plan(args.pattern, args.grid, args.block_size, args.text_before, args.text_after, **params)
    title = f"{args.pattern} {'x'.join(map(str, args.grid))}"
    plot_mask(plan, args.output, title=title, boundaries=frame_boundaries(args.grid, args.text_before))
    print(
        f"wrote {args.output}: {plan.num_q_blocks} x {plan.num_kv_blocks} blocks of {args.block_size} tokens, "
        f"{plan.sparsity:.1%} skipped"
    )
    return 0


def _route(args: argparse.Namespace) -> int:
    from .router import CLASSES, Router
    from .router_encoders import as_encoder, load_encoder

    if args.fit and not args.encoder:
        raise DynamicRadError("--fit needs --encoder: minilm, or the folder of a diffusers pipeline.")
    router = None if args.fit else Router.load(args.router)
    if not args.encoder:
        if args.prompts:
            raise DynamicRadError(
                f"routing needs the text encoder that the router was fitted to ({router.encoder if router else '?'}): "
                "--encoder minilm, or --encoder FOLDER of the diffusers pipeline."
            )
        print(router.report() if router else "")
        return 0
    source = load_encoder(args.encoder)
    if router is None:
        from .router_fit import fit_router

        router = fit_router(source, args.corpus)
        print(f"{router.report()}\nwrote {router.save(args.router)}")
    if args.prompts:
        embeds, mask = as_encoder(source)[0](args.prompts)
        scores = router.scores(embeds, mask).tolist()
        for prompt, regime, row in zip(args.prompts, router.predict(embeds, mask).tolist(), scores, strict=True):
            details = " ".join(f"{name} {score:+.2f}" for name, score in zip(CLASSES, row, strict=True))
            print(f"{CLASSES[regime]:4s} ({details})  {prompt}")
    return 0


def _key_value(text: str) -> tuple[str, Any]:
    """'sparsity=0.9' -> ('sparsity', 0.9). Values are JSON, lists may go without brackets, the rest is text."""
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise DynamicRadError(f"--set expects KEY=VALUE, got {text!r}.")
    for candidate in (value, f"[{value}]" if "," in value else value):
        try:
            return key, json.loads(candidate)
        except ValueError:
            continue
    return key, value


def _unwrapped(call: Any) -> Any:
    """Call, and raise an error of ours as it was before Dynamo wrapped it."""
    from torch._dynamo.exc import BackendCompilerFailed

    try:
        return call()
    except BackendCompilerFailed as error:
        if isinstance(error.inner_exception, DynamicRadError):
            raise error.inner_exception from None
        raise


if __name__ == "__main__":
    sys.exit(main())
