"""Timestep, prompt and mask are found among a graph's inputs, whatever they are called."""

from __future__ import annotations

import pytest
import torch
from support.conditioned import Model, NoTime
from support.graphs import capture, make
from zoo.more import ZOO_MORE

PROMPT = "encoder_hidden_states"
CASES = {
    "wan_t2v": ("timestep", PROMPT, None),
    "wan_i2v": ("timestep", PROMPT, None),  # beside image tokens
    "wan22_ti2v": ("timestep", PROMPT, None),  # a timestep for each token
    "hunyuan_video": ("timestep", PROMPT, "encoder_attention_mask"),  # beside guidance
    "cogvideox_5b": ("timestep", PROMPT, None),
    "cogvideox_15": ("timestep", PROMPT, None),  # beside ofs
    "ltx": ("timestep", PROMPT, "encoder_attention_mask"),
    "allegro": ("timestep", PROMPT, "encoder_attention_mask"),
    "cosmos1": ("timestep", PROMPT, "attention_mask"),
    "cosmos2": ("timestep", PROMPT, None),  # [B, 1, frames, 1, 1]
    "kandinsky5": ("timestep", PROMPT, None),
    "skyreels_v2_df": ("timestep", PROMPT, None),  # a timestep for each frame, beside fps
    "anyflow": ("timestep", PROMPT, None),  # beside r_timestep
}


@pytest.mark.parametrize("name", CASES)
def test_conditions_of_real_models(name):
    model, kwargs, *_ = ZOO_MORE[name]() if name in ZOO_MORE else make(name)
    ((context, _),) = capture(model, **kwargs)
    found = context.conditions
    names = [None if node is None else node.name for node in (found.timestep, found.prompt, found.mask)]
    assert [n and n.replace("l_kwargs_", "l_")[2:-1] for n in names] == list(CASES[name])


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
