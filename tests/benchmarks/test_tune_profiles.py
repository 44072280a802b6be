"""Shipped profiles are as trained attention wants them; what a search preferred is replaced where it is not."""

from __future__ import annotations

import json
import shutil

import pytest
from tune_profiles import SHIPPED, allowed, finish

from dynamicrad_compile.files import to_toml, tomllib
from dynamicrad_compile.profiles import list_profiles, load_profile

TUNED = sorted(set(list_profiles()) - {"default"})


@pytest.mark.parametrize("name", TUNED)
def test_shipped_profiles(name):
    profile = load_profile(name)
    for regime in ("low", "mid", "high"):
        static, dynamic = profile.regime(regime).tables
        for table in (static, dynamic):
            assert allowed(regime, table.model_dump())
            assert table.covariance
            assert table.compensate > 0.5
        assert dynamic.rank == "error"
    assert "fixed by what trained attention showed" in profile.provenance.source


def test_a_winner_that_is_not_allowed_gives_way_to_the_best_that_is(tmp_path):
    """In high motion a column wins, and in low motion a plan that leaves nothing to choose."""
    path = tmp_path / "wan-480p.toml"
    shutil.copy(SHIPPED / path.name, path)
    tables = tomllib.loads(path.read_text())
    kept = {r: {m: dict(t) for m, t in modes.items()} for r, modes in tables["regimes"].items()}
    tables["regimes"]["high"]["static_ratio"]["box"] = [16, 2, 4]
    tables["regimes"]["low"]["dynamic_threshold"]["near"] = 1.0
    path.write_text(to_toml(tables))
    lines = [{"journal": 2}]
    for place, table in (("high", "static_ratio"), kept), (("low", "dynamic_threshold"), kept):
        good = table[place[0]][place[1]]
        for stage, box, loss in (
            ("search", good["box"], 5.0),
            ("search", [16, 2, 4], 9.0),
            ("sweep", good["box"], 0.1),
        ):
            found = {"status": "ok", "loss": loss, "sparsity": 0.81, "parameters": {**good, "box": box}}
            lines.append({"stage": stage, "regime": place[0], "mode": place[1], "evaluation": found})
    path.with_suffix(".jsonl").write_text("\n".join(map(json.dumps, lines)))
    finish(path)
    profile = load_profile(path)
    assert profile.regime("high").static_ratio.box == tuple(kept["high"]["static_ratio"]["box"])
    assert profile.regime("low").dynamic_threshold.near == kept["low"]["dynamic_threshold"]["near"]
    assert profile.provenance.loss["low_dynamic_threshold"] == 5.0
    assert "low_dynamic_threshold_held_out" not in profile.provenance.loss
    assert "mid_dynamic_threshold_held_out" in profile.provenance.loss
    assert profile.provenance.source.endswith("for low dynamic_threshold, high static_ratio")
