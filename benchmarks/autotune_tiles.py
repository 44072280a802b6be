"""Write the tiles that a GPU run found fastest into the tile table of the kernels.

    bash benchmarks/gpu_day.sh --name day                          # on the GPU: the tiles worth a look, of every form
    python benchmarks/gpu_suite.py --tiles --name tiles            # or every admissible tile
    python benchmarks/autotune_tiles.py benchmarks/results/day.json

An entry is replaced where the proposal is faster than the entry in use by more than `--margin`; its source becomes chip
and date. The backward takes the form that was faster, with its tiles as they are. The table is checked before it is
written, in one piece. `--dry-run` only says what would change.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from dynamicrad_compile.errors import PlanError
from dynamicrad_compile.files import toml_value, whole_file
from dynamicrad_compile.kernels.tiles import TABLE, Section, Table, Tile, read_table


def to_toml(table: Table, comment: str) -> str:
    """The table as TOML, below `comment`."""
    lines = [comment.rstrip("\n")]
    for arch, dtypes in sorted(table.items(), key=lambda entry: (isinstance(entry[0], str), entry[0])):
        for dtype, dims in sorted(dtypes.items(), reverse=True):
            for dim, section in sorted(dims.items()):
                lines += ["", f"[{f'sm_{arch}' if isinstance(arch, int) else arch}.{dtype}.{dim}]"]
                lines += [f"use = {toml_value(list(section.use))}"] * bool(section.use)
                for name, tile in section.tiles.items():
                    sizes = [tile.block_m, tile.block_n, tile.num_warps, tile.num_stages]
                    lines.append(f"{name} = {toml_value({'tile': sizes, 'source': tile.source})}")
    return "\n".join(lines) + "\n"


def update(table: Table, content: dict, margin: float) -> list[str]:
    """Put the proposals of a run's JSON into the table; what changed, a line each.

    Raises PlanError if the JSON is not of a run on a GPU that timed tiles.
    """
    about = content.get("about", {})
    proposals, dtype = content.get("tile_proposal"), about.get("dtype_class")
    arch = int(str(about.get("arch", "")).removeprefix("sm_") or 0) if about.get("device") == "cuda" else 0
    if not proposals or not arch or dtype not in ("half", "float"):
        raise PlanError("no tile proposal in it. Make one on a GPU: bash benchmarks/gpu_day.sh")
    changes = []
    entries = table.setdefault(arch, {}).setdefault(dtype, {})
    for proposal in proposals:
        dim, now = proposal["head_dim"], proposal.get("current_score")
        if now is not None and now < proposal["score"] * (1 + margin):
            continue
        tile = Tile(*proposal["tile"], kernel=proposal["kernel"], source=f"measured: {about['chip']}, {about['date']}")
        section = entries.setdefault(dim, Section({}))
        name = "forward" if tile.kernel == "triton" else f"forward_{tile.kernel}"
        before = section.tiles.get(name)
        section.tiles[name] = tile
        others = tuple(other for other in section.use if not other.startswith("forward_"))
        section.use = others if name == "forward" else (*others, name)
        gain = "new entry" if now is None else f"{now / proposal['score'] - 1:.1%} faster"
        changes.append(f"sm_{arch} {dtype} head_dim {dim}: {before} -> {tile}, {gain}")
    for proposal in content.get("backward_proposal", ()):
        dim, gain = proposal["head_dim"], proposal["gain"]
        if dim in entries and gain > 1 + margin and _use_backward(entries[dim], proposal["kernel"]):
            changes.append(f"sm_{arch} {dtype} head_dim {dim}: backward by {proposal['kernel']}, {gain - 1:.1%} faster")
    return changes


def _use_backward(section: Section, variant: str) -> bool:
    """Let the backward's kernels run in this form, where the section has its tile; whether that is a change."""
    wanted = tuple(name for name in (f"dq_{variant}", f"dk_dv_{variant}") if name in section.tiles)
    use = (*(name for name in section.use if name.startswith("forward_")), *wanted)
    changed = set(use) != set(section.use)
    section.use = use
    return changed


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("result", type=Path, help="JSON of benchmarks/gpu_day.sh, or of gpu_suite.py --tiles")
    parser.add_argument("--table", type=Path, default=TABLE, help="table to rewrite (that of the package)")
    parser.add_argument("--margin", type=float, default=0.02, help="gain below which an entry stays (0.02)")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args(argv)
    try:
        table = read_table(args.table)
        changes = update(table, json.loads(args.result.read_text()), args.margin)
    except (OSError, ValueError, KeyError, TypeError, PlanError) as error:
        sys.exit(f"{args.result}: {error}")
    print("\n".join(changes) or "every entry in use is the fastest, or within the margin")
    if args.dry_run or not changes:
        return
    comment = "\n".join(line for line in args.table.read_text().splitlines() if line.startswith("#"))
    with whole_file(args.table) as partial:
        partial.write_text(to_toml(table, comment), encoding="utf-8")
        read_table(partial)


if __name__ == "__main__":
    main()
