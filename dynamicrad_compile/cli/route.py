"""`dynamicrad route`: the regime of a prompt, or a new router for a text encoder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..errors import DynamicRadError


def add_route(commands: Any) -> None:
    """Add the command to the parser."""
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
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from ..beforehand import output_file
    from ..routing.encoders import as_encoder, load_encoder
    from ..routing.fit import check_fit, fit_router
    from ..runtime.router import CLASSES, Router, router_files

    if args.fit and not args.encoder:
        raise DynamicRadError("--fit needs --encoder: minilm, or the folder of a diffusers pipeline.")
    if args.corpus and not args.fit:
        raise DynamicRadError("--corpus is what a router is fitted to: it needs --fit.")
    router = None if args.fit else Router.load(args.router)
    if router is not None and not (args.encoder and args.prompts):
        if args.prompts:
            raise DynamicRadError(
                f"routing needs the text encoder that the router was fitted to ({router.encoder}): "
                "--encoder minilm, or --encoder FOLDER of the diffusers pipeline."
            )
        print(router.report())
        return 0
    if router is None:
        check_fit(args.corpus)
        for file in router_files(args.router):
            output_file(file)
    source = load_encoder(args.encoder)
    if router is None:
        router = fit_router(source, args.corpus)
        print(f"{router.report()}\nwrote {router.save(args.router)}")
    if args.prompts:
        embeds, mask = as_encoder(source)[0](args.prompts)
        scores = router.scores(embeds, mask).tolist()
        regimes, known = router.predict(embeds, mask).tolist(), router.knows(embeds, mask).tolist()
        for prompt, regime, row, sure in zip(args.prompts, regimes, scores, known, strict=True):
            details = " ".join(f"{name} {score:+.2f}" for name, score in zip(CLASSES, row, strict=True))
            details += "" if sure else ", unlike what the router was fitted to"
            print(f"{CLASSES[regime]:4s} ({details})  {prompt}")
    return 0
