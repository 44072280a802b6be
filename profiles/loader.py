"""Find, read and check profile files. Imports no torch."""

from __future__ import annotations

import functools
import math
import os
from importlib import resources
from pathlib import Path

from pydantic import ValidationError

from dynamicrad_compile.errors import ProfileError, nearest
from dynamicrad_compile.files import tomllib
from dynamicrad_compile.problems import problems

from .schema import Profile

# "auto" takes a profile whose video has at most so many times more or fewer frames, and tokens in a frame.
REACH = 2.5


def list_profiles() -> list[str]:
    """Names of the profiles that ship with the package, sorted."""
    files = resources.files("dynamicrad_compile.profiles").iterdir()
    return sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml"))


def load_profile(name_or_path: str | os.PathLike[str] = "auto") -> Profile:
    """Load a shipped profile by name, or a profile file by path.

    A string is a path if it ends in ".toml" or contains a path separator. "auto" is the "default" profile: which one
    fits is known only when a grid is (`pick_profile`).
    Raises ProfileError, which names the file, the key, the value and the range, and the nearest known name.
    """
    if not isinstance(name_or_path, (str, os.PathLike)):
        raise ProfileError(f"a profile is given by name or path, got {name_or_path!r}.")
    text = os.fspath(name_or_path)
    separators = [separator for separator in (os.sep, os.altsep) if separator]
    is_path = isinstance(name_or_path, os.PathLike) or text.endswith(".toml")
    if is_path or any(separator in text for separator in separators):
        return _load_file(Path(text))
    return _load_shipped("default" if text == "auto" else text)


def pick_profile(grid: tuple[int, int, int], heads: int, head_dim: int) -> tuple[Profile, str]:
    """The shipped profile that was tuned for attentions most like this one, and why it was picked.

    grid is (frames, height, width) in latent tokens; 0 frames: any number. Heads and head_dim must be those of [match];
    of several the one whose number of frames and of tokens in a frame are nearest, within a factor of REACH. Else
    "default".
    """
    found: list[tuple[float, str]] = []
    frames, area = grid[0], grid[1] * grid[2]
    for name in list_profiles():
        match = _load_shipped(name).match
        if match is None or match.head_dim != head_dim or heads not in match.heads:
            continue
        wanted = frames or match.grid[0]
        gaps = (math.log(wanted / match.grid[0]), math.log(area / (match.grid[1] * match.grid[2])))
        if max(map(abs, gaps)) <= math.log(REACH):
            found.append((sum(map(abs, gaps)), name))
    shape = f"{heads} heads of {head_dim} over {'x'.join(map(str, grid))}"
    if not found:
        return _load_shipped("default"), f"no shipped profile was tuned for {shape}"
    profile = _load_shipped(min(found)[1])
    assert profile.match is not None
    return profile, f"tuned for {'x'.join(map(str, profile.match.grid))}, the nearest to {shape}"


def parse_profile(text: str, file: str) -> Profile:
    """Check the TOML text of a profile; `file` is the name to use in errors. Raises ProfileError."""
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ProfileError(f"{file} is not valid TOML: {error}.") from None
    try:
        return Profile.model_validate(content)
    except ValidationError as error:
        raise ProfileError("\n  ".join([f"{file} is not a valid profile:", *problems(error, Profile)])) from None


@functools.cache
def _load_shipped(name: str) -> Profile:
    known = list_profiles()
    if name not in known:
        raise ProfileError(
            f"no profile is called {name!r}; shipped are {known}.{nearest(name, known)} "
            "To load a file, give its path with the ending .toml."
        )
    file = resources.files("dynamicrad_compile.profiles").joinpath(f"{name}.toml")
    return parse_profile(file.read_text(encoding="utf-8"), f"profiles/{name}.toml")


def _load_file(path: Path) -> Profile:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        known = list_profiles()
        raise ProfileError(f"no profile at {path}; shipped are {known}.{nearest(path.stem, known)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ProfileError(f"{path} can't be read as a UTF-8 text file: {error}.") from None
    return parse_profile(text, str(path))
