"""Libraries that only some commands need: imported at their first use, with a message that says how to get them."""

from __future__ import annotations

import importlib
from typing import Any

from .errors import DynamicRadError

DISTRIBUTIONS = {"PIL": "pillow", "skimage": "scikit-image", "sklearn": "scikit-learn"}
"""Names on a package index of the modules that are called otherwise."""


def optional(module: str, task: str, extra: str, error: type[DynamicRadError] = DynamicRadError) -> Any:
    """Import a module of an optional library, such as "safetensors.torch".

    task   what can't be done without it, with its verb: "saving routers needs", "pictures need"
    extra  the extra of this package that installs it
    Raises `error` where the library, or one that it needs itself, is missing.
    """
    try:
        importlib.import_module(module.partition(".")[0])
        return importlib.import_module(module)
    except ImportError as missing:
        name = (missing.name or module).partition(".")[0]
        name = DISTRIBUTIONS.get(name, name)
        raise error(f"{task} {name}: pip install 'dynamicrad-compile[{extra}]'.") from None
