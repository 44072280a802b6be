"""Arguments of commands that run a model: a function of the user's own, or a diffusers pipeline."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..beforehand import load_pipeline, usable_device
from ..errors import DynamicRadError
from .subject import Subject, from_pipeline, load_subject

PIPELINE = "dynamicrad_compile.quality.subject_arguments:pipeline_subject"
TINY = "dynamicrad_compile.quality.tiny_video.subject:subject"
# Arguments of the commands and of a pipeline's call.
CALL = {"frames": "num_frames", "height": "height", "width": "width", "steps": "num_inference_steps"}
DTYPES = ("float32", "float16", "bfloat16")


def add_subject(parser: argparse.ArgumentParser) -> None:
    """Add the arguments to a command's parser."""
    parser.add_argument("--subject", default=TINY, metavar="MODULE:FUNCTION", help=f"what makes videos ({TINY})")
    parser.add_argument("--checkpoint", type=Path, help="given to the subject's function")
    parser.add_argument("--pipeline", metavar="FOLDER", help="a diffusers pipeline instead of a subject")
    parser.add_argument("--frames", type=int, help="of a pipeline's clips (the pipeline's default)")
    parser.add_argument("--height", type=int, help="pixels, of a pipeline's clips (the pipeline's default)")
    parser.add_argument("--width", type=int, help="pixels, of a pipeline's clips (the pipeline's default)")
    parser.add_argument("--steps", type=int, help="denoising steps (the pipeline's or the subject's default)")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of a pipeline's weights (bfloat16)")
    parser.add_argument("--device", help="of a pipeline (cuda, or cpu where there is none)")
    parser.add_argument("--prompt", action="append", default=[], help="may be repeated (the subject's own)")


def chosen_subject(args: argparse.Namespace) -> Subject:
    """The subject that the arguments name. Raises DynamicRadError for arguments that do not go together."""
    for name in ("frames", "height", "width", "steps"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise DynamicRadError(f"--{name} must be at least 1, got {value}.")
    if not args.pipeline:
        if given := [f"--{name}" for name in ("frames", "height", "width") if getattr(args, name) is not None]:
            raise DynamicRadError(f"{', '.join(given)}: only with --pipeline; a subject's function sets its own.")
        arguments = {name: getattr(args, name) for name in ("checkpoint", "steps") if getattr(args, name) is not None}
        return load_subject(args.subject, **arguments)
    if not args.prompt:
        raise DynamicRadError("--pipeline needs at least one --prompt.")
    call = {CALL[name]: getattr(args, name) for name in CALL if getattr(args, name) is not None}
    source = {name: getattr(args, name) for name in ("pipeline", "prompt", "device", "dtype")} | {"call": call}
    return replace(pipeline_subject(**source), source=(PIPELINE, source))


def pipeline_subject(
    pipeline: str, prompt: Sequence[str], device: str | None, dtype: str, call: Mapping[str, Any]
) -> Subject:
    """The subject of a folder with a diffusers pipeline, called with `call` (see `from_pipeline`)."""
    where = usable_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    pipe = load_pipeline(pipeline, "--pipeline needs", torch_dtype=getattr(torch, dtype)).to(where)
    return from_pipeline(pipe, prompt, **call)
