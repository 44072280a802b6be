"""An example call in a file: tensors as safetensors, everything else as JSON in the file's header."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import ExportError
from ..optional import optional


def write_sample(file: Path, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Write the arguments of a call: tensors, numbers, texts, None, and lists, tuples and dicts of them."""
    tensors: dict[str, torch.Tensor] = {}
    call = {"args": _encode(list(args), tensors), "kwargs": _encode(dict(kwargs), tensors)}
    _safetensors().save_file(tensors, file, {"call": json.dumps(call)})


def read_sample(file: Path) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) of `write_sample`."""
    import safetensors

    _safetensors()
    with safetensors.safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        call = json.loads(opened.metadata()["call"])
    return tuple(_decode(call["args"], tensors)), _decode(call["kwargs"], tensors)


def flat_tensors(value: Any) -> list[torch.Tensor]:
    """All tensors in nested lists, tuples and dicts, in order."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _encode(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"dict": {str(key): _encode(item, tensors) for key, item in value.items()}}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__: [_encode(item, tensors) for item in value]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ExportError(f"an example call may hold tensors, numbers, texts and None, got {type(value).__name__}.")


def _decode(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _decode(item, tensors) for key, item in content.items()}
    items = [_decode(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items


def _safetensors() -> Any:
    return optional("safetensors.torch", "check=True needs", "export", ExportError)
