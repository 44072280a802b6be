"""export: from a model of diffusers, or any other, to a file that runs its attention block-sparse."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import time
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..errors import ExportError, StrictError, nearest
from ..files import whole_folder
from ..options import Options
from ..passes.site import VIDEO
from ..plans.patterns import PATTERNS
from ..profiles import load_profile
from ..reporting.report import Report
from .batch import with_dynamic_batch
from .card import model_card
from .checking import check_export, check_runnable
from .job import Exported, Job, capture
from .output import SUFFIXES, place_of
from .rewriting import rewrite

FORMATS = {"torch": "torch_program", "aoti": "aoti", "onnx": "onnx.model", "tensorrt": "tensorrt.files"}
"""Format -> module with

STATELESS                        whether calls of the exported model know nothing of each other
check(**settings)                raises ExportError if a setting is wrong or something that it needs is missing
write(job, **settings) -> dict   fills job.folder; the result goes into the card, "file" is the one to load
"""
CARD = "card.json"


def export(
    model: torch.nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    path: str | os.PathLike[str] = "exported",
    format: str = "torch",
    options: Mapping[str, Any] | None = None,
    *,
    dynamic_batch: bool | Sequence[str] = False,
    check: bool = False,
    progress: Callable[[str], None] | None = None,
    **settings: Any,
) -> Exported:
    """Write a model with block-sparse attention to files.

    model          any module that torch.export takes, such as a transformer of diffusers; it is not changed
    args, kwargs   an example call: its sizes are those of the exported model
    path           a folder (files are called model.*), or a file name ending in .pt2, .onnx or .engine
    format         "torch": a torch.export program; "aoti": an AOTInductor package; "onnx": model.onnx, which runs in
                   onnxruntime, and model.trt.onnx for a TensorRT plugin; "tensorrt": an engine
    options        of the backend, see `Options`
    dynamic_batch  True: the batch size stays open, in every tensor of the call (not those in tuples) that has the
                   batch size of the first; or the names of the tensors that have it
    check          run what was written in a fresh process, compare it with the model, and fail where they differ
    progress       is called with a line before each step
    settings       of the format; onnx: opset=18

    Files appear when all of them are written; a failed export leaves nothing. Beside them goes a card, `card.json` or
    `NAME.json`, with grid, sparsity, options, sites and versions. The report tells of attention that stays dense.

    Returns what was written. Raises ExportError if the format, a setting or a mode is not possible or a package is
    missing, and OptionsError, ProfileError, GridError, RouterError or StrictError as the backend does.
    """
    say = progress or (lambda line: None)
    writer, folder, stem = check_request(format, path, settings, check)
    options = fitting_options(format, options)
    parsed = Options.from_mapping(options)
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, torch.nn.Module):
        raise ExportError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    args, kwargs, shapes = tuple(args), dict(kwargs or {}), None
    if dynamic_batch:
        args, kwargs, shapes = with_dynamic_batch(model, args, kwargs, dynamic_batch)
    seconds: dict[str, float] = {}
    what = f"capturing {type(model).__name__} with torch.export"
    with _timed(seconds, "capture", say, what), _in_eval_mode(model):
        program = capture(model, args, kwargs, shapes)
    with _timed(seconds, "rewrite", say, "making its attention block-sparse"):
        module, report = rewrite(program, options)
    _note_if_dense(report, parsed)
    for line in report.summary().splitlines():
        say(line)
    with whole_folder(folder, last=SUFFIXES) as temporary:
        job = Job(module, args, kwargs, shapes, temporary, stem, parsed, report, say)
        with _timed(seconds, "write", say, f"writing {format}"), torch.no_grad():
            details = writer.write(job, **settings)
        if check:
            with _timed(seconds, "check", say, "running it in a fresh process"):
                details["check"] = check_export(job, format, details["file"])
            say(f"relative error {details['check']['relative_error']:.1e}")
        inputs = _named(model, args, kwargs)
        extra = {"format": format, **details, "dynamic_batch": bool(dynamic_batch), "seconds": seconds}
        card = model_card(model, inputs, parsed, report, extra)
        name = CARD if stem == "model" else f"{stem}.json"
        (temporary / name).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
        names = sorted(file.name for file in temporary.iterdir() if file.name != name)
    files = [folder / file for file in (*names, name)]
    return Exported(format, folder / details["file"], files, report, card, seconds, module)


def check_request(
    format: str, path: str | os.PathLike[str], settings: Mapping[str, Any], check: bool = False
) -> tuple[types.ModuleType, Path, str]:
    """(module of the format, folder, first part of the file names), if they are possible; else ExportError."""
    if format not in FORMATS:
        raise ExportError(f"unknown format {format!r}.{nearest(format, FORMATS)} Known: {', '.join(FORMATS)}.")
    writer = importlib.import_module(f".{FORMATS[format]}", __package__)
    known = [name for name in inspect.signature(writer.write).parameters if name != "job"]
    for name in settings:
        if name not in known:
            listed = ", ".join(known) or "none"
            raise ExportError(f"format {format!r} has no setting {name!r}.{nearest(name, known)} Known: {listed}.")
    writer.check(**settings)
    if check:
        check_runnable(format)
    return writer, *place_of(path, format)


def fitting_options(format: str, options: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Options for a format: without state where its calls know nothing of each other.

    Raises ExportError if state is asked for there, and OptionsError, ProfileError or RouterError.
    """
    options = options or {}
    parsed = Options.from_mapping(options)
    if not importlib.import_module(f".{FORMATS[format]}", __package__).STATELESS:
        return options
    for name in ("dense_steps", "dense_timestep", "refresh_steps"):
        if getattr(parsed, name):
            raise ExportError(
                f"{name} = {getattr(parsed, name)} needs a memory from step to step, which format {format!r} does not "
                "have. Leave it out, and run the dense model at dense steps; or use format 'torch' or 'aoti'."
            )
    profile = load_profile(parsed.profile) if parsed.profile != "auto" else None
    scheduled = parsed.sparsity is None and profile is not None and profile.is_scheduled
    if isinstance(parsed.sparsity, tuple) or scheduled:
        raise ExportError(
            f"a schedule of sparsity needs a memory from step to step, which format {format!r} does not have. Give "
            "`sparsity` as a number, or use format 'torch' or 'aoti'."
        )
    pattern = parsed.pattern or (profile.pattern if profile is not None else "dynamicrad")
    if PATTERNS[pattern].by_step:
        raise ExportError(
            f"pattern {pattern!r} needs a memory from step to step, which format {format!r} does not have. Take "
            "another pattern, or use format 'torch' or 'aoti'."
        )
    if parsed.qk_dtype:
        raise ExportError(
            f"qk_dtype = {parsed.qk_dtype!r} has no node in format {format!r}. "
            "Leave it out, or use format 'torch' or 'aoti'."
        )
    steps = profile.dense_steps if profile is not None else 0
    if steps and parsed.dense_steps is None:
        raise ExportError(
            f"profile {str(parsed.profile)!r} wants {steps} dense steps, for which format {format!r} has no memory. "
            "Set dense_steps to 0, and run the dense model at the first steps."
        )
    return {**options, "dense_steps": 0}


def _note_if_dense(report: Report, options: Options) -> None:
    """Note it if nothing became sparse. Raises StrictError if that was not asked for and strict=True."""
    if report.replaced:
        return
    videos = [site for site in report.sites if site.role == VIDEO]
    text = f"nothing in what is exported is sparse: 0 of {len(videos)} video self-attentions were replaced"
    if options.strict and not videos and options.pattern != "dense":
        raise StrictError(f"strict=True, and {text}, of {len(report.sites)} attentions that were found.")
    report.graphs[0].notes.append(text)


@contextmanager
def _in_eval_mode(model: torch.nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _named(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The call's arguments by name."""
    return dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)


@contextmanager
def _timed(seconds: dict[str, float], name: str, say: Callable[[str], None], line: str) -> Iterator[None]:
    say(line)
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)  # PyTorch's own, at each copy of a graph
        yield
    seconds[name] = round(time.perf_counter() - start, 3)
