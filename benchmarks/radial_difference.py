"""How our radial masks differ from the published ones on ragged grids: a table, and PNGs of two cases.

    python benchmarks/radial_difference.py --images docs

The published masks are those in tests/data (mit-han-lab/radial-attention @72788d4), where its code did not
crash.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from dynamicrad_compile.plans.make import make_plan
from dynamicrad_compile.reporting.plot import frame_boundaries, plot_difference

GOLDEN = Path(__file__).parents[1] / "tests" / "data" / "radial_wan_small.npz"
DECAY = 0.5
HEADER = (
    "| T x F | block | padded | published mask | rows without a key | diagonal missing "
    "| tokens without a row | sparsity published | sparsity ours | only ours | only published |"
)
# (tokens per frame, frames, block size) of the cases to draw.
DRAWN = {(240, 12, 128): "radial_240x12_b128.png", (880, 10, 128): "radial_880x10_b128.png"}


def main() -> None:
    """Print the table; draw the cases of DRAWN into the folder given by --images."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, help="folder for the PNGs")
    images = parser.parse_args().images
    print(HEADER)
    print("|-" * HEADER.count("| ") + "|")
    with np.load(GOLDEN) as archive:
        for case in json.loads(str(archive["meta"]))["cases"]:
            tokens, frames, block = case["tpf"], case["F"], case["bs"]
            if case["df"] != DECAY or tokens % block == 0:
                continue
            plan = make_plan("radial", (frames, 1, tokens), block, decay_factor=DECAY)
            mask = plan.block_mask()[0, 0].numpy()
            head = f"| {tokens} x {frames} | {block} | {'yes' if case['pad'] else 'no'} "
            ours = f"{1 - mask.mean():.3f}"
            if case["error"]:
                print(f"{head}| crashes | - | - | - | - | {ours} | - | - |")
                continue
            side = case["s"] // block
            published = np.unpackbits(archive[case["key"]])[: side * side].reshape(side, side).astype(bool)
            shared = mask[:side, :side]
            empty = int((~published.any(axis=1)).sum())
            print(
                f"{head}| {side} x {side} | {empty} | {(~published.diagonal()).sum()} "
                f"| {max(0, frames * tokens - side * block)} | {1 - published.mean():.3f} | {ours} "
                f"| {(shared & ~published).sum()} | {(published & ~shared).sum()} |"
            )
            name = DRAWN.get((tokens, frames, block))
            if images and name and not case["pad"]:
                plot_difference(
                    mask,
                    published,
                    images / name,
                    block_size=block,
                    seq_len=frames * tokens,
                    names=("ours", "published"),
                    title=f"{frames} frames of {tokens} tokens",
                    boundaries=frame_boundaries((frames, 1, tokens)),
                )


if __name__ == "__main__":
    main()
