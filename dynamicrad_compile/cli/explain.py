"""`dynamicrad explain`: what would be replaced in a model, from its configuration alone."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .values import key_value


def add_explain(commands: Any) -> None:
    """Add the command to the parser."""
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
    parser.add_argument("--dump", metavar="FOLDER", help="also write each graph, before the passes and after each")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from ..models.presets import PRESETS

    if args.model == "list":
        for name, (class_name, _) in PRESETS.items():
            print(f"{name:14s} {class_name}")
        return 0
    from .. import explain
    from ..beforehand import output_file
    from ..models.fake import build
    from ..options import Options

    options = dict(key_value(text) for text in args.options)
    if args.dump:
        options["dump"] = args.dump
    Options.from_mapping(options)  # a mistake is told before the model is built
    if args.html:
        output_file(args.html)
    model, inputs = build(args.model, frames=args.frames, height=args.height, width=args.width, layers=args.layers)
    report = explain(model, options=options, **inputs)
    if args.json:
        print(report.to_json())
    else:
        depth = f"{args.layers} layers of each kind" if args.layers else "all layers"
        print(f"{type(model).__name__}, {depth}, {args.frames} frames of {args.width}x{args.height}\n\n{report}")
    if args.html:
        report.to_html(args.html)
    return 0
