"""qk_dtype "int8_dense": dense steps from int8 scores, sparse steps as exact as without it."""

from __future__ import annotations

import pytest
import torch
from support.graphs import compile_sparse, drad, first_output, make, relative_error
from support.marks import INNER

OPTIONS = dict(block_size=16, regime="mid", min_tokens=0, sparsity=0.6)
TIMESTEPS = (1000.0, 900.0, 700.0, 500.0)
CASES = {
    "steps": dict(dense_steps=2),
    "timestep": dict(dense_timestep=800.0),
    "stages": dict(sparsity=[(0.0, 0.0), (0.5, 0.6)], steps=4),
    "covariances": dict(dense_steps=2, profile="default", mode="dynamic_threshold"),
    "adaspa": dict(pattern="adaspa", search_steps=(1,)),
}


def call(compiled, inputs, timestep):
    with torch.no_grad():
        return first_output(compiled(**{**inputs, "timestep": torch.full_like(inputs["timestep"], timestep)}))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("inner", INNER)
def test_dense_steps_alone_are_rounded(name, inner):
    torch.manual_seed(0)
    model, inputs, _ = make("wan_t2v")
    options = {**OPTIONS, **CASES[name], "inner": inner}
    exact, rounded = (compile_sparse(model, **options, qk_dtype=dtype) for dtype in (None, "int8_dense"))
    for generation in range(2):
        for step, timestep in enumerate(TIMESTEPS):
            error = relative_error(call(rounded, inputs, timestep), call(exact, inputs, timestep))
            if name == "timestep" and not generation:
                continue  # the direction of timesteps is learnt
            if step < 2:
                assert 1e-6 < error < 2e-2, (generation, step)
            elif name != "adaspa":  # whose first search goes by the rounded log-sum-exp
                assert error < 1e-6, (generation, step)
    assert drad.report(rounded).replaced[0].sparsity == pytest.approx(drad.report(exact).replaced[0].sparsity, abs=1e-6)


def test_without_dense_steps_nothing_is_rounded():
    torch.manual_seed(0)
    model, inputs, _ = make("wan_t2v")
    exact, rounded = (compile_sparse(model, **OPTIONS, inner="eager", qk_dtype=d) for d in (None, "int8_dense"))
    assert torch.equal(call(rounded, inputs, 1.0), call(exact, inputs, 1.0))
    assert "qk_dtype 'int8_dense' does nothing here: no step is dense" in drad.report(rounded).notes
