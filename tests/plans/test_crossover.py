"""min_tokens="auto": the crossover table, its interpolation, its errors, and what the backend does with it."""

from __future__ import annotations

import datetime
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dynamicrad_compile as drad
from dynamicrad_compile.errors import CrossoverError
from dynamicrad_compile.plans import crossover
from dynamicrad_compile.plans.crossover import Row, Table, expected_gain, first_length
from dynamicrad_compile.plans.table import PlanSpec, RegimeSpec
from dynamicrad_compile.policy import expected_sparsity
from dynamicrad_compile.profiles.parameters import StaticRatio

ABOUT = {
    "machine": 'a "machine" of \\ mine',
    "date": datetime.date(2026, 11, 24),
    "versions": "torch 2.13.0",
    "command": "none",
}


def table(arch="sm_90", dtype="half", source="measured", rows=None):
    # Time is linear in the share kept: 0.1 + 0.9 (1 - s) at 1024 tokens, just 1 - s from 4096 on.
    rows = rows or [
        Row(1024, 128, 0.5, 1 / 0.55),
        Row(1024, 128, 0.9, 1 / 0.19),
        Row(4096, 128, 0.5, 2.0),
        Row(4096, 128, 0.9, 10.0),
    ]
    return Table(arch=arch, dtype=dtype, source=source, rows=tuple(rows), **ABOUT)


@pytest.mark.parametrize(
    ("tokens", "sparsity", "ratio"),
    [
        (1024, 0.5, 1 / 0.55),
        (1024, 0.7, 1 / 0.37),
        (1024, 0.2, 1 / 0.82),
        (2048, 0.7, 2 / (0.37 + 0.3)),
        (4096, 0.9, 10.0),
        (1 << 20, 0.7, 1 / 0.3),
        (512, 0.7, 1 / (0.37 + 0.035)),
        (4096, 0.0, 1.0),
    ],
)
def test_interpolation(tokens, sparsity, ratio):
    assert expected_gain("sm_90", tokens, sparsity, tables=[table()]).ratio == pytest.approx(ratio, rel=1e-3)


def test_never_more_than_ideal_and_never_better_than_the_shortest():
    noisy = table(rows=[Row(1024, 128, 0.5, 2.0), Row(1024, 128, 0.8, 9.0), Row(2048, 128, 0.5, 1.5)])
    assert expected_gain("sm_90", 1024, 0.8, tables=[noisy]).ratio == pytest.approx(5.0)
    assert expected_gain("sm_90", 128, 0.5, tables=[noisy]).ratio == pytest.approx(2.0)


@pytest.mark.parametrize("arch", ["cpu", "sm_70", "sm_80", "sm_90", "sm_103", "sm_121"])
@pytest.mark.parametrize("tokens", [0, 1, 77, 8320, 1 << 40])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.999, 1.0])
def test_shipped_table_answers_everything(arch, tokens, sparsity):
    gain = expected_gain(arch, tokens, sparsity, head_dim=40, half=False)
    if arch == "sm_70":
        assert gain is None
    else:
        assert math.isfinite(gain.ratio)
        assert gain.ratio > 0
        assert gain.ratio <= max(1 / max(1 - sparsity, 1e-3), 1.0) + 1e-9


def test_architectures_and_dtypes():
    tables = [table("sm_80"), table("sm_90"), table("sm_90", "float"), table("cpu", "float")]
    assert expected_gain("sm_89", 4096, 0.8, tables=tables).arch == "sm_80"
    assert expected_gain("sm_120", 4096, 0.8, tables=tables).arch == "sm_90"
    assert expected_gain("cpu", 4096, 0.8, half=True, tables=tables).arch == "cpu"
    assert expected_gain("sm_70", 4096, 0.8, tables=tables) is None
    assert crossover.architecture(torch.device("cpu")) == "cpu"
    assert crossover.architecture(torch.device("meta")) is None


def test_first_length():
    assert first_length([table()], "sm_90", 0.0) is None
    shortest = first_length([table(rows=[Row(1024, 128, 0.8, 0.8), Row(2048, 128, 0.8, 1.5)])], "sm_90", 0.8)
    assert 1024 < shortest < 2048


def test_saved_and_loaded(tmp_path):
    path = tmp_path / "table.toml"
    tables = (table(), table("cpu", "float", "estimated"))
    crossover.save(tables, path)
    loaded = crossover.load(path)
    assert [t.machine for t in loaded] == [ABOUT["machine"]] * 2
    assert [(r.tokens, r.head_dim, r.sparsity) for r in loaded[0].rows] == [r[:3] for r in tables[0].rows]
    before = path.read_text()
    with pytest.raises(CrossoverError, match="each architecture and dtype must come once"):
        crossover.save([table(), table()], path)
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('arch = "sm_90"', 'arch = "hopper"', "tables.0.arch"),
        ("[1024, 128, 0.5,", "[0, 128, 0.5,", r"tables.0.rows.0"),
        ("[1024, 128, 0.5,", "[1024, 128, 1.5,", r"tables.0.rows.0"),
        ("schema = 1", "schema = 2", "schema"),
        ("schema = 1", "schema = = 1", "can't be read"),
        ('source = "measured"', 'source = "guessed"', "tables.0.source"),
    ],
)
def test_wrong_files(tmp_path, old, new, message):
    path = tmp_path / "table.toml"
    crossover.save([table()], path)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    crossover.load.cache_clear()
    with pytest.raises(CrossoverError, match=message):
        crossover.load(path)


def test_every_shipped_table_says_where_it_is_from():
    tables = crossover.load()
    assert {t.source for t in tables if t.arch == "cpu"} == {"measured"}
    assert all(t.machine and t.versions and t.command for t in tables)
    for t in tables:
        if t.source == "estimated":
            assert "model" in t.machine


class Tiny(nn.Module):
    """A patch embedding and one attention over 4 x 3 x 5 = 60 tokens."""

    def __init__(self):
        super().__init__()
        self.patch, self.qkv = nn.Conv3d(3, 32, (1, 2, 2), (1, 2, 2)), nn.Linear(32, 96)

    def forward(self, latents):
        qkv = self.qkv(self.patch(latents).flatten(2).transpose(1, 2))
        return F.scaled_dot_product_attention(*(x.unflatten(-1, (2, 16)).transpose(1, 2) for x in qkv.chunk(3, -1)))


def explain(monkeypatch, rows, **options):
    """Report and site of the tiny model under a table with these rows for the CPU."""
    tables = () if rows is None else (table("cpu", "float", rows=rows),)
    monkeypatch.setattr(crossover, "load", lambda: tables)
    options = {"block_size": 16, "sparsity": 0.5, **options}
    report = drad.explain(Tiny(), torch.randn(2, 3, 4, 6, 10), options=options)
    (site,) = report.sites
    assert site.role == "video_self_attention"
    return report, site


def test_site_that_gains_is_replaced(monkeypatch):
    _, site = explain(monkeypatch, [Row(128, 128, 0.5, 1.6)])
    assert site.replaced


def test_site_that_does_not_gain_says_so(monkeypatch):
    report, site = explain(monkeypatch, [Row(128, 128, 0.5, 0.8)])
    assert not site.replaced
    assert site.code == "no_gain"
    assert "expected 0.80x of dense (measured for cpu: a" in site.reason
    assert "2026-11-24" in site.reason
    assert "min_tokens=0" in site.advice
    assert site.reason in report.summary()


def test_explicit_min_tokens_is_not_the_tables_business(monkeypatch):
    _, site = explain(monkeypatch, [Row(128, 128, 0.5, 0.8)], min_tokens=0)
    assert site.replaced


def test_without_a_table_the_old_limit_holds(monkeypatch):
    _, site = explain(monkeypatch, None)
    assert site.code == "few_tokens"


def test_broken_table_is_a_note_and_no_error(monkeypatch):
    def broken():
        raise CrossoverError("the crossover table is wrong")

    monkeypatch.setattr(crossover, "load", broken)
    (site,) = drad.explain(Tiny(), torch.randn(2, 3, 4, 6, 10), options={"block_size": 16}).sites
    assert site.code == "few_tokens"


def test_expected_sparsity_of_regimes():
    profile = drad.load_profile("wan-480p")
    static = RegimeSpec("low", StaticRatio(sparsity=0.75))
    chosen = RegimeSpec("high", StaticRatio(sparsity=0.2), "ratio", 0.5, 0.5, sparsity=0.9)
    fixed = RegimeSpec("high", StaticRatio(sparsity=0.2), "threshold", 0.0, 0.0)
    for regimes, expected in [
        ((static,), 0.75),
        ((static, static), 0.75),
        ((static, chosen), (0.75 + 0.9) / 2),
        ((fixed,), profile.regime("high").static_ratio.sparsity),
    ]:
        spec = PlanSpec("dynamicrad", 16, regimes)
        found = expected_sparsity(profile, spec, spec.build((4, 8, 16), 0, 0))
        assert found == pytest.approx(expected, abs=0.01)
