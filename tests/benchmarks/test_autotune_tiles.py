"""The script that writes measured tiles into the table."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import autotune_tiles
import pytest

from dynamicrad_compile.kernels.tiles import TABLE, Tile, read_table

ABOUT = {"device": "cuda", "arch": "sm_90", "dtype_class": "half", "chip": "NVIDIA H200", "date": "2026-12-01"}
FASTER = {"head_dim": 128, "tile": [128, 128, 8, 2], "kernel": "tma", "score": 1.0, "current_score": 1.2}


@pytest.fixture
def files(tmp_path: Path):
    table = tmp_path / "tiles.toml"
    shutil.copy(TABLE, table)

    def run(content: dict, *flags: str) -> Path:
        result = tmp_path / "run.json"
        result.write_text(json.dumps(content))
        autotune_tiles.main([str(result), "--table", str(table), *flags])
        return table

    return run


def test_a_faster_tile_is_written(files):
    table = files({"about": ABOUT, "tile_proposal": [FASTER]})
    after, before = read_table(table), read_table()
    source = "measured: NVIDIA H200, 2026-12-01"
    assert after[90]["half"][128].tiles.pop("forward_tma") == Tile(128, 128, 8, 2, kernel="tma", source=source)
    assert after[90]["half"][128].use == ("forward_tma",)
    after[90]["half"][128].use = before[90]["half"][128].use
    before[90]["half"][128].tiles.pop("forward_tma")
    assert after == before
    assert table.read_text().startswith(TABLE.read_text().split("\n\n")[0])


@pytest.mark.parametrize(("gain", "used"), [(1.2, ("forward_tma", "dq_tma", "dk_dv_tma")), (1.01, ("forward_tma",))])
def test_a_faster_backward_is_used(files, gain: float, used: tuple[str, ...]):
    backward = {"head_dim": 128, "kernel": "tma", "gain": gain}
    table = files({"about": ABOUT, "tile_proposal": [FASTER], "backward_proposal": [backward]})
    assert read_table(table)[90]["half"][128].use == used
    assert read_table(table)[90]["half"][64].use == ()


@pytest.mark.parametrize("flags", [["--dry-run"], ["--margin", "0.3"]])
def test_nothing_is_written(files, flags: list[str]):
    assert files({"about": ABOUT, "tile_proposal": [FASTER]}, *flags).read_text() == TABLE.read_text()


def test_an_architecture_may_be_new(files):
    table = files({"about": ABOUT | {"arch": "sm_103"}, "tile_proposal": [FASTER | {"current_score": None}]})
    assert read_table(table)[103]["half"][128].use == ("forward_tma",)


@pytest.mark.parametrize(
    "content", [{}, {"about": ABOUT}, {"about": ABOUT | {"device": "cpu"}, "tile_proposal": [FASTER]}]
)
def test_a_run_without_proposal(files, content: dict):
    with pytest.raises(SystemExit, match=r"no tile proposal in it. Make one on a GPU"):
        files(content)


def test_a_proposal_that_is_no_tile(files):
    with pytest.raises(SystemExit, match="block_m must be a power of two"):
        files({"about": ABOUT, "tile_proposal": [FASTER | {"tile": [100, 128, 8, 2]}]})
