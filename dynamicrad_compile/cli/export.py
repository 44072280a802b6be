"""The command `dynamicrad export`."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from ..errors import DynamicRadError
from .values import key_value


def add_export(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "export",
        help="write a sparse transformer as a torch.export program, an AOTInductor package, ONNX or TensorRT",
        description="Make a diffusers transformer block-sparse and write it, with a model card, to a folder.",
    )
    parser.add_argument(
        "--model",
        required=True,
        help="a preset (`dynamicrad explain --model list`) or a transformer class of diffusers, with random weights; "
        "or the folder of a pipeline or of its transformer, with the weights in it",
    )
    parser.add_argument("--format", default="onnx", help="torch, aoti, onnx (default) or tensorrt")
    parser.add_argument("-o", "--output", type=Path, default=Path("exported"), help="folder to write to (exported)")
    parser.add_argument("--frames", type=int, default=81, help="frames of the video (81)")
    parser.add_argument("--height", type=int, default=480, help="pixels (480)")
    parser.add_argument("--width", type=int, default=832, help="pixels (832)")
    parser.add_argument("--layers", type=int, default=0, help="only so many layers, with random weights; 0 = all (0)")
    parser.add_argument("--dtype", default="float32", help="float32 (default), float16 or bfloat16")
    parser.add_argument("--device", default="cpu", help="where the model is when it is exported (cpu)")
    parser.add_argument("--dynamic-batch", action="store_true", help="leave the batch size open")
    parser.add_argument("--check", action="store_true", help="run the result in a fresh process and compare")
    for flag, target, what in (
        ("--set", "options", "an option of the backend, such as sparsity=0.9 or router=FILE"),
        ("--with", "settings", "a setting of the format, such as opset=20"),
    ):
        parser.add_argument(
            flag, action="append", default=[], type=str, metavar="KEY=VALUE", dest=target, help=f"{what}; repeatable"
        )
    parser.set_defaults(run=_export)


def _export(args: argparse.Namespace) -> int:
    from ..exporting.api import check_request, export, fitting_options
    from ..models.load import load_model

    options, settings = (dict(map(key_value, texts)) for texts in (args.options, args.settings))
    # mistakes are told before the model is built
    check_request(args.format, args.output, settings, args.check)
    fitting_options(args.format, options)
    start = time.perf_counter()

    def say(line: str) -> None:
        print(f"[{time.perf_counter() - start:6.1f} s] {line}", flush=True)

    say(f"loading {args.model}")
    names = ("frames", "height", "width", "layers", "dtype", "device")
    model, inputs, random = load_model(args.model, **{name: getattr(args, name) for name in names})
    if random:
        say("its weights are random: give a folder for real ones")
    try:
        result = export(
            model,
            kwargs=inputs,
            path=args.output,
            format=args.format,
            options=options,
            dynamic_batch=args.dynamic_batch,
            check=args.check,
            progress=say,
            **settings,
        )
    except MemoryError:
        raise DynamicRadError("out of memory; try --layers 2, --dtype float16, or a smaller video.") from None
    for file in result.files:
        print(f"wrote {file}")
    return 0
