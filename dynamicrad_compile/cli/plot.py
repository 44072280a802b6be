"""`dynamicrad plot`: a picture of the blocks that a plan reads."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

from ..errors import PlanError
from ..optional import install
from .values import key_value


def add_plot(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "plot",
        help="draw which blocks a plan reads",
        description="Write the block mask of a plan as a picture, or print it as text. What is left out comes from "
        "pattern and profile.",
    )
    parser.add_argument(
        "--grid",
        type=int,
        nargs=3,
        required=True,
        metavar=("F", "H", "W"),
        help="frames, height, width in latent tokens",
    )
    parser.add_argument("--pattern", default="dynamicrad", help="dynamicrad (default), radial, lvsa or dense")
    parser.add_argument("--block-size", type=int, default=128, help="tokens of a block (128)")
    parser.add_argument("--text-before", type=int, default=0, help="text tokens before the video (0)")
    parser.add_argument("--text-after", type=int, default=0, help="text tokens after the video (0)")
    parser.add_argument("--sparsity", type=float, help="share of blocks to skip")
    parser.add_argument("--decay-factor", type=float, help="width of the windows")
    parser.add_argument("--sink-frames", type=int, help="leading frames that every block may read")
    parser.add_argument("--regime", help="low, mid or high motion")
    parser.add_argument("--profile", help="name or path of a profile")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="another parameter of the pattern, such as step=3; may be repeated",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="picture to write, .svg, .png, .jpg, .webp, .pdf or another kind; - prints the mask as text (mask.png, or "
        "text where pillow is missing)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from .. import make_plan
    from ..reporting.plot import frame_boundaries, plot_mask
    from ..reporting.plot_text import mask_text

    output = _output(args.output)
    names = ("sparsity", "decay_factor", "sink_frames", "regime", "profile")
    params = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    params |= dict(key_value(pair) for pair in args.set)
    plan = make_plan(args.pattern, args.grid, args.block_size, args.text_before, args.text_after, **params)
    title = f"{args.pattern} {'x'.join(map(str, args.grid))}"
    if output == Path("-"):
        print(mask_text(plan, title=title))
    else:
        plot_mask(plan, output, title=title, boundaries=frame_boundaries(args.grid, args.text_before))
        print(
            f"wrote {output}: {plan.num_q_blocks} x {plan.num_kv_blocks} blocks of {args.block_size} tokens, "
            f"{plan.sparsity:.1%} skipped"
        )
    if args.sparsity is not None and plan.sparsity < args.sparsity - 0.005:
        print(f"note: {args.sparsity:.1%} was asked for; every row reads at least one block: try smaller ones")
    return 0


def _output(given: Path | None) -> Path:
    """Where to write, - for text. Raises PlanError if that can't be."""
    from ..beforehand import output_file
    from ..reporting.canvas import check_picture

    if given is None and importlib.util.find_spec("PIL") is None:
        print(f"pillow is missing ({install('plot', 'PIL')}), so here is text:", file=sys.stderr)
        return Path("-")
    output = given or Path("mask.png")
    if output != Path("-"):
        check_picture(output)
        output_file(output, PlanError, new_folder=False)
    return output
