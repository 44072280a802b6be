"""Heads of the option plan that processes share: who has which, the same on all, and what is said of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import dynamicrad_compile as drad
from dynamicrad_compile.passes import Conditions, Dense, Site, TextTokens, VideoSite
from dynamicrad_compile.passes.axes.labels import Peers
from dynamicrad_compile.passes.site import HeadExchange, Trace
from dynamicrad_compile.policy import Wishes, decide

WAY = HeadExchange((), (None, 0))
UNEQUAL, EVEN = (4, 4, 1, 1), (4, 1, 4, 1)


def video(rank=0, number=2, exchange=WAY, heads=2):
    return VideoSite(
        site=Site(None, None, "blocks.0.attn1"),
        grid=(4, 6, 8),
        text=TextTokens(0, 0),
        shape=(1, heads, 192, 64),
        dtype=torch.float32,
        device=torch.device("cpu"),
        trace=Trace([], [], True),
        axes=(),
        peers=None if number == 1 else Peers(tuple(range(number)), rank),
        exchange=exchange,
    )


def mask(width):
    """[heads, 12, 12]: each row of head h reads width[h] blocks."""
    rows = torch.arange(12)
    return torch.stack([(rows[:, None] - rows) % 12 < n for n in width])


def decided(*sites, width=UNEQUAL, **options):
    options = {"min_tokens": 0, "block_size": 16, "plan": mask(width), **options}
    found = decide(sites, Conditions(), Wishes.of(drad.Options(**options)))
    return found, [line for line in found.notes if line.startswith("heads ")]


def blocks(planned):
    return planned.table.plan.kv_counts[0, :, 0].tolist()


def test_all_processes_find_the_same_order():
    found = [decided(video(rank)) for rank in range(2)]
    assert [notes for _, notes in found] == [
        ["heads dealt to 2 ranks by work: ranks differ by 0.0% (as they come: 60.0%)"]
    ] * 2
    first, second = (decisions.sites[0] for decisions, _ in found)
    assert first.head_order == second.head_order
    assert sorted(first.head_order) == [0, 1, 2, 3]
    assert sum(blocks(first)) == sum(blocks(second)) == 5
    assert blocks(first) + blocks(second) == [UNEQUAL[head] for head in first.head_order]


def test_sites_share_the_share():
    (first, second), _ = (found := decided(video(), video()))[0].sites, found
    assert first.table is second.table


@pytest.mark.parametrize(
    ("site", "width", "note"),
    [
        (
            video(1, exchange=None),
            UNEQUAL,
            "heads on 2 ranks as they come, and the graph does not let them be dealt by work: ranks differ by 60.0%",
        ),
        (video(1), EVEN, ""),
        (video(3, 4, heads=1), (1, 1, 4, 4), "heads on 4 ranks as they come: ranks differ by 60.0%"),
    ],
    ids=["no way", "even", "one head each"],
)
def test_as_they_come(site, width, note):
    found, notes = decided(site, width=width)
    assert found.sites[0].head_order is None
    assert blocks(found.sites[0]) == list(width[slice(*site.heads)])
    assert notes == [note][: bool(note)]


def test_whole_plans_are_left_alone():
    for site, plan in ((video(), mask(UNEQUAL)[0]), (video(number=1, heads=4), mask(UNEQUAL))):
        found, notes = decided(site, plan=plan)
        assert (found.sites[0].head_order, notes) == (None, [])
        assert len(blocks(found.sites[0])) == (1 if plan.dim() == 2 else 4)


def test_whether_it_pays_is_asked_of_all_heads(monkeypatch):
    """One process must not stay dense, with its heads as they come, where others have dealt theirs."""
    asked = []

    def gain(arch, tokens, sparsity, *_):
        asked.append(sparsity)

    monkeypatch.setattr("dynamicrad_compile.policy.gain.crossover.expected_gain", gain)
    for rank in range(2):
        found, _ = decided(replace(video(rank), dtype=torch.bfloat16), min_tokens="auto", width=(12, 12, 1, 12))
        assert isinstance(found.sites[0], Dense)
    assert asked == [pytest.approx(1 - 37 / 48)] * 2
