"""Configurations of models on Hugging Face that are in its local cache; nothing is asked of the network."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from ..errors import DynamicRadError
from ..optional import optional
from .presets import HUB_IDS

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def cached_folder(name: str) -> Path | None:
    """The folder with the configuration of a pipeline or transformer; None for what is no id, or an id of HUB_IDS.

    Raises DynamicRadError if the configuration is not in the cache.
    """
    if not HUB_ID.fullmatch(name):
        return None
    hub = optional("huggingface_hub", "models by name need", "diffusers")
    for file in ("transformer/config.json", "config.json"):
        try:
            found = hub.try_to_load_from_cache(name, file)
        except ValueError:  # no valid id
            return None
        if isinstance(found, str):
            return Path(found.removesuffix(file))
    if name in HUB_IDS:
        return None
    alike = difflib.get_close_matches(name, HUB_IDS, n=1)
    preset = f", or take the preset {HUB_IDS[alike[0]]!r}, which is {alike[0]}" if alike else ""
    raise DynamicRadError(
        f"no such path as {name!r}, and no such model in the local cache of Hugging Face "
        f"({hub.constants.HF_HUB_CACHE}). Get its configuration with "
        f"`hf download {name} transformer/config.json`{preset}."
    )
