"""Patterns have one interface, and options, profiles, tuner and patterns one set of ranges."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from pydantic import ValidationError

import dynamicrad_compile as drad
from dynamicrad_compile.errors import OptionsError, PlanError
from dynamicrad_compile.plans import cost
from dynamicrad_compile.plans.layout import Layout
from dynamicrad_compile.plans.patterns import PATTERNS
from dynamicrad_compile.plans.patterns.pattern import Pattern, plan_of_mask
from dynamicrad_compile.plans.table import PlanSpec, RegimeSpec
from dynamicrad_compile.profiles.parameters import DynamicThreshold, PatternName, Radial, StaticRatio, Table, limits
from dynamicrad_compile.tuning.space import CHOICE, DEFAULTS, PRIOR

LAYOUT = Layout((4, 6, 8), 16, 5, 3)


def test_the_registry_has_all_names():
    assert set(PATTERNS) == set(get_args(PatternName))
    assert all(name == pattern.name for name, pattern in PATTERNS.items())


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_plan_and_candidates_of_every_pattern(pattern):
    values = {"sparsity": 0.5} if "sparsity" in pattern.parameters.model_fields else {}
    parameters = pattern.checked(values)
    plan, candidates = pattern.plan(LAYOUT, parameters), pattern.candidates(LAYOUT, parameters)
    assert plan.q_len == plan.kv_len == LAYOUT.seq_len
    assert candidates.plan.block_mask().equal(plan.block_mask())
    forced = torch.equal(candidates.kv_forced, plan.kv_counts)
    assert forced == (pattern.needs != "selection")
    if pattern.needs != "search":  # a grid alone gives no plan
        assert plan.block_mask().equal(drad.make_plan(pattern.name, (4, 6, 8), 16, 5, 3, **values).block_mask())
    with pytest.raises(ValidationError, match="frozen"):
        parameters.anything = 1


def test_another_pattern_takes_one_file_and_one_entry(monkeypatch):
    class Wide(Table):
        blocks: int = 2

    def plan(layout, parameters):
        near = torch.ones(layout.num_blocks, layout.num_blocks, dtype=torch.bool)
        return plan_of_mask(near.tril(parameters.blocks).triu(-parameters.blocks).numpy(), layout)

    monkeypatch.setitem(PATTERNS, "wide", Pattern("wide", Wide, plan))
    made = drad.make_plan("wide", (4, 6, 8), 16, blocks=1)
    assert made.kv_counts.flatten().tolist() == [2, *[3] * 10, 2]
    spec = PlanSpec("wide", 16, (RegimeSpec("", Wide(blocks=1)),))
    assert PlanSpec.from_json(spec.to_json()) == spec
    assert spec.build((4, 6, 8), 0, 0).plan.block_mask().equal(made.block_mask())
    with pytest.raises(PlanError, match=r"unknown parameter 'block'.*it takes \['blocks'\].*'blocks'"):
        drad.make_plan("wide", (4, 6, 8), 16, block=1)


def test_a_specification_knows_its_pattern():
    with pytest.raises(PlanError, match="parameters of type Radial, got StaticRatio"):
        PlanSpec("radial", 16, (RegimeSpec("", StaticRatio(sparsity=0.5)),))
    with pytest.raises(PlanError, match="can't be chosen by 'mass': it is static"):
        PlanSpec("radial", 16, (RegimeSpec("", Radial(), "mass", 0.5, 0.5),))


@pytest.mark.parametrize("name", ["sparsity", "decay_factor", "sink_frames", "compensate"])
def test_options_and_patterns_have_the_same_ranges(name):
    low, high = limits(StaticRatio, name)
    for value in (low, high):
        if value is not None:
            assert getattr(drad.Options(**{name: value}), name) == value
            drad.make_plan("dynamicrad", (4, 6, 8), 16, **{"sparsity": 0.5, name: value})
    for value in (low - 1 if isinstance(low, int) else low * 0.99 - 1e-9, None if high is None else high * 1.01):
        if value is not None:
            with pytest.raises(OptionsError, match=name):
                drad.Options(**{name: value})
            with pytest.raises(PlanError, match=name):
                drad.make_plan("dynamicrad", (4, 6, 8), 16, **{"sparsity": 0.5, name: value})


def test_the_tuner_searches_inside_the_ranges():
    assert set(DEFAULTS) == set(PRIOR) == set(StaticRatio.model_fields) - {"sparsity"}
    assert set(CHOICE) - {"candidates", "balance"} == set(DynamicThreshold.model_fields) - set(
        StaticRatio.model_fields
    ) - {"near", "far"}
    numbers = {name for name, (_, _, kind) in PRIOR.items() if kind != "listed"}
    assert set(PRIOR) - numbers == {"covariance", "box"}
    for name in numbers - {"compensate"}:  # searched beyond its ends and clipped
        low, high = limits(StaticRatio, name)
        assert low <= PRIOR[name][0]
        assert high is None or PRIOR[name][1] <= high


def test_what_compensation_costs():
    kept = torch.tensor([[2, 4, 4]])
    assert float(cost.computed(kept, None, 4, 16)) == pytest.approx(10 / 12)
    assert float(cost.computed(kept, 0.5, 4, 16)) == pytest.approx(10 / 12 + 1 / 3 / 16)
    weights = torch.tensor([[0.0], [1.0]])
    assert float(cost.computed(kept.expand(2, 3), weights, 4, 16)) == pytest.approx(10 / 12 + 1 / 6 / 16)
    assert cost.blocks_to_skip(0.8, 16, 0.5) == pytest.approx(0.8 + 1 / 16)
    assert (cost.blocks_to_skip(0.8, 16, 0.0), cost.blocks_to_skip(0.0, 16, 1.0)) == (0.8, 0.0)
    assert cost.blocks_to_skip(0.99, 16, 1.0) == 1.0
    assert cost.covariances(128, 32768, 128, 128) == pytest.approx(0.0078, abs=1e-4)
