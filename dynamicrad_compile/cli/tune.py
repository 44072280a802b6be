"""The command `dynamicrad tune`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..tuning.task import DEFAULT_OPTIMIZER, MODES
from .on_dask import add_dask, dask_executor
from .values import key_value

# Arguments of the parser that are not passed to `tune` as they are.
NOT_SETTINGS = ("command", "run", "fix", "no_pictures", "dask")


def add_tune(commands: Any) -> None:
    """Add the command to the parser of `dynamicrad`."""
    parser = commands.add_parser(
        "tune",
        help="search a profile for a grid on proxies of attention",
        description="Search the parameters of all regimes and modes, write a profile, its journal and two pictures.",
    )
    parser.add_argument("--grid", type=int, nargs=3, required=True, metavar=("F", "H", "W"), help="in latent tokens")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("outputs/tuned.toml"), help="profile to write (outputs/tuned.toml)"
    )
    parser.add_argument("--block-size", type=int, default=128, help="tokens of a block (128)")
    parser.add_argument("--text-before", type=int, default=0, help="text tokens before the video (0)")
    parser.add_argument("--text-after", type=int, default=0, help="text tokens after the video (0)")
    parser.add_argument("--heads", type=int, default=4, help="heads of the video proxy (4)")
    parser.add_argument("--head-dim", type=int, help="features of a head (128, or that of the captures)")
    parser.add_argument("--sparsity", type=float, default=0.8, help="share of dense attention to skip (0.8)")
    parser.add_argument("--budget", type=int, default=30, help="evaluations for each regime and mode (30)")
    parser.add_argument("--optimizer", default=DEFAULT_OPTIMIZER, help=f"of Nevergrad ({DEFAULT_OPTIMIZER})")
    parser.add_argument("--seed", type=int, default=0, help="of the optimizer (0)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of the proxies' draws (1 2 3)")
    parser.add_argument("--proxies", nargs="+", help="published, video (both, or none with captures)")
    parser.add_argument("--captures", type=Path, nargs="+", default=[], help="attention of a model (record_attention)")
    parser.add_argument("--modes", nargs="+", default=list(MODES), help="static_ratio, dynamic_threshold (both)")
    parser.add_argument("--rows", type=int, help="sampled query rows of a head (what memory allows)")
    parser.add_argument("--workers", type=int, default=1, help="points asked for at once, and processes (1)")
    add_dask(parser)
    parser.add_argument(
        "--fix",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a parameter that is not searched, such as compensate=0 or box=4,4,8; may be repeated",
    )
    parser.add_argument(
        "--boxes", nargs="+", default=[], metavar="F,H,W", help="shapes of blocks to search, or raster (all that fit)"
    )
    parser.add_argument("--resume", action="store_true", help="go on with the journal of an interrupted search")
    parser.add_argument("--no-pictures", action="store_true", help="write no PNGs")
    parser.set_defaults(run=_tune)


def _tune(args: argparse.Namespace) -> int:
    from ..tuning.api import tune

    settings = {key: value for key, value in vars(args).items() if key not in NOT_SETTINGS}
    settings["boxes"] = [key_value(f"box={text}")[1] for text in args.boxes]
    fixed = dict(key_value(text, "--fix") for text in args.fix)
    try:
        with dask_executor(args.dask) as executor:
            tune(fixed=fixed, pictures=not args.no_pictures, executor=executor, **settings)
    except KeyboardInterrupt:
        print(f"\nInterrupted. The same command with --resume goes on from {args.output.with_suffix('.jsonl')}.")
        return 130
    print(f"wrote {args.output}")
    return 0
