"""`--set KEY=VALUE`, of the commands that take options of the backend, and `--fix KEY=VALUE` of the tuner."""

from __future__ import annotations

import json
from typing import Any

from ..errors import DynamicRadError


def key_value(text: str, option: str = "--set") -> tuple[str, Any]:
    """'sparsity=0.9' -> ('sparsity', 0.9). Values are JSON, lists may go without brackets, the rest is text."""
    key, sign, value = text.partition("=")
    if not sign or not key:
        raise DynamicRadError(f"{option} expects KEY=VALUE, got {text!r}.")
    for candidate in (value, f"[{value}]" if "," in value else value):
        try:
            return key, json.loads(candidate)
        except ValueError:
            continue
    return key, value
