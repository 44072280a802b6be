"""Timestep, prompt and mask are found among a graph's inputs, whatever they are called; see also the zoo tests."""

from __future__ import annotations

import torch
from support.conditioned import Model, NoTime
from support.graphs import capture
from zoo.conditions import CONDITIONS
from zoo.models import ZOO
from zoo.more import ZOO_MORE


def test_the_zoo_has_the_models_whose_conditions_are_known():
    assert set(CONDITIONS) <= {*ZOO, *ZOO_MORE}


def test_names_are_not_needed():
    inputs = (
        torch.randn(1, 3, 4, 6, 10),
        torch.tensor([500]),
        torch.randn(1, 7, 8),
        torch.ones(1, 7),
        torch.arange(60),
    )
    ((context, _),) = capture(Model(), *inputs)
    found = context.conditions
    assert [found.timestep.name, found.prompt.name, found.mask.name] == ["l_b_", "l_c_", "l_d_"]
    assert found.embedding_dim == 8


def test_what_is_not_there_is_not_found():
    ((context, _),) = capture(NoTime(), torch.randn(1, 3, 4, 6, 10), torch.randn(1, 7, 8))
    assert context.conditions.timestep is None
    assert context.conditions.mask is None
    assert context.conditions.prompt.name == "l_c_"
