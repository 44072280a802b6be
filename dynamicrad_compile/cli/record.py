"""The command `dynamicrad record`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..errors import OptionsError
from ..optional import optional
from ..profiles import REGIMES
from ..quality.subject_arguments import add_subject, chosen_subject


def add_record(commands: Any) -> None:
    """Add the command to the parser of `dynamicrad`."""
    parser = commands.add_parser(
        "record",
        help="record some attention of a model, to tune a profile on (tune --captures)",
        description="Make clips with the dense model and keep queries, keys and values of some heads of its video "
        "self-attention.",
    )
    add_subject(parser)
    parser.add_argument("--regime", required=True, choices=REGIMES, help="motion of what the prompts ask for")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the .safetensors file to write")
    parser.add_argument("--heads", type=int, default=16, help="heads to keep, over all steps, layers and prompts (16)")
    parser.add_argument("--seed", type=int, default=0, help="of the first prompt's noise, and of the choice (0)")
    parser.set_defaults(run=_record)


def _record(args: argparse.Namespace) -> int:
    tqdm = optional("tqdm", "recording needs", "tune").tqdm
    from ..tuning.captures import check_recording, record_attention

    if not args.prompt:
        raise OptionsError(f"record needs at least one --prompt, of {args.regime} motion as --regime says.")
    check_recording(args.output, args.regime, args.heads, args.seed)
    subject = chosen_subject(args)
    given: dict[str, Any] = {"regime": args.regime, "text": subject.text, "heads": args.heads, "seed": args.seed}
    with record_attention(subject.model, args.output, subject.grid, **given):
        for number, prompt in enumerate(tqdm(args.prompt, desc="recording", unit="clip")):
            subject.generate(subject.model, [prompt], [args.seed + number])
    frames, height, width = subject.grid
    print(f"wrote {args.output}. Next: dynamicrad tune --grid {frames} {height} {width} --captures {args.output} ...")
    return 0
