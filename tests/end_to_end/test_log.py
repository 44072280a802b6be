"""What the package says while it compiles, through Python's logging."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
import torch
from support.conditioned import NoTime
from support.graphs import call, compile_sparse, make


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, logger="dynamicrad_compile")
    return lambda level: [r.getMessage() for r in caplog.records if r.levelno == level]


def test_one_line_a_graph(said):
    model, kwargs, _ = make("wan_t2v")
    compiled = compile_sparse(model, block_size=16, sparsity=0.6, inner="eager")
    for _ in range(2):
        call(compiled, kwargs)
    (line,) = said(logging.INFO)
    assert "2 of 2 video self-attentions replaced" in line
    for part in ("[0/0]", "grid 5x6x8", "sparsity 60", "profile plain", "compiled in"):
        assert part in line
    assert said(logging.WARNING) == []


def test_a_warning_where_nothing_is_replaced(said):
    model, kwargs, _ = make("wan_t2v")
    call(compile_sparse(model, min_tokens=100_000, inner="eager"), kwargs)
    (line,) = said(logging.WARNING)
    assert "no attention of this graph was replaced: blocks.0.attn1 (2 such) stays dense" in line
    assert "min_tokens" in line


def test_no_warning_where_nothing_was_to_be_replaced(said):
    model, kwargs, _ = make("wan_t2v")
    call(compile_sparse(model, pattern="dense", inner="eager"), kwargs)
    call(compile_sparse(torch.nn.Linear(3, 3), inner="eager"), {"input": torch.randn(2, 3)})
    assert said(logging.WARNING) == []


def test_a_warning_for_each_wish_that_is_not_met(said):
    with torch.no_grad():
        compile_sparse(NoTime(), dense_steps=2, inner="eager")(torch.randn(1, 3, 4, 6, 10), torch.randn(1, 7, 8))
    (line,) = said(logging.WARNING)
    assert "dense_steps = 2 can't be honoured: no timestep among the inputs" in line
    assert "drad.compile(model, dense_steps = 2)" in line


SCRIPT = """
import torch
class Net(torch.nn.Module):
    def forward(self, x):
        q = x.flatten(2).transpose(1, 2).unflatten(2, (2, -1)).transpose(1, 2)
        return torch.nn.functional.scaled_dot_product_attention(q, q, q)
options = dict(min_tokens=0, block_size=16, inner="eager")
with torch.no_grad():
    torch.compile(Net(), backend="dynamicrad", options=options)(torch.randn(1, 32, 5, 6, 8))
"""


@pytest.mark.parametrize(("level", "shown"), [("+dynamicrad_compile", True), ("", False)])
@pytest.mark.slow
def test_torch_logs_turns_it_on(level, shown):
    environment = {name: value for name, value in os.environ.items() if name != "TORCH_LOGS"}
    environment |= {"TORCH_LOGS": level} if level else {}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True)
    assert ("1 of 1 video self-attentions replaced" in done.stderr) == shown
