"""Profiles load by name and path; every mistake in a file is named with file, key, value and range."""

import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from pydantic import ValidationError
from support.plain import PLAIN

from dynamicrad_compile.errors import ProfileError
from dynamicrad_compile.kernels.select_criteria import CRITERIA, RANKS
from dynamicrad_compile.plans.make import make_plan
from dynamicrad_compile.profiles import REGIMES, list_profiles, load_profile, pick_profile
from dynamicrad_compile.profiles.parameters import Criterion, Rank

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "dynamicrad_compile"
DEFAULT = Path(PLAIN).read_text(encoding="utf-8")


def write(folder, text):
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", list_profiles())
def test_shipped_profiles_are_valid_and_named_like_their_file(name):
    profile = load_profile(name)
    assert profile.name == name
    assert profile.description
    sparsities = [profile.regime(regime).static_ratio.sparsity for regime in REGIMES]
    assert sparsities == sorted(sparsities, reverse=True)


def test_auto_is_the_default_profile():
    assert load_profile("auto") == load_profile() == load_profile("default")


def test_default_values():
    profile = load_profile("default")
    assert (profile.pattern, profile.block_size, profile.dense_layers) == ("dynamicrad", 128, 0)
    assert profile.min_tokens == "auto"
    assert profile.provenance.optimizer == "none"
    assert profile.regimes.mid.static_ratio.sparsity == 0.80
    tables = [table for name in REGIMES for table in profile.regime(name).tables]
    assert len(tables) == 6
    assert all(table.box_sizes and table.covariance and table.compensate == 1.0 for table in tables)
    assert {profile.regime(name).dynamic_threshold.rank for name in REGIMES} == {"error"}


def test_load_by_path(tmp_path, monkeypatch):
    path = write(tmp_path, DEFAULT.replace('min_tokens = "auto"', "min_tokens = 4096"))
    assert load_profile(path).min_tokens == 4096
    assert load_profile(str(path)) == load_profile(path)
    monkeypatch.chdir(tmp_path)
    assert load_profile("mine.toml") == load_profile(f".{os.sep}mine.toml") == load_profile(path)


def test_optional_tables_and_keys_may_be_left_out(tmp_path):
    lines = [f"regimes.{name}.static_ratio.sparsity = 0.5" for name in REGIMES]
    path = write(tmp_path, "\n".join(["schema = 1", 'profile.name = "mine"', *lines]))
    profile = load_profile(path)
    assert profile.regime("low").static_ratio.decay_factor == 1.0
    assert profile.provenance.date is None


def test_a_profile_can_not_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        load_profile("default").regimes.low.static_ratio.sparsity = 0.1


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "sparsity = 0.85",
            "sparsity = 1.4",
            r"regimes\.low\.static_ratio\.sparsity = 1\.4: .*Expected a number in 0\.\.1",
        ),
        ("sparsity = 0.85", "sparsity = nan", r"sparsity = nan: .*finite"),
        ("sparsity = 0.85", 'sparsity = "0.85"', r"sparsity = '0\.85': .*Expected a number in 0\.\.1"),
        ("sparsity = 0.85", "sparsty = 0.85", r"static_ratio\.sparsty: unknown key.*Did you mean 'sparsity'"),
        ("sparsity = 0.85", "", r"regimes\.low\.static_ratio\.sparsity: this key is missing"),
        ("sink_frames = 1", "sink_frames = -1", r"sink_frames = -1: .*Expected an integer of at least 0"),
        ("sink_frames = 1", "sink_frames = true", r"sink_frames = True: .*Expected an integer"),
        ("decay_factor = 1.0", "decay_factor = 0.0", r"decay_factor = 0\.0: .*0\.001\.\.1000"),
        ("block_size = 128", "block_size = 100", r"profile\.block_size = 100: .*\[16, 32, 64, 128, 256\]"),
        ('pattern = "dynamicrad"', 'pattern = "star"', r"profile\.pattern = 'star': .*'radial'"),
        ('min_tokens = "auto"', 'min_tokens = "some"', r'= \'some\': expected "auto" or an integer'),
        ('min_tokens = "auto"', "min_tokens = -5", r"min_tokens = -5: expected"),
        ("[regimes.low.", "[regimes.lo.", r"regimes\.lo: unknown key.*'low'"),
        ("[provenance]", "[provenence]", r"provenence: unknown key.*Did you mean 'provenance'"),
        ("schema = 1", "schema = 2", r"schema = 2: .*Expected one of \[1\]"),
        ("schema = 1", "", r"schema: this key is missing"),
        ('description = "', "descriptions = \"", r"profile\.descriptions: unknown key.*'description'"),
        ("schema = 1", "schema = ", r"is not valid TOML: .*line 2"),
        ("[regimes.low.static_ratio]", "[regimes.low.x]", r"static_ratio: this key is missing\..*a table"),
    ],
)  # fmt: skip
def test_mistakes_are_named(tmp_path, old, new, message):
    assert old in DEFAULT
    path = write(tmp_path, DEFAULT.replace(old, new, 1))
    with pytest.raises(ProfileError, match=f"(?s)mine.toml.*{message}"):
        load_profile(path)


def test_value_in_place_of_a_table(tmp_path):
    path = write(tmp_path, DEFAULT.split("[regimes.low")[0] + "[regimes]\nlow = 3\nmid = 4\nhigh = 5\n")
    with pytest.raises(
        ProfileError,
        match=r"regimes\.low = 3: this is not a table\..*\['static_ratio', 'dynamic_threshold', 'schedule'\]",
    ):
        load_profile(path)


def test_all_mistakes_are_reported_together(tmp_path):
    path = write(tmp_path, DEFAULT.replace("0.85", "7").replace("0.70", "-1"))
    with pytest.raises(ProfileError) as caught:
        load_profile(path)
    assert "low.static_ratio.sparsity = 7" in str(caught.value)
    assert "high.static_ratio.sparsity = -1" in str(caught.value)


def test_unknown_name_lists_the_shipped_profiles_and_the_nearest():
    with pytest.raises(ProfileError, match=r"called 'defalt'.*'default'.*Did you mean 'default'"):
        load_profile("defalt")


def test_missing_file_lists_the_shipped_profiles(tmp_path):
    with pytest.raises(ProfileError, match=r"no profile at .*default\.toml.*Did you mean 'default'"):
        load_profile(tmp_path / "default.toml")


@pytest.mark.parametrize("content", [b"\xff\xfe", None], ids=["not-utf8", "folder"])
def test_unreadable_file(tmp_path, content):
    path = tmp_path / "odd.toml"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(ProfileError, match=r"odd\.toml can't be read"):
        load_profile(path)


@pytest.mark.parametrize("value", [3, None], ids=["int", "none"])
def test_neither_name_nor_path(value):
    with pytest.raises(ProfileError, match="by name or path"):
        load_profile(value)


def test_unknown_regime_suggests_the_nearest():
    with pytest.raises(ProfileError, match=r"no regime 'mod'.*Did you mean 'mid'"):
        load_profile("default").regime("mod")


def test_loading_a_profile_imports_no_torch():
    code = """
import sys, types
# An empty parent package: only the profiles' own imports count.
parent = types.ModuleType("dynamicrad_compile")
parent.__path__ = [sys.argv[1]]
sys.modules["dynamicrad_compile"] = parent
from dynamicrad_compile.profiles import load_profile
load_profile("default")
sys.exit("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code, str(PACKAGE)], check=False).returncode == 0


DYNAMIC = "[regimes.high.dynamic_threshold]\nsparsity = 0.5\nnear = -1.0\nfar = 0.5\n"


def test_dynamic_threshold_table(tmp_path):
    table = load_profile(write(tmp_path, DEFAULT + DYNAMIC)).regime("high").dynamic_threshold
    assert (table.criterion, table.near, table.far, table.temporal_decay) == ("threshold", -1.0, 0.5, 2.0)
    assert load_profile(PLAIN).regime("low").dynamic_threshold is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("criterion = 'mass'", r"dynamic_threshold = a table .*: near is a share in 0\.\.1"),
        ("criterion = 'best'", r"criterion: 'best'|criterion = 'best'"),
        ("fare = 1.0", r"dynamic_threshold\.fare: unknown key.*Did you mean 'far'"),
        ("compensate = 2.0", r"compensate = 2\.0: .*0\.\.1"),
    ],
)
def test_errors_of_the_dynamic_threshold_table(tmp_path, change, message):
    with pytest.raises(ProfileError, match=message):
        load_profile(write(tmp_path, DEFAULT + DYNAMIC + change + "\n"))


def test_criteria_of_a_profile_are_those_of_the_selection():
    assert get_args(Criterion) == CRITERIA
    assert get_args(Rank) == RANKS


def test_whole_run_sparsity_counts_dense_steps_and_layers(tmp_path):
    match = "[match]\ngrid = [21, 30, 52]\nheads = [12]\nhead_dim = 128\nsteps = 50\nlayers = 40\n"
    text = DEFAULT.replace("dense_layers = 0", "dense_layers = 1\ndense_steps = 12") + match
    assert load_profile(write(tmp_path, text)).whole_run_sparsity(0.788) == pytest.approx(0.788 * 38 / 50 * 39 / 40)
    with pytest.raises(ProfileError, match=r"no .match. table"):
        load_profile("default").whole_run_sparsity(0.8)


@pytest.mark.parametrize(
    ("grid", "heads", "head_dim", "name"),
    [
        ((21, 30, 52), 12, 128, "wan-480p"),
        ((21, 52, 30), 40, 128, "wan-480p"),  # portrait
        ((21, 45, 80), 40, 128, "wan-720p"),
        ((30, 45, 80), 24, 128, "hunyuan-720p"),
        ((13, 30, 45), 48, 64, "cogvideox"),
        ((37, 32, 32), 56, 128, "minimax-h3"),
        ((21, 30, 52), 2, 24, "default"),  # no such model
        ((21, 4, 4), 12, 128, "default"),  # far from any
    ],
)
def test_auto_picks_the_nearest_grid_of_the_same_heads(grid, heads, head_dim, name):
    profile, why = pick_profile(grid, heads, head_dim)
    assert profile.name == name
    assert f"{heads} heads of {head_dim} over {'x'.join(map(str, grid))}" in why


@pytest.mark.parametrize("name", sorted(set(list_profiles()) - {"default"}))
def test_tuned_profiles_meet_their_sparsity_on_their_grid(name):
    profile = load_profile(name)
    assert profile.provenance.optimizer
    for regime in REGIMES:
        plan = make_plan("dynamicrad", profile.match.grid, profile.block_size, profile=profile, regime=regime)
        assert plan.sparsity == pytest.approx(0.8, abs=0.01)
