"""Heads of unequal work under diffusers' Ulysses, in two processes: the output of one, and both have as much to do."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("diffusers")

from support.heads_worker import unequal_heads
from support.processes import output_of, start


def test_heads_are_dealt_by_work(tmp_path):
    ranks = json.loads(output_of(start("support.heads_worker", 2, tmp_path / "meeting")))
    as_they_come = unequal_heads().sum((1, 2)).reshape(2, 2).sum(1).tolist()
    assert max(as_they_come) > 2 * min(as_they_come)
    for rank in ranks:
        assert rank["error"] < 1e-5
        assert rank["to_dense"] > 1e-3
        assert rank["notes"] == ranks[0]["notes"]
        assert "heads dealt to 2 ranks by work" in rank["notes"][0]
    for layer in zip(*(rank["blocks"] for rank in ranks), strict=True):
        assert sum(layer) == sum(as_they_come)
        assert max(layer) < 1.05 * min(layer)
