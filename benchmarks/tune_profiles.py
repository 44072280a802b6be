"""Tune the shipped profiles at the token grids of the models they are for.

    OMP_NUM_THREADS=1 python benchmarks/tune_profiles.py --list
    OMP_NUM_THREADS=1 python benchmarks/tune_profiles.py wan-480p --workers 2
    OMP_NUM_THREADS=1 python benchmarks/tune_profiles.py            # all of them, one after another

Profiles, journals and pictures go to outputs/profiles. A run that was interrupted goes on where it stopped; a
profile that is finished is skipped. `--install` copies the finished profiles to the package's folder.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dynamicrad_compile as drad
from dynamicrad_compile.files import to_toml, tomllib, write_file
from dynamicrad_compile.profiles import load_profile
from dynamicrad_compile.tuning.boxes import shapes
from dynamicrad_compile.tuning.task import DEFAULT_OPTIMIZER

OUTPUT = Path("outputs/profiles")
SHIPPED = Path(__file__).parents[1] / "profiles"
# What trained attention says (docs/quality.md): choice by error and covariances are the best in every regime, and boxes
# of at least four frames, long in time where little moves and compact where much does. Proxies agree, all but for boxes
# of fewer frames; which of these boxes it is, they choose.
FIXED = {"covariance": True, "rank": "error", "criterion": "ratio", "thinning": 0.0}
FRAMES = {"low": (8, 32), "mid": (4, 32), "high": (4, 8)}
# A choice by content is among at least two candidates for each block that stays. The proxies have heads that attend by
# place alone, for which few candidates are best, at some grids so few that nothing is left to choose.
MOST_KEPT = 0.5
RESTS_ON = (
    "covariances, choice by error, mode auto and boxes of at least 4 frames are fixed by what trained attention showed "
    "(two small video models, docs/quality.md), at least two candidates a block and boxes of at least 8 frames in low "
    "and at most 8 in high motion by hand; which box, and the rest, by a "
)


@dataclass(frozen=True)
class Target:
    """A model family at a resolution and length.

    grid is in latent tokens: frames = 1 + (video frames - 1) / temporal compression (and patching), and pixels over
    the product of spatial compression and patch. Text counts where it is part of the self-attention.
    """

    models: tuple[str, ...]
    grid: tuple[int, int, int]
    heads: tuple[int, ...]
    head_dim: int
    layers: int
    what: str
    text_before: int = 0
    text_after: int = 0
    dense_layers: int = 0
    dense_steps: int = 0


WAN = ("Wan2.1 1.3B", "Wan2.1 14B", "Wan2.2 A14B", "Wan VACE", "SkyReels V2")
TARGETS = {
    "wan-480p": Target(WAN, (21, 30, 52), (12, 40), 128, 40, "81 frames of 832 x 480"),
    "wan-480p-long": Target(WAN, (41, 30, 52), (12, 40), 128, 40, "161 frames of 832 x 480"),
    "wan-720p": Target(WAN, (21, 45, 80), (12, 40), 128, 40, "81 frames of 1280 x 720"),
    "wan-720p-long": Target(WAN, (41, 45, 80), (12, 40), 128, 40, "161 frames of 1280 x 720"),
    "wan2.2-5b": Target(("Wan2.2 TI2V 5B",), (31, 22, 40), (24,), 128, 30, "121 frames of 1280 x 704"),
    "hunyuan-540p": Target(("HunyuanVideo",), (33, 34, 60), (24,), 128, 60, "129 frames of 960 x 544", text_after=256),
    "hunyuan-720p": Target(("HunyuanVideo",), (33, 45, 80), (24,), 128, 60, "129 frames of 1280 x 720", text_after=256),
    "hunyuan1.5-480p": Target(
        ("HunyuanVideo 1.5",), (31, 30, 53), (16,), 128, 54, "121 frames of 848 x 480", text_after=1985
    ),
    "hunyuan1.5-720p": Target(
        ("HunyuanVideo 1.5",), (31, 45, 80), (16,), 128, 54, "121 frames of 1280 x 720", text_after=1985
    ),
    "cogvideox": Target(
        ("CogVideoX 2B", "CogVideoX 5B"), (13, 30, 45), (30, 48), 64, 42, "49 frames of 720 x 480", text_before=226
    ),
    "cogvideox1.5": Target(
        ("CogVideoX1.5 5B",), (11, 48, 85), (48,), 64, 42, "81 frames of 1360 x 768", text_before=226
    ),
    "mochi": Target(("Mochi 1",), (28, 30, 53), (24,), 128, 48, "163 frames of 848 x 480", text_after=256),
    "ltx": Target(("LTX-Video 2B",), (33, 22, 40), (32,), 64, 28, "257 frames of 1280 x 704"),
    "minimax-h3": Target(("MiniMax-H3",), (37, 24, 42), (56,), 128, 50, "124 frames of 1344 x 768", text_before=670),
    "ltx-13b": Target(("LTX-Video 13B",), (33, 22, 40), (32,), 128, 48, "257 frames of 1280 x 704"),
}


def tune_target(name: str, arguments: argparse.Namespace) -> Path:
    """Tune one profile, or go on with it; returns its path."""
    target = TARGETS[name]
    path = OUTPUT / f"{name}.toml"
    boxes = [box for box in shapes(target.grid, 128) if not isinstance(box, str) and box[0] >= 4]
    drad.tune(
        target.grid,
        path,
        text_before=target.text_before,
        text_after=target.text_after,
        heads=arguments.heads,
        head_dim=target.head_dim,
        sparsity=arguments.sparsity,
        budget=arguments.budget,
        optimizer=arguments.optimizer,
        workers=arguments.workers,
        seeds=arguments.seeds,
        fixed=FIXED,
        boxes=boxes,
        header={
            "description": f"{', '.join(target.models)}: {target.what}.",
            "dense_layers": target.dense_layers,
            "dense_steps": target.dense_steps,
            "mode": "auto",
        },
        match={"models": list(target.models), "heads": list(target.heads), "layers": target.layers},
        resume=True,
    )
    finish(path)
    return path


def allowed(regime: str, parameters: dict[str, Any]) -> bool:
    """Whether a table is as trained attention wants it."""
    least, most = FRAMES[regime]
    return least <= parameters["box"][0] <= most and parameters.get("near", 0.0) <= MOST_KEPT


def finish(path: Path) -> None:
    """Say what a tuned profile rests on; where a winner is not `allowed`, take the best evaluation that is."""
    tables = tomllib.loads(path.read_text())
    provenance = tables["provenance"]
    provenance["source"] = RESTS_ON + provenance["source"]
    entries = [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()[1:]]
    replaced = []
    for regime, modes in tables["regimes"].items():
        for mode in (mode for mode, table in modes.items() if not allowed(regime, table)):
            place = ("search", regime, mode)
            found = [e["evaluation"] for e in entries if (e["stage"], e["regime"], e["mode"]) == place]
            found = [e for e in found if e["status"] == "ok" and allowed(regime, e["parameters"])]
            best = min((e for e in found if e["sparsity"] >= 0.8), key=lambda e: e["loss"])
            modes[mode] = best["parameters"]
            replaced.append(f"{regime} {mode}")
            for name in ("loss", "sparsity"):
                provenance[name][f"{regime}_{mode}"] = round(best[name], 4)
                provenance[name].pop(f"{regime}_{mode}_held_out", None)
    if replaced:
        provenance["source"] += f"; the search preferred others, which this excludes, for {', '.join(replaced)}"
    write_file(path, to_toml(tables))
    load_profile(path)


def main(argv: list[str] | None = None) -> int:
    """Tune the profiles that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="profiles to tune (all)")
    parser.add_argument("--list", action="store_true", help="print the profiles and their grids")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--optimizer", default=DEFAULT_OPTIMIZER)
    parser.add_argument("--budget", type=int, default=30)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2], help="of the proxies' draws (1 2)")
    parser.add_argument("--heads", type=int, default=4, help="heads of the video proxy (4)")
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--install", action="store_true", help="copy finished profiles to the package")
    arguments = parser.parse_args(argv)
    unknown = [name for name in arguments.names if name not in TARGETS]
    if unknown:
        parser.error(f"no profile is called {unknown[0]!r}; known are {', '.join(TARGETS)}")
    if arguments.list:
        for name, target in TARGETS.items():
            print(f"{name:18s} {'x'.join(map(str, target.grid)):10s} {target.what}, {', '.join(target.models)}")
        return 0
    for name in arguments.names or TARGETS:
        path = OUTPUT / f"{name}.toml"
        if not path.exists():
            begin = time.perf_counter()
            print(f"{name}: {TARGETS[name].what}", file=sys.stderr)
            tune_target(name, arguments)
            print(f"{path}: {time.perf_counter() - begin:.0f} s")
        if arguments.install:
            shutil.copy(path, SHIPPED / path.name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
