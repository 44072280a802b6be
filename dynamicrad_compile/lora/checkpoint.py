"""What a training leaves behind: the adapter in diffusers' format, the state to resume from, the journal of losses.

Each file is written beside its place and moved there, so a crash leaves the old one or the new one, never half of one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import LoraError
from ..files import write_file

ADAPTER_FILE = "pytorch_lora_weights.safetensors"  # the name that diffusers looks for
STATE_FILE, JOURNAL_FILE, CURVE_FILE = "resume.safetensors", "losses.jsonl", "losses.png"
PREFIX = "transformer"
VERSION = "1"


def write_adapter(model: Any, folder: Path, name: str) -> Path:
    """Write the adapter `name` so that `model.load_lora_adapter(folder)` and `pipe.load_lora_weights(folder)` take it.

    Keys and metadata are those of diffusers' pipelines: the prefix "transformer." before the names of peft.
    """
    from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save

    weights = get_peft_model_state_dict(model, adapter_name=name)
    config = model.peft_config[name].to_dict()
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    metadata = json.dumps({f"{PREFIX}.{key}": value for key, value in plain.items()}, sort_keys=True)
    blob = save(
        {f"{PREFIX}.{key}": value.detach().cpu().contiguous() for key, value in weights.items()},
        metadata={"format": "pt", LORA_ADAPTER_METADATA_KEY: metadata},
    )
    return write_file(folder / ADAPTER_FILE, blob)


def write_state(file: Path, step: int, settings: str, weights: dict[str, Tensor], optimizer: Any) -> None:
    """Write adapter weights, AdamW's moments and the number of finished steps; `settings` are those that must agree."""
    from safetensors.torch import save

    tensors = {f"weight.{name}": weight.detach().cpu().contiguous() for name, weight in weights.items()}
    for name, weight in weights.items():
        for key, value in optimizer.state.get(weight, {}).items():
            tensors[f"{key}.{name}"] = torch.as_tensor(value).detach().cpu().contiguous()
    write_file(file, save(tensors, metadata={"version": VERSION, "step": str(step), "settings": settings}))


def read_state(file: Path, settings: str, weights: dict[str, Tensor], optimizer: Any) -> int:
    """Put what `write_state` wrote into weights and optimizer; returns the number of finished steps.

    Raises LoraError if the file is missing, of another kind, or of a training with other settings.
    """
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise LoraError(f"there is nothing to resume: {file} is missing. Start without resuming.")
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise LoraError(f"{file} is not a safetensors file: {error}.") from None
    if metadata.get("version") != VERSION or "step" not in metadata:
        raise LoraError(f"{file} is no state of a LoRA training (version {VERSION}).")
    _check_settings(file, json.loads(metadata.get("settings", "{}")), json.loads(settings))
    found = {key.removeprefix("weight.") for key in tensors if key.startswith("weight.")}
    if found != set(weights):
        different = sorted(found ^ set(weights))[:3]
        raise LoraError(f"{file} is of another model or other targets: {different} are in one of the two only.")
    state: dict[Tensor, dict[str, Tensor]] = {weight: {} for weight in weights.values()}
    for key, value in tensors.items():
        kind, _, name = key.partition(".")
        if kind == "weight":
            with torch.no_grad():
                weights[name].copy_(value)
        else:
            state[weights[name]][kind] = value if kind == "step" else value.to(weights[name].device)
    optimizer.state.update({weight: values for weight, values in state.items() if values})
    return int(metadata["step"])


def _check_settings(file: Path, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    different = [name for name in ours if theirs.get(name) != ours[name]]
    if different:
        details = "; ".join(f"{name} was {theirs.get(name)!r}, now {ours[name]!r}" for name in different)
        raise LoraError(f"{file} is of a training with other settings: {details}. Use the same, or another output.")


class Journal:
    """The losses: one JSON object a line, {"step", "loss", ...} or {"step", "held_out", ...}."""

    def __init__(self, file: Path, keep_until: int | None) -> None:
        """Start anew, or go on behind step `keep_until`: lines of later steps are dropped."""
        self.file = file
        self.lines: list[dict[str, Any]] = []
        if keep_until is not None and file.is_file():
            for text in file.read_text(encoding="utf-8").splitlines():
                try:
                    line = json.loads(text)
                except ValueError:  # cut short by a crash
                    break
                if line["step"] <= keep_until:
                    self.lines.append(line)
        write_file(file, "".join(json.dumps(line) + "\n" for line in self.lines))

    def add(self, **line: Any) -> None:
        """Append a line; it is in the file when this returns."""
        self.lines.append(line)
        with self.file.open("a", encoding="utf-8") as opened:
            opened.write(json.dumps(line) + "\n")
