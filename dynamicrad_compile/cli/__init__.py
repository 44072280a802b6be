"""The command `dynamicrad`: one file a command.

Exit codes: 0 fine, 1 the doctor found something that must be mended, 2 wrong input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .. import __version__
from ..errors import DynamicRadError
from .bench import add_bench
from .doctor import add_doctor
from .eval import add_eval
from .explain import add_explain
from .export import add_export
from .lora import add_lora
from .plot import add_plot
from .record import add_record
from .route import add_route
from .status import status
from .tune import add_tune


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code. A user's mistake gives a message on stderr, not a traceback."""
    args = _parser().parse_args(argv)
    try:
        return int(args.run(args))
    except DynamicRadError as error:
        message = str(error)
    except KeyboardInterrupt:
        status("")
        print(f"\ndynamicrad {args.command}: interrupted.", file=sys.stderr)
        return 130
    except OSError as error:  # files that can't be read or written
        message = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    status("")
    print(f"dynamicrad {args.command}: {message}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dynamicrad", description="Block-sparse attention for video diffusion transformers."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (
        add_doctor,
        add_explain,
        add_plot,
        add_bench,
        add_route,
        add_record,
        add_tune,
        add_export,
        add_lora,
        add_eval,
    ):
        add(commands)
    return parser
