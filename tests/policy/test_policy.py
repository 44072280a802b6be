"""decide: options, profile and inputs of a graph give decisions; no graph is needed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.plain import PLAIN

import dynamicrad_compile as drad
from dynamicrad_compile.passes import Conditions, Dense, PlannedSite, Site, TextTokens, VideoSite
from dynamicrad_compile.passes.site import Trace
from dynamicrad_compile.plans.patterns import PATTERNS
from dynamicrad_compile.plans.patterns.pattern import Pattern, plan_of_mask
from dynamicrad_compile.plans.table import PlanSpec, RegimeSpec
from dynamicrad_compile.policy import Wishes, decide
from dynamicrad_compile.policy.planning import planned, without_meaning
from dynamicrad_compile.policy.settings import Regimes, Settings
from dynamicrad_compile.profiles import load_profile
from dynamicrad_compile.profiles.parameters import Table

SMALL = {"profile": PLAIN, "min_tokens": 0, "block_size": 16, "regime": "mid"}


def video(path="blocks.0.attn1", grid=(4, 6, 8), text=(0, 0), device="cpu"):
    before_after = TextTokens(*text)
    tokens = grid[0] * grid[1] * grid[2] + sum(text)
    return VideoSite(
        site=Site(None, None, path),
        grid=grid,
        text=before_after,
        shape=(1, 2, tokens, 64),
        dtype=torch.float32,
        device=torch.device(device),
        trace=Trace([], [], True),
        axes=(),
    )


def decisions(*sites, **options):
    return decide(sites, Conditions(), Wishes.of(drad.Options(**{**SMALL, **options})))


LAYERS = [video(f"blocks.{n}.attn1") for n in range(3)]


def test_every_site_gets_a_plan_for_its_grid_and_text():
    found = decisions(video(), video(grid=(3, 5, 7), text=(11, 2)), sparsity=0.5)
    assert [type(site) for site in found.sites] == [PlannedSite, PlannedSite]
    assert [site.table.plan.q_len for site in found.sites] == [192, 118]
    assert all(site.spec.regimes[0].name == "mid" for site in found.sites)
    assert found.unmet == ()


@pytest.mark.parametrize("pattern", ["radial", "adaspa", "lvsa"])
def test_no_pattern_is_made_for_a_sequence_that_is_too_long(pattern):
    (site,) = decisions(video(grid=(500, 200, 200)), pattern=pattern, block_size=None).sites
    assert (site.reason.code, site.this_grid) == ("too_long", True)


def test_a_sequence_that_is_too_long_for_a_pattern_stays_dense():
    (site,) = decisions(video(grid=(500, 200, 200)), sparsity=0.5).sites
    assert (site.reason.code, site.this_grid) == ("too_long", True)
    assert "20000000 tokens are 1250000 blocks of 16" in site.reason.text


def test_deciding_changes_no_site_and_gives_the_same_again():
    before = [dict(vars(site.site)) for site in LAYERS]
    first, second = (decisions(*LAYERS, sparsity=0.5, dense_layers=1) for _ in range(2))
    assert [dict(vars(site.site)) for site in LAYERS] == before
    assert [type(site) for site in first.sites] == [Dense, PlannedSite, PlannedSite]
    assert first.notes == second.notes
    assert first.control == second.control


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        ({"pattern": "dense"}, [True] * 3),
        ({"dense_layers": 2}, [True, True, None]),
        ({"min_tokens": 4096}, [False] * 3),
    ],
    ids=lambda value: next(iter(value), "") if isinstance(value, dict) else "",
)
def test_dense_sites_say_whether_that_was_asked_for(options, asked):
    found = decisions(*LAYERS, **options)
    assert [site.asked if isinstance(site, Dense) else None for site in found.sites] == asked
    assert all(site.reason for site in found.sites if isinstance(site, Dense))


def test_dense_layers_need_to_know_the_layer():
    (site,) = decisions(video(path="attn1"), dense_layers=1).sites
    assert isinstance(site, Dense)
    assert not site.asked


def test_dense_steps_without_a_timestep_are_an_unmet_wish():
    found = decisions(video(), dense_steps=3)
    assert "dense_steps = 3" in found.unmet[0]
    assert not found.control.gates


@pytest.mark.parametrize(
    ("options", "path"),
    [({"mode": "static_ratio"}, "blocks.0.attn1"), ({"mode": "dynamic_threshold"}, "attn1")],
    ids=["nothing to choose", "one block for all layers"],
)
def test_blocks_are_not_kept_between_steps_where_that_has_no_meaning(options, path):
    found = decisions(video(path=path), refresh_steps=4, sparsity=0.5, **options)
    assert any("refresh_steps = 4" in problem for problem in found.unmet)
    assert found.control.refresh_steps == 0


def test_the_regime_is_the_safe_one_without_a_router():
    found = decisions(video(), regime="auto")
    assert [regime.name for regime in found.sites[0].spec.regimes] == ["high"]
    assert found.control.router is None
    assert any("router" in note for note in found.notes)


def test_options_without_meaning_to_a_pattern_are_named():
    found = decisions(video(), pattern="radial", sparsity=0.5)
    assert any("sparsity" in note and "not used" in note for note in found.notes)


def test_profile_auto_names_what_it_picked():
    found = decisions(video(grid=(21, 30, 52)), profile="auto")
    assert any(note.startswith("profile 'auto' is ") for note in found.notes)


@pytest.mark.parametrize("mode", ["static_ratio", "dynamic_threshold"])
def test_a_target_that_is_not_reached_is_said(mode):
    """192 tokens are 12 blocks of 16: a row that reads one of them skips 11 of 12."""
    options = {"mode": mode, "compensate": 0.0, "sink_frames": 0}
    assert not any("target" in note for note in decisions(video(), **options, sparsity=0.5).notes)
    found = decisions(video(), **options, sparsity=0.99)
    (note,) = (note for note in found.notes if "target" in note)
    assert note.startswith("the target sparsity is not reached over 4x6x8: not 0.99 (mid motion) but 0.9")
    assert note.endswith("of 12 blocks of 16 tokens every row always reads some: a smaller block_size can skip more")
    assert found.unmet == ()
    paid = decisions(video(), **{**options, "compensate": 1.0}, sparsity=0.9)
    assert any("compensate=0 skips more" in note for note in paid.notes)


def test_no_site_no_decision():
    found = decisions()
    assert found.sites == []
    assert not found.control.gates


def test_a_static_pattern_is_planned_by_its_parameters_alone(monkeypatch):
    class Sinks(Table):
        sink_frames: int = 0

    def plan(layout, parameters):
        mask = torch.eye(layout.num_blocks, dtype=torch.bool)
        mask[:, : parameters.sink_frames * 3] = True
        return plan_of_mask(mask.numpy(), layout)

    monkeypatch.setitem(PATTERNS, "sinks", Pattern("sinks", Sinks, plan))
    wishes = Wishes.of(drad.Options(**SMALL, sink_frames=2, sparsity=0.5))
    settings = replace(Settings.of(wishes.options, load_profile("default")), pattern="sinks")
    found = planned(video(), settings, wishes, Regimes(("mid",)))
    assert found.spec == PlanSpec("sinks", 16, (RegimeSpec("", Sinks(sink_frames=2)),))
    assert found.table.plan.kv_counts.flatten().tolist() == [6] * 6 + [7] * 6
    said = "pattern 'sinks' has no meaning for sparsity, regime: not used"
    assert without_meaning(wishes.options, "sinks") == said


METHODS = [
    (dict(mode="static_ratio", box="raster", compensate=0.0), ""),
    (
        dict(mode="static_ratio", box=(4, 2, 2), compensate=0.0),
        "blocks of 16 tokens are boxes of 4x2x2 (frames x height x width), chosen by place; for a dropped one stands "
        "nothing",
    ),
    (
        dict(mode="dynamic_threshold", box="raster", compensate=1.0, covariance=False, rank="error"),
        "blocks of 16 tokens are runs in raster order, chosen by error; for a dropped one stands mean",
    ),
    (
        dict(mode="dynamic_threshold", box=(4, 2, 2), compensate=1.0, covariance=True, rank="mass"),
        "blocks of 16 tokens are boxes of 4x2x2 (frames x height x width), chosen by mass; for a dropped one stands "
        "mean and covariances",
    ),
]


@pytest.mark.parametrize(("options", "line"), METHODS, ids=str)
def test_the_report_says_what_blocks_are_and_how_they_are_chosen(options, line):
    found = decisions(video(), sparsity=0.5, profile="default", **options)
    assert [note for note in found.notes if note.startswith("blocks of")] == ([line] if line else [])
    (site,) = found.sites
    box = options["box"]
    assert site.spec.regimes[0].box == (None if box == "raster" else box)
    assert site.table.plan.covariance == options.get("covariance", site.table.plan.covariance)


def test_a_choice_by_error_is_made_among_all_blocks():
    (site,) = decisions(video(), sparsity=0.5, mode="dynamic_threshold", rank="error", box=(4, 2, 2)).sites
    assert site.spec.criteria == (("ratio", "error"),)
    assert int(site.table.plan.kv_counts.min()) == site.table.plan.num_kv_blocks - 1


AUTO = """
schema = 1
[profile]
name = "auto"
block_size = 16
mode = "auto"
[regimes.low]
static_ratio = { sparsity = 0.8 }
[regimes.mid]
static_ratio = { sparsity = 0.8 }
[regimes.high]
static_ratio = { sparsity = 0.8 }
"""


@pytest.mark.parametrize(
    ("grid", "min_tokens", "mode"),
    [((16, 16, 32), "auto", "dynamic_threshold"), ((4, 8, 8), "auto", None), ((4, 8, 8), 0, "dynamic_threshold")],
)
def test_mode_auto_chooses_by_content_where_that_pays(grid, min_tokens, mode, tmp_path):
    """On the CPU at 8,192 tokens it does, at 256 nothing does; a limit of one's own is not questioned."""
    profile = tmp_path / "auto.toml"
    profile.write_text(AUTO)
    found = decisions(video(grid=grid), profile=profile, min_tokens=min_tokens, block_size=None)
    (site,) = found.sites
    assert isinstance(site, PlannedSite) == (mode is not None)
    if mode:
        assert bool(site.spec.criteria) == (mode == "dynamic_threshold")
    said = [note for note in found.notes if "mode 'auto'" in note]
    assert bool(said) == (min_tokens == "auto")


def test_a_device_that_nothing_is_known_of_gets_static_blocks(tmp_path, monkeypatch):
    from dynamicrad_compile.plans import crossover

    monkeypatch.setattr(crossover, "architecture", lambda device: None)
    profile = tmp_path / "auto.toml"
    profile.write_text(AUTO)
    found = decisions(video(grid=(16, 16, 32)), profile=profile, min_tokens="auto", block_size=None)
    assert "nothing is known of this device" in " ".join(found.notes)
    assert not found.sites[0].spec.criteria


def test_blocks_smaller_than_the_box_of_a_profile_are_cut_from_it():
    found = decisions(video(), sparsity=0.5, profile="default", mode="static_ratio")
    assert any("blocks of 16 tokens are cut from boxes of 4x4x8" in note for note in found.notes)
