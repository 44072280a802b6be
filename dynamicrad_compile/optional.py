"""Libraries that only some commands need: imported at their first use, with a message that says how to get them."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from collections.abc import Iterator
from typing import Any

from .errors import DynamicRadError

DISTRIBUTIONS = {
    "PIL": "pillow",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "torch_tensorrt": "torch-tensorrt",
}
"""Names on a package index of the modules that are called otherwise."""

OURS = "dynamicrad-compile"


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
        raise error(f"{task} {DISTRIBUTIONS.get(name, name)}: {install(extra, name)}.") from None


def install(extra: str, *modules: str) -> str:
    """The command that installs what is missing of an extra, such as "pip install 'pillow>=10'".

    modules  what was found missing: a package of the extra, or one that such a package needs

    This package need not be on an index, so the command names the packages and not the extra.
    """
    wanted = [DISTRIBUTIONS.get(name, name) for name in modules]
    known = {_name(text): text for text in _requirements(extra)}
    named = {_name(text) for text in wanted}
    missing = [text for name, text in known.items() if name in named or not _is_installed(name)]
    missing += [text for text in wanted if _name(text) not in known]
    return "pip install " + " ".join(f"'{text}'" if re.search(r"[^\w.-]", text) else text for text in missing)


def _requirements(extra: str) -> Iterator[str]:
    """Requirements of an extra, also of extras that it includes; none where the package is not installed."""
    try:
        declared = importlib.metadata.requires(OURS) or []
    except importlib.metadata.PackageNotFoundError:
        return
    for text in declared:
        requirement, _, marker = text.partition(";")
        if re.search(rf"""extra\s*==\s*["']{extra}["']""", marker) is None:
            continue
        included = re.fullmatch(rf"{OURS}\[(.+)\]", requirement.strip())
        if included is None:
            yield requirement.strip()
        else:
            for one in included[1].split(","):
                yield from _requirements(one.strip())


def _name(requirement: str) -> str:
    """The normal form of a distribution's name, of a requirement."""
    found = re.match(r"[\w.-]+", requirement)
    return re.sub(r"[-_.]+", "-", found[0] if found else requirement).lower()


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
