"""`dynamicrad explain`: what would be replaced in a model, from its configuration alone."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import OptionsError
from .status import status
from .values import key_value

if TYPE_CHECKING:
    from ..reporting.expectation import Expectation
    from ..reporting.report import Report


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
        help="a preset (`--model list` shows them), a transformer class of diffusers, the path of a pipeline folder, "
        "or an id of Hugging Face that is in the local cache; only its config.json is read",
    )
    parser.add_argument("--frames", type=int, default=81, help="frames of the video (81)")
    parser.add_argument("--height", type=int, default=480, help="pixels (480)")
    parser.add_argument("--width", type=int, default=832, help="pixels (832)")
    parser.add_argument(
        "--layers", type=int, help="capture only so many layers of each kind; 0 = all (2, and all with --ranks)"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="options",
        help="an option of the backend, such as sparsity=0.9 or grid=21,30,52; may be repeated",
    )
    parser.add_argument(
        "--ranks", type=int, metavar="N", help="also estimate a step on so many GPUs (1 to 64), for each layout"
    )
    parser.add_argument(
        "--link", type=float, metavar="GB/S", help="speed between GPUs each way (the device's NVLink: 450 for h100)"
    )
    parser.add_argument(
        "--device",
        help="also say what to expect on this GPU: a100, h100, h200, b200, 3090, 4090, 5090 (h100 with --ranks)",
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
    from .. import explain, simulate_ranks
    from ..beforehand import output_file
    from ..models.fake import build, other_flops, repeats
    from ..options import Options
    from ..parallel.chips import chip

    options = dict(key_value(text) for text in args.options)
    if args.dump:
        options["dump"] = args.dump
    Options.from_mapping(options)  # a mistake is told before the model is built
    asked = _ranks(args)
    if args.device:
        chip(args.device)
    layers = args.layers if args.layers is not None else 0 if asked else 2
    if args.html:
        output_file(args.html)
    size = dict(name=args.model, frames=args.frames, height=args.height, width=args.width, layers=layers)
    status(f"building {args.model} without weights ...")
    model, inputs = build(**size)
    status(f"capturing the graphs of {type(model).__name__} ...")
    report = explain(model, options=options, **inputs)
    status("counting the products of all its layers ...")
    whole, all_inputs = (model, inputs) if not layers else build(**{**size, "layers": 0})
    rest = other_flops(whole, all_inputs)
    status("")
    report.expected = _expected(report, args, rest, repeats(model, whole), options)
    if asked and layers:
        rest = other_flops(model, inputs)
    simulation = simulate_ranks(report, **asked, rest_flops=rest) if asked else None
    depth = f"{layers} layers of each kind" if layers else "all layers"
    if args.json:
        values = json.loads(report.to_json())
        if simulation is not None:
            values["ranks"] = {**simulation.to_dict(), "layers": depth}
        print(json.dumps(values, indent=2))
    else:
        print(f"{type(model).__name__}, {depth}, {args.frames} frames of {args.width}x{args.height}\n\n{report}")
        if simulation is not None:
            print(f"\n{depth}, {simulation}")
    if args.html:
        report.to_html(args.html)
    return 0


def _expected(
    report: Report, args: argparse.Namespace, rest: int, repeats: Callable[[str], float], options: Mapping[str, Any]
) -> tuple[Expectation, ...]:
    """What to expect of the whole model: on this machine's devices, and on the GPU that was asked for.

    rest     FLOPs of the whole model outside of attention
    repeats  how many modules of it stand behind a captured one, by its path
    """
    import torch

    from ..parallel.chips import chip
    from ..parallel.expected import expected_on

    devices: list[Any] = [torch.device("cuda")] * torch.cuda.is_available() + [torch.device("cpu")]
    if args.device:
        devices.append(chip(args.device))
    forced = options.get("min_tokens") not in (None, "auto")
    times = lambda site: repeats(site.path)  # noqa: E731
    return tuple(expected_on(one, report, rest_flops=rest, times=times, forced=forced) for one in devices)


def _ranks(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `simulate_ranks`; none without --ranks. Raises OptionsError for what is out of range."""
    from ..parallel.simulation import DEVICE, check

    if args.ranks is None:
        if args.link is not None:
            raise OptionsError("--link needs --ranks: it is for estimates of several GPUs.")
        return {}
    given = {"ranks": args.ranks, "link": args.link, "device": args.device or DEVICE}
    check(**given)
    return given
