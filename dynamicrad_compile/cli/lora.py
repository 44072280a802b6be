"""The command `dynamicrad lora`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..errors import LoraError
from ..optional import optional


def add_lora(commands: Any) -> None:
    """Add the command to the parser of `dynamicrad`."""
    parser = commands.add_parser(
        "lora",
        help="train a LoRA through the block-sparse attention, so that the model learns to live with its mask",
        description="Train a LoRA on a transformer of diffusers by the settings of a TOML file; see docs/lora.md. "
        "For several processes: accelerate launch -m dynamicrad_compile.cli.main lora --config FILE.",
    )
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="settings, TOML")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted training")
    parser.add_argument("--check", action="store_true", help="check settings, model and the first clip; train nothing")
    parser.set_defaults(run=_lora)


def _lora(args: argparse.Namespace) -> int:
    from ..lora.checks import check_place, check_training
    from ..lora.data import ClipFolder
    from ..lora.settings import load_settings

    settings = load_settings(args.config)
    check_place(settings, args.resume)
    assert settings.data is not None
    assert settings.model is not None
    clips = ClipFolder(settings.data.clips)
    held_out = ClipFolder(settings.data.held_out) if settings.data.held_out else None
    model = load_transformer(settings.model.path, settings.model.dtype)
    shapes = {name: list(x.shape) for name, x in {"latents": clips[0].latents, **clips[0].conditions}.items()}
    print(f"{type(model).__name__}, {len(clips)} clips of {shapes}, {len(held_out) if held_out else 'none'} held out")
    if args.check:
        check_training(model, clips, settings)
        return 0
    from ..lora.trainer import finetune

    try:
        result = finetune(model, clips, settings, held_out, resume=args.resume)
    except KeyboardInterrupt:
        print(f"\nInterrupted. The same command with --resume goes on from {settings.output}.")
        return 130
    print(f"{result.report.summary()}\nwrote {settings.output}/adapter after {result.steps} steps")
    return 0


def load_transformer(path: str, dtype: str) -> Any:
    """A transformer of diffusers from its folder, or from the folder `transformer` of a pipeline; LoraError if none."""
    import torch

    diffusers = optional("diffusers", "training needs", "lora", LoraError)
    folder = Path(path)
    if (folder / "model_index.json").is_file():
        folder = folder / "transformer"
    file = folder / "config.json"
    if not file.is_file():
        raise LoraError(f"there is no config.json in {folder}: model.path must be a transformer or a pipeline folder.")
    try:
        name = json.loads(file.read_text(encoding="utf-8")).get("_class_name")
    except ValueError as error:
        raise LoraError(f"{file} is not valid JSON: {error}.") from None
    cls = getattr(diffusers, str(name), None)
    if cls is None or not hasattr(cls, "load_lora_adapter"):
        raise LoraError(f"{file} names {name!r}, which is no transformer of diffusers that can hold a LoRA.")
    try:
        return cls.from_pretrained(folder, torch_dtype=getattr(torch, dtype), use_safetensors=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise LoraError(f"the transformer in {folder} can't be loaded: {error}") from None
